"""Squared gradients of one row, summed over groups, from Gram matrices of its taps: no gradient is formed.

The gradient of a dense kernel is ``sum_t a_t g_t^T``. The sum of its squares over inputs is
``sum_tt' (a_t . a_t') g_to g_t'o`` for output ``o``: two products with ``T^2`` instead of one of the kernel's size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.dtypes import wide_dtype
from fisher_jax._support.jax_internals import lookup
from fisher_jax._support.meshes import replicated
from fisher_jax._tracing.axes import UntraceableError, in_leaf_order, trace_axes
from fisher_jax._tracing.dense import matrices, operand_axes
from fisher_jax._tracing.roles import Grouping
from fisher_jax._tracing.uses import Spec, Use

__all__ = ["cost", "fits", "squared_sums"]

_EXACT = jax.lax.Precision.HIGHEST


def fits(specs: list[Spec], grouping: Grouping) -> bool:
    """Whether the groups of a leaf can be had at its only use: a product, or an embedding's rows."""
    if grouping.side is None or len(specs) != 1:
        return False
    (spec,) = specs
    use = spec.use
    if use.kind not in ("dense", "embedding") or "shared" in use.loops:
        return False
    if use.kind == "embedding" and (grouping.side == "column" or "mode" not in use.options):
        return False
    try:
        axes, taken = trace_axes(use)
    except UntraceableError:
        return False
    atoms = [atom for axis in axes for atom in axis]
    # A slice leaves part of the kernel to other uses; a loop over anything but leading axes moves them.
    return all(atom.whole for atom in atoms) and set(taken) == set(range(len(use.loops)))


def cost(spec: Spec) -> tuple[int, int]:
    """Multiplications of the Gram route and of the gradient, of one row in one iteration of its loops."""
    if spec.use.kind == "embedding":
        # The gradient needs no product, but as much memory as the table.
        return 0, 1
    batch, inputs, outputs = (math.prod(spec.use.operand.shape[i] for i in axes) for axes in operand_axes(spec.use))
    lengths = math.prod(spec.lengths)
    tokens = spec.inputs[0].size // max(1, lengths * batch * inputs)
    return batch * tokens**2 * (inputs + outputs), batch * tokens * inputs * outputs


def squared_sums(use: Use, side: str, inputs: tuple[Array, ...], cotangents: Array, by_gram: bool) -> Array:
    """Sums of the squared gradient of one use over all axes but those of ``side``, in the leaf's order of axes.

    Args:
        use: the static facts.
        side: ``row``, ``column`` or ``tensor``.
        inputs, cotangents: of one iteration of the use's loops.
        by_gram: or by forming the gradient.
    """
    wide = wide_dtype(cotangents.dtype)
    cotangents = cotangents.astype(wide)
    if use.kind == "embedding":
        sums, axes = _embedding(use, inputs[0], cotangents), [i for i, r in enumerate(use.roles) if r == "row"]
        return sums.sum() if side == "tensor" else in_leaf_order(use, sums, axes)
    batch, contracted, outputs = operand_axes(use)
    a, g = map(replicated, matrices(use, (inputs[0].astype(wide),), cotangents))
    sums = _by_gram(a, g, side) if by_gram else _by_gradient(a, g, side)
    if side == "tensor":
        return sums.sum()
    axes = [*batch, *(outputs if side == "row" else contracted)]
    return in_leaf_order(use, sums, axes)


def _by_gram(a: Array, g: Array, side: str) -> Array:
    if side == "column":
        a, g = g, a
    gram = jnp.einsum("bsi,bti->bst", a, a, precision=_EXACT)
    return jnp.sum(jnp.einsum("bst,bto->bso", gram, g, precision=_EXACT) * g, 1)


def _by_gradient(a: Array, g: Array, side: str) -> Array:
    gradient = jnp.einsum("bti,bto->bio", a, g)
    return jnp.sum(gradient**2, 2 if side == "column" else 1)


def _embedding(use: Use, indices: Array, cotangents: Array) -> Array:
    """``sum_j (sum of the cotangents of entry v)_j ** 2`` for every entry of the table."""
    rows = use.operand.shape[use.roles.index("row")]
    # Of a gather's output, offset axes are the entries of a vector and the others are those of the indices.
    picked = lookup(use.options, use.operand.shape)
    lead = [i for i in range(cotangents.ndim) if i not in picked.offset]
    cotangents, indices = replicated(cotangents), replicated(indices)
    vectors = jnp.transpose(cotangents, (*lead, *picked.offset)).reshape(indices[..., 0].size, -1)
    index = indices[..., picked.column].reshape(-1)
    if picked.clips:
        index = jnp.clip(index, 0, rows - 1)
    same = index[:, None] == index[None, :]
    gram = jnp.einsum("si,ti->st", vectors, vectors, precision=_EXACT)
    inside = jnp.where((index >= 0) & (index < rows), index, rows)
    return jnp.zeros(rows, gram.dtype).at[inside].add(jnp.sum(jnp.where(same, gram, 0), 1), mode="drop")


def reduce_taps(uses: dict[int, tuple[Grouping, bool]]) -> Any:
    """A ``reduce_tap`` for `program.trace`: leaf index to its grouping and whether to go by Gram."""

    def reduce(tap):
        grouping, by_gram = uses[tap.leaf]
        return squared_sums(tap.use, str(grouping.side), tap.inputs, tap.cotangents, by_gram)

    return reduce

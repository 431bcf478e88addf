"""Between a parameter leaf, as a model stores it, and the matrices ``[N, out, in]`` of its blocks."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.jax_internals import broadcast_axes, named_axes, permutation, slice_bounds, unstacked_axis
from fisher_jax._tracing.axes import trace_axes
from fisher_jax._tracing.dense import block_axes
from fisher_jax._tracing.uses import Segment, Step, Use
from fisher_jax.kronecker.blocks.convolution import kernel_blocks

__all__ = ["bias_rows", "inverse", "is_rearrangement", "kernel_matrices", "table_matrices", "through", "unit_axes"]

# Steps that change the dtype or the placement, not the numbers or their order.
_SAME = {
    "convert_element_type", "copy", "copy_p", "sharding_constraint", "reduce_precision", "layout_constraint",
    "reshard", "mesh_cast", "pvary", "pcast",
}  # fmt: skip


def is_rearrangement(use: Use) -> bool:
    """Whether the leaf reaches the use whole, every number once."""
    for segment in use.segments:
        for step in segment.steps:
            sizes = [math.prod(v.aval.shape) for v in (step.eqn.invars[0], step.eqn.outvars[step.output])]
            if sizes[0] != sizes[1]:
                return False
    return True


def through(segment: Segment, x: Array) -> Array:
    """The layout operations of a segment on any dtype and mesh."""
    for step in segment.steps:
        x = _moved(step, x)
    return x


def _moved(step: Step, x: Array) -> Array:
    """One operation anew: the equation itself belongs to the mesh and the dtype that it was traced on."""
    name = step.eqn.primitive.name
    if name in _SAME:
        return x
    shape = step.eqn.outvars[step.output].aval.shape
    if name == "transpose":
        return jnp.transpose(x, permutation(step.eqn))
    if name in ("reshape", "squeeze", "expand_dims"):
        return x.reshape(shape)
    if name == "broadcast_in_dim":
        return jax.lax.broadcast_in_dim(x, shape, broadcast_axes(step.eqn))
    if name == "rev":
        return jax.lax.rev(x, named_axes(step.eqn))
    if name == "unstack":
        return jax.lax.index_in_dim(x, step.output, unstacked_axis(step.eqn), keepdims=False)
    if name == "slice":
        return jax.lax.slice(x, *slice_bounds(step.eqn))
    return step(x)


def _operand(use: Use, x: Array, depth: int = 0) -> Array:
    """The parameter where it is used, one for each iteration of the loops that it is stacked over; dtype kept."""
    x = through(use.segments[depth], x)
    if depth == len(use.loops):
        return x
    if use.loops[depth] == "stacked":
        return jax.vmap(lambda part: _operand(use, part, depth + 1))(x)
    return _operand(use, x, depth + 1)


def _arranged(use: Use, leaf: Array, batch: tuple, out: tuple, inside: tuple) -> Array:
    operand = _operand(use, leaf)
    lead = operand.ndim - len(use.operand.shape)
    order = [*range(lead), *(lead + i for i in (*batch, *out, *inside))]
    sizes = [math.prod(use.operand.shape[i] for i in axes) for axes in (out, inside)]
    return jnp.transpose(operand, order).reshape(-1, *sizes)


def kernel_matrices(use: Use, leaf: Array) -> Array:
    """``[N, out, in]``: ``N`` layers of a stack times experts, or what a product or convolution keeps apart."""
    if use.kind == "conv":
        blocks = kernel_blocks(use, _operand(use, leaf))
        return blocks.reshape(-1, *blocks.shape[-2:])
    batch, inside, out = block_axes(use)
    return _arranged(use, leaf, batch, out, inside)


def table_matrices(use: Use, leaf: Array) -> Array:
    """``[N, width, V]`` of an embedding."""
    rows = tuple(i for i, role in enumerate(use.roles) if role == "row")
    return _arranged(use, leaf, (), tuple(i for i in range(len(use.roles)) if i not in rows), rows)


def bias_rows(use: Use, units: int, leaf: Array) -> Array:
    """``[N, units]`` of a bias that was broadcast over positions."""
    operand = _operand(use, leaf)
    lead = operand.ndim - len(use.operand.shape)
    own = unit_axes(use)
    first = operand[(slice(None),) * lead + tuple(slice(None) if i in own else 0 for i in range(operand.ndim - lead))]
    return first.reshape(-1, units)


def unit_axes(use: Use) -> tuple[int, ...]:
    """Axes of the operand of a bias along which it is not broadcast.

    Raises:
        UntraceableError: an axis that cannot be followed.
    """
    axes, _ = trace_axes(use)
    return tuple(i for i, atoms in enumerate(axes) if any(atom.size > 1 for atom in atoms))


def inverse(arrange: Callable[[Array], Array], leaf: Array | jax.ShapeDtypeStruct) -> Callable[[Array], Array]:
    """From matrices back to the leaf: ``arrange`` only moves numbers, so that its transpose undoes it."""

    def back(matrices: Array) -> Array:
        like = jax.ShapeDtypeStruct(leaf.shape, matrices.dtype)
        (found,) = jax.linear_transpose(arrange, like)(matrices)
        return found

    return back

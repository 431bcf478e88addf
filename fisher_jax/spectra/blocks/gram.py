"""Gram matrices of sequences' scores from taps: no gradient is formed.

The score of row ``u`` in a dense kernel is ``sum_t a_t g_t^T``, so that the product of two rows' scores is
``sum_{t in u, t' in v} (a_t . a_t') (g_t . g_t')``; of an embedding the first factor is whether the indices agree.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import passes
from fisher_jax._support.dtypes import wide, wide_dtype
from fisher_jax._support.jax_internals import lookup
from fisher_jax._support.meshes import replicating
from fisher_jax._tracing.dense import matrices
from fisher_jax._tracing.taps import Tap, capture
from fisher_jax.batch.tokens import Tokens
from fisher_jax.spectra.blocks.partition import ParameterBlock
from fisher_jax.spectra.blocks.scores import Scoring, row_loss

__all__ = ["grams", "smaller"]

Tree = Any
_EXACT = jax.lax.Precision.HIGHEST


def smaller(problem: Scoring, params: Tree, part: Tokens, blocks: tuple[ParameterBlock, ...]) -> list[int]:
    """Places of the blocks whose taps take less memory than their scores and than their covariance."""
    # Shapes alone, without the places on a mesh that arrays have.
    arguments = (params, part, jax.eval_shape(lambda: _keys(problem, part, jax.random.key(0))))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), arguments)
    taps = jax.eval_shape(functools.partial(_taps, problem), *shapes)
    sizes = [x.size for x in jax.tree.leaves(problem.selection.restrict(params))]
    rows = part.weights.shape[0] * problem.num_samples
    found = []
    for i, block in enumerate(blocks):
        tap = _only_tap(taps, block, sizes)
        if tap is None:
            continue
        numbers = sum(x.size for x in jax.tree.leaves((tap.inputs, tap.cotangents)))
        layers = block.layers or 1
        if numbers < layers * block.size * min(rows, block.size):
            found.append(i)
    return found


def _only_tap(taps: list[Tap], block: ParameterBlock, sizes: list[int]) -> Tap | None:
    """The tap of a block that is one leaf with one use of a known form, whole and in layers only."""
    own = [tap for tap in taps if tap.leaf in block.leaves]
    if len(block.leaves) != 1 or len(own) != 1:
        return None
    (tap,) = own
    use, cotangents = tap.use, tap.cotangents
    if use.kind not in ("dense", "embedding") or "shared" in use.loops or cotangents is None:
        return None
    lengths = cotangents.shape[1 : 1 + len(use.loops)]
    if use.kind == "embedding" and ("mode" not in use.options or use.roles.count("row") != 1):
        return None
    if math.prod(use.operand.shape) * math.prod(lengths) != sizes[tap.leaf]:
        return None
    return tap if block.layers is None or lengths == (block.layers,) else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def grams(
    problem: Scoring, blocks: tuple[ParameterBlock, ...], params: Tree, part: Tokens, key: Array
) -> list[Array]:
    """For every block the Gram matrices ``[layers, N, N]`` of all rows' scores."""

    def run(params, part, key):
        by_leaf = {tap.leaf: tap for tap in _taps(problem, params, part, _keys(problem, part, key))}
        return [_gram(by_leaf[block.leaves[0]], block) for block in blocks]

    return replicating(run, params, part, key)


def _keys(problem: Scoring, part: Tokens, key: Array) -> Array:
    return jax.random.split(key, problem.num_samples * part.weights.shape[0])


def _taps(problem: Scoring, params: Tree, part: Tokens, keys: Array) -> list[Tap]:
    """Taps with a leading axis of rows, once for every sample."""
    moving = problem.selection.restrict(params)
    repeated = jax.tree.map(lambda x: jnp.concatenate([x] * problem.num_samples), part)

    def loss(moving, params, part, bits):
        return row_loss(problem, params, moving, part, jax.random.wrap_key_data(bits))

    def row(part, bits):
        return capture(loss)(moving, params, jax.tree.map(lambda x: x[None], part), bits)[1]

    return passes.mapped(row, repeated, jax.random.key_data(keys))


def _gram(tap: Tap, block: ParameterBlock) -> Array:
    assert tap.inputs is not None
    assert tap.cotangents is not None
    loops = len(tap.use.loops)
    inputs, cotangents = (
        jnp.moveaxis(x.reshape(x.shape[0], -1, *x.shape[1 + loops :]), 1, 0) for x in (tap.inputs[0], tap.cotangents)
    )
    one = _embedding if tap.use.kind == "embedding" else _dense
    found = jax.lax.map(lambda layer: one(tap.use, *layer), (inputs, cotangents))
    return found if block.layers is not None else found.sum(0, keepdims=True)


def _dense(use: Any, inputs: Array, cotangents: Array) -> Array:
    wide = wide_dtype(cotangents.dtype)
    a, g = jax.vmap(lambda x, y: matrices(use, (x.astype(wide),), y.astype(wide)))(inputs, cotangents)

    def against_all(own):
        same = jnp.einsum("bti,nbsi->nbts", own[0], a, precision=_EXACT)
        return jnp.sum(same * jnp.einsum("bto,nbso->nbts", own[1], g, precision=_EXACT), (1, 2, 3))

    return jax.lax.map(against_all, (a, g))


def _embedding(use: Any, indices: Array, cotangents: Array) -> Array:
    """Only tokens of the same index have scores in the same entries of the table."""
    size = use.operand.shape[use.roles.index("row")]
    # Of a gather's output, offset axes are the entries of a vector and the others are those of the indices.
    picked = lookup(use.options, use.operand.shape)
    offset = [1 + i for i in picked.offset]
    lead = [i for i in range(1, cotangents.ndim) if i not in offset]
    width = math.prod(cotangents.shape[i] for i in offset)
    g = jnp.transpose(cotangents, (0, *lead, *offset)).reshape(cotangents.shape[0], -1, width)
    g = wide(g)
    index = indices[..., picked.column].reshape(g.shape[:2])
    if picked.clips:
        index = jnp.clip(index, 0, size - 1)
    g = jnp.where(((index >= 0) & (index < size))[..., None], g, jnp.zeros_like(g))

    def against_all(own):
        same = own[0][None, :, None] == index[:, None, :]
        return jnp.sum(jnp.where(same, jnp.einsum("to,nso->nts", own[1], g, precision=_EXACT), 0), (1, 2))

    return jax.lax.map(against_all, (index, g))

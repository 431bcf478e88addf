"""One curvature product: linearise, multiply in the space of the outputs, transpose."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.dtypes import is_floating, wide, wide_dtype
from fisher_jax._support.meshes import Place, laid_out, places
from fisher_jax._support.selection import Chosen, Selection, select
from fisher_jax._tracing.program import with_wide_sums
from fisher_jax._tracing.reading import read
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import check_arguments
from fisher_jax.batch.tokens import Tokens, fisher_product, log_probs, readable
from fisher_jax.likelihoods import Likelihood
from fisher_jax.operators.tree_vectors import each

__all__ = [
    "Operator",
    "chunks",
    "directional_log_probs",
    "gradient",
    "kept_product",
    "linearize",
    "operator_of",
    "product",
    "tokens",
    "weight",
]

Tree = Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Operator:
    """What is known before any number is. Static, and equal for equal choices: new parameters do not recompile.

    ``places`` are those of the moving parameters, and of every product.
    """

    kind: str
    apply_fn: Callable
    likelihood: Likelihood
    selection: Selection
    microbatch_size: int | None
    remat: bool | Callable
    places: tuple[Place, ...]

    @property
    def labels_matter(self) -> bool:
        return self.kind != "ggn"


def operator_of(
    kind: str, apply_fn: Callable, likelihood: Likelihood, params: Tree, batch: Batch, parameters: Chosen = None,
    microbatch_size: int | None = None, remat: bool | Callable = False,
) -> tuple[Operator, Tree]:  # fmt: skip
    """An operator of the leaves that are chosen, and the parameters as arrays."""
    check_arguments(apply_fn, likelihood, batch=batch)
    selection = select(params, parameters)
    params = jax.tree.map(jnp.asarray, params)
    where = places(jax.tree.leaves(selection.restrict(params)))
    return Operator(kind, apply_fn, likelihood, selection, microbatch_size, remat, where), params


def tokens(operator: Operator, params: Tree, batch: Batch) -> tuple[Tokens, Array]:
    return read(operator.likelihood, operator.apply_fn, params, batch, operator.labels_matter)[:2]


@jax.jit
def weight(operator: Operator, params: Tree, batch: Batch) -> Array:
    return tokens(operator, params, batch)[0].total_weight


@jax.jit
def product(operator: Operator, params: Tree, batch: Batch, v: Tree) -> Tree:
    """The product, in one linearisation per micro-batch."""
    moving = operator.selection.restrict(params)
    tangent = _tangent(operator.selection, moving, v)
    part, bad = tokens(operator, params, batch)
    total, usable = _normaliser(part, bad)

    def of(part: Tokens) -> Tree:
        return _wide(_sum(operator, params, part, moving, tangent))

    if operator.microbatch_size is None:
        sums = of(part)
    else:

        def step(sums, part):
            return jax.tree.map(jnp.add, sums, of(part)), None

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, wide_dtype(x.dtype)), moving)
        sums, _ = jax.lax.scan(step, zeros, chunks(part, operator.microbatch_size))
    return _placed(operator, _scaled(sums, total, usable))


@jax.jit
def linearize(operator: Operator, params: Tree, batch: Batch) -> tuple:
    """All that products need, but the vector."""
    moving = operator.selection.restrict(params)
    part, bad = tokens(operator, params, batch)
    total, usable = _normaliser(part, bad)
    function = _function(operator, params, part)
    point, push = jax.linearize(jax.grad(function) if operator.kind == "hessian" else function, moving)
    point = point if operator.kind == "ggn" else None
    return (point, push, part.weights), usable, total


@jax.jit
def kept_product(operator: Operator, moving: Tree, kept: tuple, v: Tree) -> Tree:
    (point, push, weights), usable, total = kept
    tangent = _tangent(operator.selection, moving, v)
    sums = push(tangent) if operator.kind == "hessian" else _sandwich(operator, point, push, weights, moving, tangent)
    return _placed(operator, _scaled(_wide(sums), total, usable))


def _function(operator: Operator, params: Tree, part: Tokens) -> Callable[[Tree], Any]:
    """What is differentiated: the outputs, the log-likelihoods of the tokens, or the summed loss."""
    apply_fn, remat = with_wide_sums(operator.apply_fn), operator.remat
    if remat:
        apply_fn = jax.checkpoint(apply_fn, policy=None if remat is True else remat)

    def outputs(moving):
        return apply_fn(operator.selection.join(moving, params), part.inputs)

    def scores(moving):
        # Differentiated forwards, twice for the Hessian.
        found = readable(outputs(moving), part.weights)
        return log_probs(operator.likelihood, found, part.targets, part.weights)

    def loss(moving):
        return -jnp.sum(part.weights * scores(moving))

    return {"ggn": outputs, "empirical": scores, "hessian": loss}[operator.kind]


def _sum(operator: Operator, params: Tree, part: Tokens, moving: Tree, tangent: Tree) -> Tree:
    """The product, summed over the tokens of a part."""
    function = _function(operator, params, part)
    if operator.kind == "hessian":
        return jax.jvp(jax.grad(function), (moving,), (tangent,))[1]
    point, push = jax.linearize(function, moving)
    return _sandwich(operator, point, push, part.weights, moving, tangent)


def _sandwich(operator: Operator, point: Any, push: Callable, weights: Array, moving: Tree, tangent: Tree) -> Tree:
    """``J^T (w H J v)``, with ``H = 1`` for the empirical Fisher."""
    moved = push(tangent)
    if operator.kind == "ggn":
        curved = fisher_product(operator.likelihood, readable(point, weights), readable(_wide(moved), weights))
        cotangent = (weights[..., None] * curved).astype(moved.dtype)
    else:
        cotangent = (weights * moved).astype(moved.dtype)
    return jax.linear_transpose(push, moving)(cotangent)[0]


@functools.partial(jax.jit, static_argnames="several")
def directional_log_probs(operator: Operator, params: Tree, batch: Batch, direction: Tree, several: bool) -> Array:
    """``w_t d log p_t`` along a direction (or several, on a leading axis), per token; of an empirical operator."""
    moving = operator.selection.restrict(params)
    part, bad = tokens(operator, params, batch)
    _, usable = _normaliser(part, bad)
    _, push = jax.linearize(_function(operator, params, part), moving)

    def along(v: Tree) -> Array:
        moved = wide(push(_tangent(operator.selection, moving, v)))
        moved = jnp.where(part.weights > 0, moved, 0) * part.weights.astype(moved.dtype)
        return jnp.where(usable, moved, jnp.nan)

    return each(along)(direction) if several else along(direction)


@jax.jit
def gradient(operator: Operator, params: Tree, batch: Batch) -> Tree:
    """Of the mean loss; of an operator that reads labels."""
    moving = operator.selection.restrict(params)
    part, bad = tokens(operator, params, batch)
    total, usable = _normaliser(part, bad)

    def loss(moving: Tree) -> Array:
        outputs = with_wide_sums(operator.apply_fn)(operator.selection.join(moving, params), part.inputs)
        return -jnp.sum(part.weights * log_probs(operator.likelihood, outputs, part.targets, part.weights))

    return _placed(operator, _scaled(_wide(jax.grad(loss)(moving)), total, usable))


def _normaliser(part: Tokens, bad: Array) -> tuple[Array, Array]:
    """The weight to divide by, and whether the batch can be used at all."""
    total = part.total_weight
    return total, (bad == 0) & (total > 0)


def _scaled(sums: Tree, total: Array, usable: Array) -> Tree:
    """The mean; NaN where the batch cannot be used, since values cannot raise in a compiled step."""
    factor = jnp.where(usable, 1 / jnp.where(usable, total, 1), jnp.nan)
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), sums)


def _placed(operator: Operator, tree: Tree) -> Tree:
    """Laid out over the devices as the parameters are."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, laid_out(leaves, operator.places))


def _wide(tree: Tree) -> Tree:
    return jax.tree.map(wide, tree)


def chunks(part: Tokens, size: int | None) -> Tokens | None:
    """``[rows, ...] -> [rows / size, size, ...]``, every n-th row in a chunk: rows stay on their devices."""
    if size is None:
        return None
    if part.weights.ndim == 0:
        raise ValueError("microbatch_size needs outputs [rows, ..., K], found outputs [K] without rows")
    rows = part.weights.shape[0]
    if size < 1 or rows % size:
        raise ValueError(f"microbatch_size divides the number of rows, {rows}; found {size}: add rows of weight 0")

    def split(path, x):
        if jnp.ndim(x) == 0 or x.shape[0] != rows:
            raise ValueError(
                f"microbatch_size splits rows: {jax.tree_util.keystr(path) or 'the inputs'} of the batch has shape "
                f"{list(jnp.shape(x))}, its first axis should be {rows}"
            )
        return jnp.swapaxes(x.reshape(size, rows // size, *x.shape[1:]), 0, 1)

    return jax.tree_util.tree_map_with_path(split, part)


def _tangent(selection: Selection, moving: Tree, v: Tree) -> Tree:
    """``v`` in the dtypes of the parameters, if it is a tree like theirs."""
    if jax.tree.structure(v) != jax.tree.structure(moving):  # type: ignore[operator]
        raise ValueError(
            "a tangent has the structure of the moving parameters (None where one is frozen or not floating): pass "
            f"fj.operators.restrict(params, parameters); found {jax.tree.structure(v)}, wanted "
            f"{jax.tree.structure(moving)}"
        )
    paths = [path for path, moves in zip(selection.paths, selection.moves, strict=True) if moves]
    for path, x, w in zip(paths, jax.tree.leaves(v), jax.tree.leaves(moving), strict=True):
        if jnp.shape(x) != w.shape or not is_floating(x):
            raise ValueError(
                f"the tangent of {path} is a floating array of shape {list(w.shape)}, found {jnp.result_type(x)} of "
                f"shape {list(jnp.shape(x))}"
            )
    return jax.tree.map(lambda x, w: jnp.asarray(x).astype(w.dtype), v, moving)

"""The softmax head alone, in closed form: a forward pass, or taps that a training step has."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax import lm_head, welford
from fisher_jax._support import meshes, rejection
from fisher_jax._support.dtypes import wide_dtype
from fisher_jax._tracing.axes import in_leaf_order
from fisher_jax._tracing.dense import matrices, operand_axes
from fisher_jax._tracing.head import head_of, parts
from fisher_jax._tracing.program import Program, Tap, trace
from fisher_jax._tracing.structure import Head, Structures
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import check_batch
from fisher_jax.batch.tokens import tokens_of, unit_ids, without_padding
from fisher_jax.groups import Group, Heads, resolve
from fisher_jax.likelihoods import categorical
from fisher_jax.lm_head.scores import VALUE_BITS
from fisher_jax.welford import moments as moments_room
from fisher_jax.welford.estimator import FisherEstimator
from fisher_jax.welford.moments import Moments, map_values, reject_if

__all__ = ["HeadProblem", "head_estimator"]

Tree = Any


@dataclasses.dataclass(frozen=True)
class HeadProblem:
    """Options of the estimator ``head``."""

    apply_fn: Callable
    structures: Structures
    group: str
    kind: str
    unit: str
    temperature: float
    chunk_size: int | None

    @property
    def scale(self) -> int:
        return VALUE_BITS if self.group in ("row", "param") else 0


def head_group(groups: Any) -> str:
    """The name of the group, one of those that a closed form has."""
    if isinstance(groups, Heads) or not isinstance(groups, Group | str):
        raise ValueError("estimator='head' has the groups param, row, column and tensor")
    return resolve(groups).name


def head_estimator(problem: HeadProblem, example: Batch | None) -> FisherEstimator:
    """A tree like ``params`` with ``None`` at every leaf but the head."""
    if example is None:
        raise ValueError(
            "estimator='head' needs example=, a batch of arrays or jax.ShapeDtypeStructs, to find the head"
        )

    def init(params):
        like = jax.eval_shape(lambda p, b: _closed(problem, p, b).mean, params, example)
        return welford.init(like, unit=problem.unit, scale=problem.scale)

    def observe(params, batch: Batch, key=None, *, taps=None, taps_scale=1.0) -> Moments:
        del key
        check_batch(batch)
        if taps is None:
            return _closed(problem, params, batch)
        return _from_taps(problem, params, batch, taps, taps_scale)

    def update(state, params, batch: Batch, key=None, **given):
        return welford.add(state, observe(params, batch, key, **given))

    def group_sizes(params):
        found = head_of(_program(problem, params, example.inputs).structure)
        shapes = jax.eval_shape(lambda p, b: _closed(problem, p, b).mean, params, example)
        return jax.tree.map(lambda x: jnp.full(x.shape, _group_size(problem, found), jnp.float32), shapes)

    return FisherEstimator(init, observe, update, welford.add, group_sizes)


def _program(problem: HeadProblem, params: Tree, inputs: Any) -> Program:
    return trace(problem.apply_fn, params, (inputs,), None, problem.structures, None)


def _group_size(problem: HeadProblem, found: Head) -> int:
    _, contracted, outputs = operand_axes(found.use)
    width, vocabulary = (math.prod(found.use.operand.shape[i] for i in axes) for axes in (contracted, outputs))
    return {"param": 1, "row": width, "column": vocabulary, "tensor": width * vocabulary}[problem.group]


def _closed(problem: HeadProblem, params: Tree, batch: Batch) -> Moments:
    program = _program(problem, params, without_padding(batch.inputs, batch.real, batch.weights))
    found = head_of(program.structure)
    hidden, head, bias = parts(program)
    moments = lm_head.moments(
        hidden, head, batch.targets if problem.kind == "empirical" else None, batch.weights, groups=problem.group,
        kind=problem.kind, unit=problem.unit, units=batch.units if problem.unit == "document" else None, bias=bias,
        soft_cap=found.soft_cap, temperature=problem.temperature, chunk_size=problem.chunk_size,
    )  # fmt: skip
    return map_values(moments, lambda x: _placed(problem, params, found, x))


def _placed(problem: HeadProblem, params: Tree, found: Head, values: Array) -> Tree:
    """Values of the head ``[V, H]``, ``[V]``, ``[H]`` or one, where and as the leaf has them."""
    _, contracted, outputs = operand_axes(found.use)
    axes = {"param": (*outputs, *contracted), "row": outputs, "column": contracted, "tensor": ()}[problem.group]
    shaped = in_leaf_order(found.use, values, axes)
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [shaped if i == found.leaf else None for i in range(len(leaves))])


def _from_taps(problem: HeadProblem, params: Tree, batch: Batch, taps: list[Tap], scale: Any) -> Moments:
    """From ``d loss / d logits`` of a training step: a token's score is that times ``scale / w_t``."""
    if problem.kind != "empirical" or problem.unit == "token":
        raise ValueError("taps of a training step give the empirical Fisher by sequence, document or batch")
    structure = _program(problem, params, batch.inputs).structure
    found = head_of(structure)
    tap = _head_tap(found, params, taps)
    hidden, cotangents = (x[0] for x in matrices(tap.use, tap.inputs or (), jnp.asarray(tap.cotangents)))
    dtype = wide_dtype(cotangents.dtype)
    tokens, bad = tokens_of(categorical, structure.outputs[0], batch)
    weights = tokens.weights
    if hidden.shape[0] != weights.size:
        raise ValueError(
            f"the taps are of {hidden.shape[0]} tokens and the batch has {weights.size}: give its own taps"
        )
    if found.tokens is not None:
        hidden, cotangents = hidden[found.tokens], cotangents[found.tokens]
    num_rows = weights.shape[0]
    ids = unit_ids(problem.unit, batch.units, num_rows)

    def run(hidden, cotangents, weights, ids):
        rows = (
            x.astype(dtype).reshape(num_rows, -1, *x.shape[1:]) for x in (hidden, cotangents, weights.reshape(-1))
        )
        like = jax.ShapeDtypeStruct(_shape(problem.group, hidden, cotangents), dtype)

        def step(carry, row):
            h, c, w, unit_id = row
            g2 = jnp.square(c * jnp.asarray(scale, dtype)) / jnp.where(w > 0, w, 1)[:, None] * 2.0**problem.scale
            total = _total(problem.group, jnp.where((w > 0)[:, None], g2, 0), jnp.square(h))
            return moments_room.fold(carry, total, w.sum(), unit_id), None

        first = moments_room.start(jnp.zeros(like.shape, like.dtype), problem.unit, problem.scale)
        return moments_room.finish(jax.lax.scan(step, first, (*rows, ids))[0])

    moments = meshes.replicating(run, hidden, cotangents, weights, ids)
    finite = jnp.all(jnp.isfinite(cotangents))
    moments = reject_if(moments, bad | rejection.reason_mask(non_finite=~finite))
    return map_values(moments, lambda x: _placed(problem, params, found, x))


def _shape(group: str, hidden: Array, cotangents: Array) -> tuple[int, ...]:
    width, vocabulary = hidden.shape[1], cotangents.shape[1]
    return {"param": (vocabulary, width), "row": (vocabulary,), "column": (width,), "tensor": ()}[group]


def _total(group: str, g2: Array, h2: Array) -> Array:
    """``sum_t g_tv**2 h_tj**2`` over a group."""
    if group == "param":
        return jnp.einsum("tv,tj->vj", g2, h2, precision=jax.lax.Precision.HIGHEST)
    if group == "row":
        return jnp.einsum("tv,t->v", g2, h2.sum(1), precision=jax.lax.Precision.HIGHEST)
    each = jnp.einsum("t,tj->j", g2.sum(1), h2, precision=jax.lax.Precision.HIGHEST)
    return each if group == "column" else each.sum()


def _head_tap(found: Head, params: Tree, taps: list[Tap]) -> Tap:
    own = [
        t for t in taps if t.leaf == found.leaf and t.kind == "dense" and t.use.operand.size == found.use.operand.size
    ]
    path = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(params)[found.leaf][0])
    if len(own) != 1 or own[0].use.loops or own[0].cotangents is None:
        what = (
            "reduced" if own and own[0].cotangents is None
            else "inside a loop over tokens" if len(own) == 1
            else f"{len(own)} uses as a product"
        )  # fmt: skip
        raise ValueError(
            f"the head {path} needs one tap with its inputs and cotangents, from fj.value_grad_and_taps of the "
            f"training loss; found {what}: leave taps= out, and the head is computed by a forward pass"
        )
    return own[0]

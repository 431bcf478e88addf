"""The softmax head alone, in closed form: a forward pass, or taps that a training step has."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax import lm_head, welford
from fisher_jax._support import meshes, rejection
from fisher_jax._support.dtypes import wide_dtype
from fisher_jax._support.lanes import Laid
from fisher_jax._tracing.axes import in_leaf_order
from fisher_jax._tracing.dense import matrices, operand_axes
from fisher_jax._tracing.head import Parts, head_of, parts
from fisher_jax._tracing.program import Program, Tap, check_parameters, trace
from fisher_jax._tracing.reading import read
from fisher_jax._tracing.structure import Head, Structures
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import check_batch
from fisher_jax.batch.tokens import check_outputs, tokens_of, unit_ids
from fisher_jax.estimators.loss_of_taps import of_another_loss
from fisher_jax.groups import Group, Heads, resolve
from fisher_jax.likelihoods import categorical
from fisher_jax.lm_head.scores import VALUE_BITS
from fisher_jax.welford import moments as moments_room
from fisher_jax.welford.estimator import FisherEstimator
from fisher_jax.welford.moments import Moments, map_values, reject_if

__all__ = ["HeadProblem", "Met", "head_estimator", "head_groups", "met_by_head", "of_leaf"]

Tree = Any


@dataclasses.dataclass(frozen=True)
class HeadProblem:
    """Options of the estimator ``head``."""

    apply_fn: Callable
    structures: Structures
    laid: Laid
    groups: dict[str | None, str]  # by their names; one alone has none
    kind: str
    unit: str
    temperature: float
    chunk_size: int | None

    @property
    def scale(self) -> int:
        return max(VALUE_BITS if group in ("row", "param") else 0 for group in self.groups.values())


def head_groups(groups: Any) -> dict[str | None, str]:
    """The names of the groups, each one of those that a closed form has."""
    several = groups if isinstance(groups, Mapping) else {None: groups}
    if not several or any(isinstance(g, Heads) or not isinstance(g, Group | str) for g in several.values()):
        raise ValueError("estimator='head' has the groups param, row, column and tensor, or a dict of these")
    return {name: resolve(group).name for name, group in several.items()}


def head_estimator(problem: HeadProblem, example: Batch | None) -> FisherEstimator:
    """A tree like ``params`` with ``None`` at every leaf but the head."""

    def known() -> Batch:
        if example is None:
            raise ValueError(
                "estimator='head' finds the head in a batch: give example=, a batch of arrays or "
                "jax.ShapeDtypeStructs, or start with fj.welford.init(estimator.observe(params, batch))"
            )
        return example

    def init(params):
        check_parameters(params)
        problem.laid.note_params(params)
        problem.laid.note_rows(known().inputs)
        like = jax.eval_shape(lambda p, b: _closed(problem, p, b).mean, params, known())
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
        found = head_of(_program(problem.apply_fn, problem.structures, params, known().inputs).structure)
        shapes = jax.eval_shape(lambda p, b: _sums(problem, p, b).mean, params, known())
        sizes = {k: jnp.full(x.shape, _group_size(problem.groups[k], found), jnp.float32) for k, x in shapes.items()}
        return _placed(problem, params, found, sizes)

    return FisherEstimator(init, observe, update, welford.add, group_sizes)


def _program(apply_fn: Callable, structures: Structures, params: Tree, inputs: Any) -> Program:
    found = trace(apply_fn, params, (inputs,), None, structures, None)
    check_outputs(found.shape)
    return found


def _group_size(group: str, found: Head) -> int:
    _, contracted, outputs = operand_axes(found.use)
    width, vocabulary = (math.prod(found.use.operand.shape[i] for i in axes) for axes in (contracted, outputs))
    return {"param": 1, "row": width, "column": vocabulary, "tensor": width * vocabulary}[group]


def _closed(problem: HeadProblem, params: Tree, batch: Batch) -> Moments:
    problem.laid.note_params(params)
    problem.laid.note_rows(batch.inputs)
    found = head_of(_program(problem.apply_fn, problem.structures, params, batch.inputs).structure)
    return map_values(_sums(problem, params, batch), lambda x: _placed(problem, params, found, x))


class Met(NamedTuple):
    """What the head of a model meets in a batch.

    Attributes:
        weights: of the tokens; bool where the batch says nothing of them but what is real, ``None`` where nothing.
        bad: why the batch cannot be used.
        tied: the leaf of the head is used elsewhere too.
    """

    head: Parts
    soft_cap: float | None
    weights: Array | None
    bad: Array
    tied: bool


def met_by_head(
    apply_fn: Callable, structures: Structures, params: Tree, batch: Batch, labels_matter: bool = True
) -> Met:
    """The head of a model whose outputs are ``soft_cap * tanh((hidden @ head.T + bias) / soft_cap)``, in a batch.

    A scale of the outputs is in its hidden states and its bias.

    Raises:
        ValueError: outputs that come from anything else.
    """
    program = _program(apply_fn, structures, params, batch.inputs)
    tokens, bad, _ = read(categorical, apply_fn, params, batch, labels_matter)
    found = head_of(program.structure)
    # Weights of which the batch says nothing are 0 or 1.
    weights = batch.weights if batch.real is None else tokens.weights > 0 if batch.weights is None else tokens.weights
    tied = len(program.structure.uses(found.leaf)) > 1
    return Met(parts(program.on(tokens.inputs)), found.soft_cap, weights, bad, tied)


def of_leaf(moments: Moments, factor: float) -> Moments:
    """From moments of ``head = factor * leaf`` to those of the leaf."""
    return map_values(_beside({None: moments}, moments.scale, factor**2), lambda x: x[None])


def _sums(problem: HeadProblem, params: Tree, batch: Batch) -> Moments:
    """Moments of the head ``[V, H]``, a dict by group."""
    empirical = problem.kind == "empirical"
    head, soft_cap, weights, bad, _ = met_by_head(problem.apply_fn, problem.structures, params, batch, empirical)
    found = _beside({
        name: lm_head.laid_moments(
            problem.laid, head.hidden, head.head, batch.targets if empirical else None, weights,
            groups=group, kind=problem.kind, unit=problem.unit,
            units=batch.units if problem.unit == "document" else None, bias=head.bias, soft_cap=soft_cap,
            temperature=problem.temperature, chunk_size=problem.chunk_size,
        )
        for name, group in problem.groups.items()
    }, problem.scale, head.factor**2)  # fmt: skip
    return reject_if(found, found.reasons | bad)


def _beside(several: dict[str | None, Moments], scale: int, factor: float) -> Moments:
    """Moments of several values of the same observations, times a factor, at one scale."""

    def of(read: Callable[[Any], Tree], power: int) -> Tree:
        found = {name: (read(m), (factor * 2.0 ** (scale - m.scale)) ** power) for name, m in several.items()}
        return None if None in [x for x, _ in found.values()] else {k: x * by for k, (x, by) in found.items()}

    def fragment(read: Callable[[Moments], Any]) -> Any:
        one = read(first)
        return None if one is None else dataclasses.replace(one, mean=of(lambda m: read(m).mean, 1))

    first, *others = several.values()
    return dataclasses.replace(
        first, mean=of(lambda m: m.mean, 1), m2=of(lambda m: m.m2, 2), square_mean=of(lambda m: m.square_mean, 1),
        square_m2=of(lambda m: m.square_m2, 2), first=fragment(lambda m: m.first), last=fragment(lambda m: m.last),
        rejected=functools.reduce(jnp.maximum, [m.rejected for m in others], first.rejected),
        reasons=functools.reduce(jnp.bitwise_or, [m.reasons for m in others], first.reasons), scale=scale,
    )  # fmt: skip


def _placed(problem: HeadProblem, params: Tree, found: Head, values: dict[str | None, Array]) -> Tree:
    """Values of the head ``[V, H]``, ``[V]``, ``[H]`` or one, by group, where and as the leaf has them."""
    _, contracted, outputs = operand_axes(found.use)
    axes = {"param": (*outputs, *contracted), "row": outputs, "column": contracted, "tensor": ()}
    shaped = {name: in_leaf_order(found.use, x, axes[problem.groups[name]]) for name, x in values.items()}
    leaves, treedef = jax.tree.flatten(params)
    own = shaped.get(None, shaped)
    return jax.tree.unflatten(treedef, [own if i == found.leaf else None for i in range(len(leaves))])


def _from_taps(problem: HeadProblem, params: Tree, batch: Batch, taps: list[Tap], scale: Any) -> Moments:
    """From ``d loss / d logits`` of a training step: a token's score is that times ``scale / w_t``."""
    if problem.kind != "empirical" or problem.unit == "token":
        raise ValueError("taps of a training step give the empirical Fisher by sequence, document or batch")
    structure = _program(problem.apply_fn, problem.structures, params, batch.inputs).structure
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
        zeros = {k: jnp.zeros(_shape(group, hidden, cotangents), dtype) for k, group in problem.groups.items()}

        def step(carry, row):
            h, c, w, unit_id = row
            g2 = jnp.square(c * jnp.asarray(scale, dtype)) / jnp.where(w > 0, w, 1)[:, None] * 2.0**problem.scale
            counted, h2 = jnp.where((w > 0)[:, None], g2, 0), jnp.square(h)
            total = {name: _total(group, counted, h2) for name, group in problem.groups.items()}
            return moments_room.fold(carry, total, w.sum(), unit_id), None

        first = moments_room.start(zeros, problem.unit, problem.scale)
        return moments_room.finish(jax.lax.scan(step, first, (*rows, ids))[0])

    moments = meshes.replicating(run, hidden, cotangents, weights, ids)
    finite = jnp.all(jnp.isfinite(cotangents))
    bad |= of_another_loss(categorical, found, params, [tap], tokens, scale)
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

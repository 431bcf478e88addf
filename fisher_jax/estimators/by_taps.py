"""Squared scores of every row from taps that a training step has, without another backward pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import meshes, rejection
from fisher_jax._support.dtypes import is_floating, wide, wide_dtype
from fisher_jax._support.jax_internals import abstract, contraction, convolution, lookup
from fisher_jax._tracing import program
from fisher_jax._tracing.orientation import Grouping
from fisher_jax._tracing.program import Tap
from fisher_jax._tracing.provenance import Spec, Use
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import tokens_of, unit_ids
from fisher_jax.estimators import gram
from fisher_jax.estimators.problem import Problem, square, zeros_like
from fisher_jax.welford import moments as moments_room
from fisher_jax.welford.moments import Moments

__all__ = ["by_taps"]

Tree = Any
_WAY_OUT = "leave taps= out, and the rows are differentiated one by one"


def by_taps(
    problem: Problem, loss: Any, params: Tree, batch: Batch, taps: list[Tap], scale: Any
) -> tuple[Moments, Array]:
    """``(scale * sum_t d loss / d params)**2 / w_u`` of every row ``u``, and the reasons to reject the batch.

    ``loss(params, batch)`` is traced with one row more, to see that rows come first among a tap's tokens.
    """
    if problem.kind != "empirical":
        raise ValueError("taps of a training step give the empirical Fisher, not the true one")
    out = jax.eval_shape(problem.apply_fn, params, batch.inputs)
    tokens, bad = tokens_of(problem.likelihood, out, batch)
    num_rows = out.shape[0]
    _check_rows_lead(loss, params, batch, num_rows)
    for tap in taps:
        _check_tap(tap, num_rows)
    leaves, treedef = jax.tree.flatten(params)

    def run(taps, weights, ids):
        def value(row):
            found: list = [None] * len(leaves)
            for i, (x, one) in enumerate(zip(leaves, problem.groupings, strict=True)):
                if one is not None and is_floating(x):
                    found[i] = _leaf(x, one, [t for t in taps if t.leaf == i], row, num_rows, scale)
            sums = jax.tree.unflatten(treedef, found)
            return sums if problem.combine is None else problem.combine(sums)

        def step(carry, part):
            row, weight, unit_id = part
            return moments_room.fold(carry, value(row), weight, unit_id), None

        like = jax.eval_shape(value, jax.ShapeDtypeStruct((), jnp.int32))
        first = moments_room.start(zeros_like(like), problem.unit)
        parts = (jnp.arange(num_rows, dtype=jnp.int32), weights.reshape(num_rows, -1).sum(1), ids)
        return moments_room.finish(jax.lax.scan(step, first, parts)[0])

    moments = meshes.replicating(run, taps, tokens.weights, unit_ids(problem.unit, batch.units, num_rows))
    finite = functools.reduce(
        jnp.logical_and, [jnp.all(jnp.isfinite(jnp.asarray(t.cotangents))) for t in taps], jnp.bool_(True)
    )
    return moments, bad | rejection.reason_mask(non_finite=~finite)


def _leaf(x: Array, one: Grouping, taps: list[Tap], row: Array, num_rows: int, scale: Any) -> Tree:
    """Groups of the squared score of one row, ``sum_t w_t f_t`` without the division by the row's weight."""
    parts = [_of_row(tap.use, tap.inputs or (), jnp.asarray(tap.cotangents), row, num_rows) for tap in taps]
    specs = [
        Spec(t.leaf, t.use, abstract(c), tuple(map(abstract, inputs)), None, c.shape[: len(t.use.loops)])
        for t, (inputs, c) in zip(taps, parts, strict=True)
    ]
    if gram.fits(specs, one):
        (use,), ((inputs, cotangents),) = [t.use for t in taps], parts
        by_gram, by_gradient = gram.cost(specs[0])
        sums = functools.partial(gram.squared_sums, use, str(one.side), by_gram=by_gram <= by_gradient)
        for _ in use.loops:
            sums = jax.vmap(sums)
        found = sums(inputs, _scaled(cotangents, scale))
        return one.finish(found)
    total = jnp.zeros(x.shape, wide_dtype(x.dtype))
    for tap, (inputs, cotangents) in zip(taps, parts, strict=True):
        total = total + program.gradient_of_use(tap.use, 0, inputs, cotangents).astype(total.dtype)
    return one(square(_scaled(total, scale)))


def _scaled(x: Array, scale: Any) -> Array:
    return wide(x) * jnp.asarray(scale, wide_dtype(x.dtype))


def _row_axes(use: Use, cotangents_ndim: int) -> tuple[int | None, int]:
    """The first token axis of the inputs (``None``: they stay) and of the cotangents, without loops."""
    if use.kind == "dense":
        other = 1 - use.index
        contracted, batch = (sides[other] for sides in contraction(use.options))
        own_contracted, own_batch = (sides[use.index] for sides in contraction(use.options))
        outputs = len(use.operand.shape) - len(own_contracted) - len(own_batch)
        free = [i for i in range(len(contracted) + len(batch) + cotangents_ndim) if i not in (*contracted, *batch)]
        return free[0], len(batch) + (outputs if use.index == 0 else 0)
    if use.kind == "embedding":
        offset = lookup(use.options, use.operand.shape).offset
        return 0, next(i for i in range(cotangents_ndim) if i not in offset)
    if use.kind == "conv":
        conv = convolution(use.options)
        return conv.inputs[0], conv.outputs[0]
    return None, 0


def _of_row(use: Use, inputs: tuple, cotangents: Array, row: Array, num_rows: int) -> tuple[tuple, Array]:
    """Inputs and cotangents of one row: cut out, or where an operation has a fixed shape, all others zero."""
    loops = len(use.loops)
    x_axis, axis = _row_axes(use, cotangents.ndim - loops)
    size = cotangents.shape[axis + loops] // num_rows
    if x_axis is None:
        index = jax.lax.broadcasted_iota(jnp.int32, cotangents.shape, axis + loops) // size
        return inputs, jnp.where(index == row, cotangents, 0)
    x_size = inputs[0].shape[x_axis + loops] // num_rows
    x = jax.lax.dynamic_slice_in_dim(inputs[0], row * x_size, x_size, x_axis + loops)
    return (x, *inputs[1:]), jax.lax.dynamic_slice_in_dim(cotangents, row * size, size, axis + loops)


def _check_tap(tap: Tap, num_rows: int) -> None:
    if tap.cotangents is None:
        raise ValueError(
            f"the tap of {tap.path} was reduced; fj.value_grad_and_taps without reduce= keeps rows apart"
        )
    if tap.kind == "generic":
        raise ValueError(
            f"parameter {tap.path} is used by {tap.use.primitive} at {tap.use.where}, whose tap is the gradient of "
            f"all rows together: {_WAY_OUT}"
        )
    cotangents = jnp.asarray(tap.cotangents)
    loops = len(tap.use.loops)
    if cotangents.ndim == loops:
        raise ValueError(f"the tap of {tap.path} has no axis of rows: {_WAY_OUT}")
    _, axis = _row_axes(tap.use, cotangents.ndim - loops)
    if cotangents.shape[axis + loops] % num_rows:
        raise ValueError(
            f"the tap of {tap.path} has {cotangents.shape[axis + loops]} tokens, which are not {num_rows} rows of "
            f"the batch: give the taps of this batch, or {_WAY_OUT}"
        )


def _check_rows_lead(loss: Any, params: Tree, batch: Batch, num_rows: int) -> None:
    """Rows are the first token axis of every tap of the model, seen by tracing it with one row more."""
    more = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_rows + 1, *jnp.shape(x)[1:]), jnp.result_type(x)), batch)
    here = program.trace(loss, params, (jax.eval_shape(lambda b: b, batch),), {}).probe.specs
    there = program.trace(loss, params, (more,), {}).probe.specs
    for a, b in zip(here, there, strict=True):
        if a.use.kind == "generic":
            continue
        loops = len(a.use.loops)
        x_axis, axis = _row_axes(a.use, len(a.output.shape) - loops)
        checks = [(a.output.shape, b.output.shape, axis + loops)]
        if x_axis is not None:
            checks.append((a.inputs[0].shape, b.inputs[0].shape, x_axis + loops))
        for before, after, where in checks:
            wanted = list(before)
            wanted[where] = before[where] // num_rows * (num_rows + 1)
            if list(after) != wanted:
                raise ValueError(
                    f"rows of the batch are not the first tokens of the {a.use.kind} use at {a.use.where}, whose "
                    f"shape {list(before)} becomes {list(after)} with one row more: {_WAY_OUT}"
                )

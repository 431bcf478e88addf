"""Every row an observation (or a part of a document): one backward pass of each, many rows at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import meshes, passes, rejection
from fisher_jax._support.jax_internals import unstacked
from fisher_jax._support.lanes import Lanes, lanes_of
from fisher_jax._tracing.program import Program, differentiate
from fisher_jax._tracing.structure import Structures
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import Tokens, unit_ids
from fisher_jax.estimators import gram
from fisher_jax.estimators.problem import Problem, read, signed_total, square, zeros_like
from fisher_jax.welford import moments as moments_room
from fisher_jax.welford.moments import Moments
from fisher_jax.welford.parts import in_lanes

__all__ = ["by_row"]

Tree = Any


def by_row(problem: Problem, params: Tree, batch: Batch, key: Array | None) -> tuple[Moments, Array]:
    """Moments over rows or documents, and the reasons to reject the batch."""
    tokens, bad, out = read(problem, params, batch)
    if len(out.shape) < 2:
        raise ValueError(f"unit={problem.unit!r} needs outputs [rows, ..., K], found shape {list(out.shape)}")
    num_rows = out.shape[0]
    alone = problem.rows_alone(params, tokens.inputs)
    keys = jax.random.split(jax.random.key(0) if key is None else key, num_rows)
    rows = (jax.tree.map(jnp.asarray, tokens), keys, unit_ids(problem.unit, batch.units, num_rows))
    lanes = lanes_of(params, tokens.inputs, num_rows, problem.laid)
    found, finite = in_lanes(
        lanes, lambda params, rows: _lane(problem, lanes, alone.row, params, rows), params, rows,
        lambda: _fold(problem, alone.row, *jax.tree.map(meshes.with_all_rows, rows)),
    )  # fmt: skip
    return found, bad | rejection.reason_mask(non_finite=~finite)


def _lane(problem: Problem, lanes: Lanes, program: Program, params: Tree, rows: Tree) -> tuple[Moments, Array]:
    if lanes.explicit:
        # A program with Explicit axes does not run where they are Manual, and its rows are known to be alone.
        inside = problem._replace(structures=Structures(), rows_independent=True)
        program = inside.rows_alone(params, rows[0].inputs).row
    return _fold(problem, program, *rows)


class _Plan(NamedTuple):
    """Which leaves are measured at their use, and how many rows may be alive at once."""

    at_use: dict
    rows_at_once: int


def _squares(problem: Problem, program: Program) -> tuple[Callable, _Plan]:
    """``squares(row, key) -> (groups of squared gradients, whether the loss is finite)``, and the plan.

    ``program`` is the model's of one row.
    """
    plan = _plan(problem.groupings, program)

    def squares(row, key):
        alone = jax.tree.map(lambda x: x[None], row)
        value, grads, taps = differentiate(
            program.on(alone.inputs), lambda outputs: signed_total(problem, outputs, alone, key),
            reduce=gram.reduce_taps(plan.at_use), follow=plan.at_use.__contains__,
            gradients=lambda leaf: leaf not in plan.at_use,
        )  # fmt: skip
        reduced = {tap.leaf: tap.reduced for tap in taps}
        found = [
            None if one is None else one.finish(reduced[i]) if i in plan.at_use else one(square(grads[i]))
            for i, one in enumerate(problem.groupings)
        ]
        return problem.joined(program.treedef, found), jnp.isfinite(value)

    return squares, plan


def _plan(groupings: list, program: Program) -> _Plan:
    """As many rows at once as keep what is formed for each of them within the size of the parameters."""
    at_use, formed, size = {}, 1, 0
    for i, (one, x) in enumerate(zip(groupings, program.leaves, strict=True)):
        if one is None:
            continue
        own = program.structure.uses(i)
        size += x.size
        if not gram.fits(own, one):
            formed += x.size
            continue
        by_gram, by_gradient = gram.cost(own[0])
        at_use[i] = one, by_gram <= by_gradient
        if by_gram > by_gradient:
            formed += own[0].use.operand.size
    return _Plan(at_use, max(1, size // formed))


def _divisor(number: int, at_most: int) -> int:
    """The largest divisor of ``number`` that is at most ``at_most``."""
    return next(n for n in range(min(number, at_most), 0, -1) if number % n == 0)


def _fold(problem: Problem, program: Program, rows: Tokens, keys: Array, ids: Array) -> tuple[Moments, Array]:
    """Rows to observations, some of them at a time; ``program`` is the model's of one row."""
    num_rows = keys.shape[0]
    squares, plan = _squares(problem, program)
    chunk = _divisor(num_rows, problem.chunk_size or plan.rows_at_once)

    def value(row, key):
        """``sum_t w_t f_t`` of one row: its squares, averaged over draws."""
        if problem.num_samples == 1:
            return squares(row, key)
        draws, finite = jax.lax.map(lambda k: squares(row, k), jax.random.split(key, problem.num_samples))
        return jax.tree.map(lambda x: x.mean(0), draws), jnp.all(finite)

    weights = rows.weights.reshape(num_rows, -1).sum(1)

    def step(carry, part):
        folded, finite = carry
        rows, keys, weights, ids = part
        totals, ok = passes.mapped(value, rows, keys)
        folded, _ = jax.lax.scan(lambda c, x: (moments_room.fold(c, *x), None), folded, (totals, weights, ids))
        return (folded, finite & jnp.all(ok)), None

    parts = (rows, keys, weights, ids)
    like = jax.eval_shape(lambda p: passes.mapped(value, p[0], p[1])[0], parts)
    one = jax.tree.map(unstacked, like)
    first = (moments_room.start(zeros_like(one), problem.unit), jnp.ones((), bool))
    if chunk == num_rows:
        (folded, finite), _ = step(first, parts)
    else:
        split_rows = jax.tree.map(lambda x: x.reshape(num_rows // chunk, chunk, *x.shape[1:]), parts)
        (folded, finite), _ = jax.lax.scan(step, first, split_rows)
    return moments_room.finish(folded), finite

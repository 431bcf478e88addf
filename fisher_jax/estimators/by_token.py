"""The squares of every token, ``chunk_size`` of them at a time: the reference way."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import meshes, passes, rejection
from fisher_jax._support.lanes import Lanes, lanes_of
from fisher_jax._tracing.alone import rows_alone
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import Tokens, fisher_factor, log_probs, readable, unit_ids
from fisher_jax.estimators.problem import Problem, read, split, zeros_like
from fisher_jax.welford import moments as moments_room
from fisher_jax.welford.moments import Moments, of_tokens, union
from fisher_jax.welford.parts import in_lanes

__all__ = ["by_token"]

Tree = Any
_CHUNK = 16


def by_token(problem: Problem, params: Tree, batch: Batch, key: Array | None) -> tuple[Moments, Array]:
    """Exact per-token squares, observed by token or summed by row, and the reasons to reject the batch."""
    del key
    tokens, bad, out = read(problem, params, batch)
    number = out.shape[0] if len(out.shape) > 1 else 1
    rows = (jax.tree.map(jnp.asarray, tokens), unit_ids(problem.unit, batch.units, number))
    lanes = _lanes(problem, params, tokens.inputs, number)
    found, finite = in_lanes(
        lanes, lambda params, rows: _observed(problem, params, *rows), params, rows,
        lambda: _observed(problem, params, *rows),
    )  # fmt: skip
    return found, bad | rejection.reason_mask(non_finite=~finite)


def _lanes(problem: Problem, params: Tree, inputs: Tree, number: int) -> Lanes:
    """One lane where a token's score may go through other rows of the batch."""
    lanes = lanes_of(params, inputs, number, problem.laid)
    if lanes.number == 1:
        return lanes
    asking = problem.asking("sees rows apart")._replace(independent=None)
    # A model that names the axis of the rows itself does not run where it is Manual, and not on one row either.
    for some in (number // lanes.number, *((1,) if lanes.explicit else ())):
        try:
            rows_alone(asking, params, inputs, number=some)
        except Exception:  # whatever the model says of fewer rows, it runs on all of them
            return Lanes(1)
    return lanes


def _observed(problem: Problem, params: Tree, tokens: Tokens, ids: Array) -> tuple[Moments, Array]:
    """Moments of the tokens of these rows, and whether everything is finite."""
    free, model = split(problem.apply_fn, params)
    outputs, pullback = jax.vjp(lambda free: model(free, tokens.inputs), free)
    num_outputs, weights = outputs.shape[-1], meshes.with_all_rows(tokens.weights).reshape(-1)
    if problem.kind == "empirical":
        total, log_prob_pullback = jax.vjp(
            lambda z: jnp.sum(log_probs(problem.likelihood, z, tokens.targets, tokens.weights)), outputs
        )
        (scores,) = log_prob_pullback(jnp.ones_like(total))
        columns, finite = 1, jnp.isfinite(total)
    else:
        scores, columns = None, num_outputs
        outputs = readable(outputs, tokens.weights)
        finite = jnp.all(jnp.isfinite(outputs))
    place = jnp.arange(weights.size, dtype=jnp.int32).reshape(outputs.shape[:-1])

    def squares(token, column):
        # Elementwise, so that outputs stay as they are sharded.
        every = scores if scores is not None else fisher_factor(problem.likelihood, outputs, column)
        (grads,) = pullback(jnp.where((place == token)[..., None], every, 0).astype(outputs.dtype))
        return problem.reduce(grads)

    def value(token):
        """``f_t``: one square, or the sum of those of the columns of the output Fisher's factor."""
        if columns == 1:
            return squares(token, 0)
        return _sum_over(lambda c: squares(token, c), columns, problem.chunk_size or _CHUNK)

    chunk = (problem.chunk_size or _CHUNK) if columns == 1 else 1
    if problem.unit == "token":
        found = _token_moments(value, weights, chunk)
    else:
        found = _row_moments(problem, value, weights.reshape(tokens.weights.shape), ids, chunk)
    return found, finite


def _sum_over(function: Callable[[Array], Tree], number: int, chunk: int) -> Tree:
    """``sum_i function(i)``, ``chunk`` at a time."""
    size = min(chunk, number)
    starts = jnp.arange(0, number, size)

    def step(total, start):
        index = start + jnp.arange(size)
        found = passes.each(function, jnp.minimum(index, number - 1))
        keep = index < number
        return jax.tree.map(lambda t, x: t + jnp.tensordot(keep.astype(x.dtype), x, 1), total, found), None

    zeros = zeros_like(jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32)))
    return jax.lax.scan(step, zeros, starts.astype(jnp.int32))[0]


def _token_moments(value: Callable[[Array], Tree], weights: Array, chunk: int) -> Moments:
    """Moments over tokens, those of each chunk joined to those before it, since sums of ``f**2`` lose variances."""
    number = weights.shape[0]
    size = min(chunk, number)

    def step(found, start):
        index = start + jnp.arange(size)
        token = jnp.minimum(index, number - 1)
        w = jnp.where(index < number, weights[token], 0)
        return union(found, of_tokens(passes.each(value, token), w)), None

    like = jax.eval_shape(value, jax.ShapeDtypeStruct((), jnp.int32))
    nothing = of_tokens(jax.tree.map(lambda x: x[None], zeros_like(like)), jnp.zeros(1, weights.dtype))
    return jax.lax.scan(step, nothing, jnp.arange(0, number, size, dtype=jnp.int32))[0]


def _row_moments(problem: Problem, value: Callable[[Array], Tree], weights: Array, ids: Array, chunk: int) -> Moments:
    """Moments over rows (documents, the batch), each the weighted mean of its tokens."""
    if weights.ndim < 1:
        raise ValueError(f"unit={problem.unit!r} needs outputs [rows, ..., K], found one token")
    rows = weights.reshape(weights.shape[0], -1)
    length = rows.shape[1]

    def row(index):
        def one(i):
            w = rows[index, i]
            return jax.tree.map(lambda x: w.astype(x.dtype) * x, value(index * length + i))

        return _sum_over(one, length, chunk)

    like = jax.eval_shape(row, jax.ShapeDtypeStruct((), jnp.int32))

    def step(carry, i):
        return moments_room.fold(carry, row(i), rows[i].sum(), ids[i]), None

    first = moments_room.start(like, problem.unit)
    carry, _ = jax.lax.scan(step, first, jnp.arange(rows.shape[0], dtype=jnp.int32))
    return moments_room.finish(carry)

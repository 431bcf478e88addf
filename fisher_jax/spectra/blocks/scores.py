"""Scores of tokens or sequences, a chunk at a time, from backward passes through one row or several."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from fisher_jax._support import passes
from fisher_jax._support.meshes import replicating
from fisher_jax._support.selection import Selection
from fisher_jax._tracing.alone import Asking, check_apart
from fisher_jax._tracing.program import with_wide_sums
from fisher_jax._tracing.structure import Structures
from fisher_jax.batch.tokens import Tokens, log_probs
from fisher_jax.likelihoods import Likelihood

__all__ = ["Scoring", "check_layout", "check_rows", "fold", "row_loss", "takes_whole_rows"]

Tree = Any


class Scoring(NamedTuple):
    """What is scored, and how. A score is ``sqrt(w_t) s_t``, or ``sum_t w_t s_t`` of a sequence."""

    apply_fn: Callable
    likelihood: Likelihood
    selection: Selection
    unit: str
    kind: str
    num_samples: int
    chunk_size: int


class _Row(NamedTuple):
    """One row of a batch, with a key for its labels; the leading axis of length 1 is kept."""

    part: Tokens
    key: Array


def takes_whole_rows(problem: Scoring, weights: Array) -> bool:
    """Whether a row has one score: sequences, and tokens that stand alone in their row."""
    return problem.unit == "sequence" or weights.size == weights.shape[0]


def check_layout(apply_fn: Callable, params: Tree, inputs: Any) -> None:
    """Raise where a model on a mesh with Explicit axes says where something lies, which a row alone cannot obey."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return

    def outputs_of_a_row(params, inputs):
        return replicating(lambda p, x: apply_fn(p, jax.tree.map(lambda x: x[:1], x)), params, inputs)

    try:
        jax.eval_shape(outputs_of_a_row, params, inputs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"every row runs alone and with the axes {', '.join(map(str, mesh.axis_names))} of the mesh automatic, "
            "and the model cannot run so; leave out_sharding= and reshard out of the function that is passed here, "
            f"or call it without jax.set_mesh and with parameters on one device. The model said: {error}"
        ) from error


def check_rows(
    apply_fn: Callable, params: Tree, inputs: Any, structures: Structures, rows_independent: bool | None
) -> None:
    """Raise where rows depend on each other."""
    asking = Asking(
        apply_fn, structures, rows_independent, "a block spectrum runs every row of the batch alone",
        "take fj.lanczos of fj.operators.empirical_fisher(..., parameters=...), whose scores are those of the batch "
        "as it is",
    )  # fmt: skip
    check_apart(asking, params, inputs)


def fold(problem: Scoring, params: Tree, part: Tokens, key: Array, absorb: Callable, carry: Any) -> Any:
    """``carry = absorb(carry, leaves, live)`` over all scores.

    ``leaves`` are the moving leaves' scores ``[chunk, ...]``, zero where not ``live``. Every row runs alone.
    """
    samples = problem.num_samples
    rows = part.weights.shape[0]
    keys = jax.random.split(key, samples * rows)

    def row(i) -> _Row:
        def take(x):
            return jax.lax.dynamic_index_in_dim(x, i % rows, keepdims=True)

        return _Row(jax.tree.map(take, part), keys[i])

    if takes_whole_rows(problem, part.weights):
        return _by_row(problem, params, row, samples * rows, absorb, carry)
    return _by_token(problem, params, row, samples * rows, absorb, carry)


def _by_row(problem: Scoring, params: Tree, row: Callable, number: int, absorb: Callable, carry: Any) -> Any:
    """One backward pass per row, ``chunk_size`` of them together."""
    chunk = min(problem.chunk_size, number)

    def score(i, inside):
        part, key = row(i)
        moving = problem.selection.restrict(params)
        grads = jax.grad(lambda moving: row_loss(problem, params, moving, part, key))(moving)
        live = inside & jnp.any(part.weights > 0)
        return [jnp.where(live, x, jnp.zeros_like(x)) for x in jax.tree.leaves(grads)], live

    def step(carry, start):
        index = start + jnp.arange(chunk)
        leaves, live = passes.mapped(score, jnp.minimum(index, number - 1), index < number)
        return absorb(carry, leaves, live), None

    return jax.lax.scan(step, carry, jnp.arange(0, number, chunk))[0]


def row_loss(problem: Scoring, params: Tree, moving: Tree, part: Tokens, key: Array) -> Array:
    """The scalar whose gradient is the score of a row."""
    outputs = with_wide_sums(problem.apply_fn)(problem.selection.join(moving, params), part.inputs)
    targets, weights = _targets(problem, outputs, part, key), part.weights
    # Each of several samples stands for a share of the weight.
    factors = weights if problem.unit == "sequence" else jnp.sqrt(weights)
    total = jnp.sum(factors * log_probs(problem.likelihood, outputs, targets, weights))
    return total / math.sqrt(problem.num_samples)


def _by_token(problem: Scoring, params: Tree, row: Callable, number: int, absorb: Callable, carry: Any) -> Any:
    """One forward pass per row, and one backward pass for each of its tokens that counts, ``chunk_size`` together."""

    def step(carry, i):
        part, key = row(i)
        outputs, pullback = jax.vjp(
            lambda moving: with_wide_sums(problem.apply_fn)(problem.selection.join(moving, params), part.inputs),
            problem.selection.restrict(params),
        )
        targets, weights = _targets(problem, outputs, part, key), part.weights
        roots = jnp.sqrt(weights / problem.num_samples)
        cotangents = jax.grad(lambda z: jnp.sum(roots * log_probs(problem.likelihood, z, targets, weights)))(outputs)
        flat, active = cotangents.reshape(-1, outputs.shape[-1]), weights.reshape(-1) > 0
        tokens = flat.shape[0]
        order, number_active = jnp.argsort(~active, stable=True), jnp.sum(active, dtype=jnp.int32)
        chunk = min(problem.chunk_size, tokens)

        def score(token, live):
            # `cotangents` of one token alone: what reaches the parameters is its score, also through other positions.
            one = jnp.zeros_like(flat).at[token].set(jnp.where(live, flat[token], jnp.zeros_like(flat[token])))
            return jax.tree.leaves(pullback(one.reshape(outputs.shape))[0])

        def several(step, carry):
            index = step * chunk + jnp.arange(chunk, dtype=jnp.int32)
            live = index < number_active
            return absorb(carry, passes.each(score, order[jnp.minimum(index, tokens - 1)], live), live)

        return jax.lax.fori_loop(0, (number_active + chunk - 1) // chunk, several, carry), None

    return jax.lax.scan(step, carry, jnp.arange(number))[0]


def _targets(problem: Scoring, outputs: Array, part: Tokens, key: Array) -> Any:
    if problem.kind == "empirical":
        return part.targets
    return problem.likelihood.sample(key, jax.lax.stop_gradient(outputs))

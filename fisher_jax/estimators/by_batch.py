"""One observation: the whole batch. Random signs, labels drawn from the model, or both."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import rejection
from fisher_jax.batch import Batch
from fisher_jax.estimators.problem import Problem, read, signed_total, split, zeros_like
from fisher_jax.welford import moments as moments_room
from fisher_jax.welford.moments import Moments

__all__ = ["by_batch"]

Tree = Any


def by_batch(problem: Problem, params: Tree, batch: Batch, key: Array) -> tuple[Moments, Array]:
    """Moments of one observation, the mean over ``num_samples`` draws, and the reasons to reject it."""
    free, model = split(problem.apply_fn, params)
    tokens, bad, _ = read(problem, params, batch)

    def one(key):
        loss = lambda free: signed_total(problem, model(free, tokens.inputs), tokens, key)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(free)
        return problem.reduce(grads), jnp.isfinite(value)

    if problem.num_samples == 1:
        total, finite = one(key)
    else:
        total, finite = _sum_of_draws(one, jax.random.split(key, problem.num_samples))
    weight = tokens.total_weight
    scale = jnp.where(weight > 0, 1 / (problem.num_samples * jnp.where(weight > 0, weight, 1)), 0)
    values = jax.tree.map(lambda x: jnp.where(weight > 0, x * scale.astype(x.dtype), 0), total)
    return moments_room.one(values, weight), bad | rejection.reason_mask(non_finite=~finite)


def _sum_of_draws(one, keys: Array) -> tuple[Tree, Array]:
    def step(carry, key):
        total, finite = carry
        squares, is_finite = one(key)
        return (jax.tree.map(jnp.add, total, squares), finite & is_finite), None

    zeros = zeros_like(jax.eval_shape(lambda k: one(k)[0], keys[0]))
    return jax.lax.scan(step, (zeros, jnp.ones((), bool)), keys)[0]

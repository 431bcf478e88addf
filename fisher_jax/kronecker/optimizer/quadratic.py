"""The exact local quadratic model along two directions, and the step that minimises it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.dtypes import wide
from fisher_jax.batch.tokens import Tokens, fisher_product, log_probs, mean_of
from fisher_jax.likelihoods import Likelihood

__all__ = ["LocalModel", "best_step", "local_model", "loss", "tree_dot"]

Tree = Any


class LocalModel(NamedTuple):
    """``M(x) = b . x + x . C x / 2`` for the step ``x[0] direction + x[1] previous``, in nats per weighted token.

    Attributes:
        value: the loss itself, with its weight decay.
        slope: ``b [2]``.
        curvature: ``C [2, 2]``, from exact products with the Gauss-Newton matrix.
    """

    value: Array
    slope: Array
    curvature: Array


def tree_dot(a: Tree, b: Tree) -> Array:
    """Sum of products, at least float32."""
    return sum(
        (jnp.sum(wide(x) * wide(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)),
        start=jnp.zeros(()),
    )


def loss(apply_fn: Callable, likelihood: Likelihood, params: Tree, tokens: Tokens) -> Array:
    """Mean negative log-likelihood per weighted token."""
    return _loss_of(likelihood, apply_fn(params, tokens.inputs), tokens)


def _loss_of(likelihood: Likelihood, outputs: Array, tokens: Tokens) -> Array:
    return -mean_of(log_probs(likelihood, outputs, tokens.targets, tokens.weights), tokens.weights)


def local_model(
    outputs_of: Callable[[Tree], Array],
    likelihood: Likelihood,
    tokens: Tokens,
    moving: Tree,
    grads: Tree,
    directions: tuple[Tree, Tree],
    damping: Array,
) -> LocalModel:
    """Two Jacobian-vector products give ``C``; ``damping`` is added to its products of directions."""
    outputs, push = jax.linearize(outputs_of, moving)
    tangents = [push(jax.tree.map(lambda d, p: d.astype(p.dtype), d, moving)) for d in directions]
    curved = [fisher_product(likelihood, outputs, t) for t in tangents]

    def entry(i, j):
        fisher = mean_of(jnp.sum(wide(tangents[i]) * wide(curved[j]), -1), tokens.weights)
        return fisher + damping * tree_dot(directions[i], directions[j])

    value = _loss_of(likelihood, outputs, tokens)
    off = entry(0, 1)
    curvature = jnp.array([[entry(0, 0), off], [off, entry(1, 1)]])
    return LocalModel(value, jnp.array([tree_dot(grads, d) for d in directions]), curvature)


def best_step(model: LocalModel, least: Any = None, most: Any = None, scale: Any = 1.0) -> tuple[Array, Array]:
    """Coefficients that minimise ``M`` where that of the previous direction is in ``[least, most]``, and ``M`` there.

    Where the two directions are parallel up to rounding, or the previous one is zero, the first is taken alone. The
    coefficient of the first is then multiplied by ``scale``.
    """
    (a, b), (_, d) = model.curvature
    p, q = model.slope
    determinant = a * d - b * b
    two = jnp.array([b * q - d * p, b * p - a * q]) / jnp.where(determinant > 0, determinant, 1)
    one = jnp.array([-p / jnp.where(a > 0, a, 1), jnp.zeros_like(p)])
    found = jnp.where(determinant > 1e-5 * a * d, two, one)
    bounded = jnp.clip(found[1], least, most)
    # M is convex: with the second coefficient at a bound the first one is the best of a parabola.
    on_bound = jnp.array([-(p + b * bounded) / jnp.where(a > 0, a, 1), bounded])
    found = jnp.where((d > 0) & (bounded != found[1]), on_bound, found)
    found = found * jnp.stack([jnp.asarray(scale, found.dtype), jnp.ones((), found.dtype)])
    return found, model.slope @ found + found @ model.curvature @ found / 2

"""Likelihoods: what the outputs of a model say about its targets."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from fisher_jax._support.dtypes import wide
from fisher_jax._support.outline import outline

__all__ = ["Likelihood", "bernoulli", "categorical", "gaussian"]


class Likelihood(NamedTuple):
    """A family of distributions with natural-parameter outputs ``[..., K]``.

    Attributes:
        name: for messages.
        log_prob: ``log_prob(outputs, targets) -> [...]``, in nats, at least float32.
        sample: ``sample(key, outputs, temperature=1.0) -> targets``.
        fisher_product: ``fisher_product(outputs, tangent) -> [..., K]``, the output-space Fisher times a tangent.
        fisher_factor: ``fisher_factor(outputs, k) -> [..., K]``, column ``k`` of a factor ``L`` with ``L L^T`` the
            output-space Fisher; there are ``K`` columns.
        in_range: ``in_range(outputs, targets) -> bool [...]``, whether a target can be.
    """

    name: str
    log_prob: Callable[..., Array]
    sample: Callable[..., Array]
    fisher_product: Callable[..., Array]
    fisher_factor: Callable[..., Array]
    in_range: Callable[..., Array]

    def __repr__(self) -> str:
        return outline(self)


def _categorical_log_prob(outputs: Float[Array, "*lead K"], targets: Shaped[Array, "*lead"]) -> Float[Array, "*lead"]:
    log_p = jax.nn.log_softmax(wide(outputs))
    return jnp.take_along_axis(log_p, targets[..., None].astype(jnp.int32), -1, mode="clip")[..., 0]


def _categorical_product(outputs: Array, tangent: Array) -> Array:
    p = jax.nn.softmax(wide(outputs))
    return p * tangent - p * jnp.sum(p * tangent, -1, keepdims=True)


def _categorical_factor(outputs: Array, k: Array | int) -> Array:
    p = jax.nn.softmax(wide(outputs))
    onehot = (jnp.arange(p.shape[-1]) == k).astype(p.dtype)
    return jnp.sqrt(p[..., k])[..., None] * (jnp.expand_dims(onehot, tuple(range(p.ndim - 1))) - p)


def _integer_in_range(outputs: Array | jax.ShapeDtypeStruct, targets: Shaped[Array, "*lead"]) -> Bool[Array, "*lead"]:
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets are integer labels, found dtype {targets.dtype}")
    return (targets >= 0) & (targets < outputs.shape[-1])


categorical = Likelihood(
    "categorical",
    _categorical_log_prob,
    lambda key, outputs, temperature=1.0: jax.random.categorical(key, wide(outputs) / temperature),
    _categorical_product,
    _categorical_factor,
    _integer_in_range,
)
"""Softmax of the outputs; targets are integer labels ``[...]``."""


def _bernoulli_log_prob(outputs: Array, targets: Array) -> Array:
    z, y = wide(outputs), targets.astype(wide(outputs).dtype)
    return jnp.sum(y * jax.nn.log_sigmoid(z) + (1 - y) * jax.nn.log_sigmoid(-z), -1)


def _bernoulli_variance(outputs: Array) -> Array:
    z = wide(outputs)
    return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)


bernoulli = Likelihood(
    "bernoulli",
    _bernoulli_log_prob,
    lambda key, outputs, temperature=1.0: jax.random.bernoulli(
        key, jax.nn.sigmoid(wide(outputs) / temperature)
    ).astype(wide(outputs).dtype),
    lambda outputs, tangent: _bernoulli_variance(outputs) * tangent,
    lambda outputs, k: jnp.sqrt(_bernoulli_variance(outputs)) * (jnp.arange(outputs.shape[-1]) == k),
    lambda outputs, targets: jnp.all((targets >= 0) & (targets <= 1), -1),
)
"""Independent sigmoids of the outputs, summed over the last axis; targets ``[..., K]`` in [0, 1]."""


def _gaussian_log_prob(outputs: Array, targets: Array) -> Array:
    z = wide(outputs)
    return -0.5 * jnp.sum((targets - z) ** 2 + jnp.log(2 * jnp.pi).astype(z.dtype), -1)


def _gaussian_sample(key: Array, outputs: Array, temperature: float = 1.0) -> Array:
    z = wide(outputs)
    return z + jnp.sqrt(temperature).astype(z.dtype) * jax.random.normal(key, z.shape, z.dtype)


gaussian = Likelihood(
    "gaussian",
    _gaussian_log_prob,
    _gaussian_sample,
    lambda outputs, tangent: wide(tangent),
    lambda outputs, k: jnp.broadcast_to(jnp.arange(outputs.shape[-1]) == k, outputs.shape).astype(
        wide(outputs).dtype
    ),
    lambda outputs, targets: jnp.all(jnp.isfinite(targets), -1),
)
"""Unit variance around the outputs, summed over the last axis; targets ``[..., K]``; a temperature is a variance."""

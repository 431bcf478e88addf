"""Likelihoods: what the outputs of a model say about its targets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from fisher_jax._support.dtypes import wide
from fisher_jax._support.outline import outline

__all__ = ["Likelihood", "bernoulli", "categorical", "gaussian", "gaussian_with_scale"]


def _needed(name: str, arguments: str) -> Callable[..., Array]:
    """What stands for a function that a likelihood does not have."""

    def missing(*given: Any, **named: Any) -> Array:
        raise ValueError(
            f"this needs the likelihood's {name}({arguments}), which it does not have: give it as "
            f"fj.Likelihood(..., {name}=), or take kind='empirical', which needs log_prob alone"
        )

    return missing


def _finite(outputs: Array | jax.ShapeDtypeStruct, targets: Array) -> Array:
    finite = jnp.isfinite(targets)
    return jnp.all(finite, tuple(range(len(outputs.shape) - 1, finite.ndim)))


class Likelihood(NamedTuple):
    """A family of distributions with natural-parameter outputs ``[..., K]``.

    Attributes:
        name: for messages.
        log_prob: ``log_prob(outputs, targets) -> [...]``, in nats, at least float32.
        sample: ``sample(key, outputs, temperature=1.0) -> targets``, for labels drawn from the model.
        fisher_product: ``fisher_product(outputs, tangent) -> [..., K]``, the output-space Fisher times a tangent, for
            products with the Fisher or the GGN.
        fisher_factor: ``fisher_factor(outputs, k) -> [..., K]``, column ``k`` of a factor ``L`` with ``L L^T`` the
            output-space Fisher, for the exact true Fisher; there are ``K`` columns.
        in_range: ``in_range(outputs, targets) -> bool [...]``, whether a target can be; by default, whether it is
            finite.

    A likelihood of your own needs ``log_prob`` alone where nothing else is used; where more is, an error says what.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> laplace = fj.Likelihood("laplace", lambda outputs, targets: -jnp.abs(targets - outputs).sum(-1))
        >>> batch = fj.Batch(jnp.ones((2, 3)), jnp.zeros((2, 1)))
        >>> fisher = fj.group_fisher(lambda params, x: x @ params, laplace, estimator="exact")
        >>> fj.mean(fisher.observe(jnp.ones((3, 1)), batch)).tolist()
        [[1.0], [1.0], [1.0]]
    """

    name: str
    log_prob: Callable[..., Array]
    sample: Callable[..., Array] = _needed("sample", "key, outputs, temperature=1.0")
    fisher_product: Callable[..., Array] = _needed("fisher_product", "outputs, tangent")
    fisher_factor: Callable[..., Array] = _needed("fisher_factor", "outputs, k")
    in_range: Callable[..., Array] = _finite

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
        raise TypeError(
            f"targets are integer labels, found dtype {targets.dtype}; of one-hot targets take "
            "jnp.argmax(targets, -1)"
        )
    return (targets >= 0) & (targets < outputs.shape[-1])


def _numbers(name: str, outputs: Array | jax.ShapeDtypeStruct, targets: Array) -> Array:
    """Targets of which every output has one: real numbers, integers and booleans too."""
    if jnp.issubdtype(targets.dtype, jnp.complexfloating):
        raise TypeError(f"{name} targets are real numbers, found dtype {targets.dtype}")
    if targets.shape != outputs.shape:
        raise ValueError(
            f"{name} targets have a number for every output, shape {list(outputs.shape)}, found {list(targets.shape)}"
        )
    return targets


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


def _fraction_in_range(outputs: Array | jax.ShapeDtypeStruct, targets: Array) -> Array:
    found = _numbers("bernoulli", outputs, targets)
    return jnp.all((found >= 0) & (found <= 1), -1)


bernoulli = Likelihood(
    "bernoulli",
    _bernoulli_log_prob,
    lambda key, outputs, temperature=1.0: jax.random.bernoulli(
        key, jax.nn.sigmoid(wide(outputs) / temperature)
    ).astype(wide(outputs).dtype),
    lambda outputs, tangent: _bernoulli_variance(outputs) * tangent,
    lambda outputs, k: jnp.sqrt(_bernoulli_variance(outputs)) * (jnp.arange(outputs.shape[-1]) == k),
    _fraction_in_range,
)
"""Independent sigmoids of the outputs, summed over the last axis; targets ``[..., K]`` in [0, 1]."""


def _gaussian_log_prob(outputs: Array, targets: Array) -> Array:
    z = wide(outputs)
    return -0.5 * jnp.sum((targets.astype(z.dtype) - z) ** 2 + jnp.log(2 * jnp.pi).astype(z.dtype), -1)


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
    lambda outputs, targets: jnp.all(jnp.isfinite(_numbers("gaussian", outputs, targets)), -1),
)
"""Unit variance around the outputs, summed over the last axis; targets ``[..., K]``; a temperature is a variance."""


def _mean_and_log_scale(outputs: Array) -> tuple[Array, Array]:
    if outputs.shape[-1] % 2:
        raise ValueError(
            "fj.gaussian_with_scale has means and log standard deviations, one after the other, along the last axis "
            f"of the outputs, whose length is even; found shape {list(outputs.shape)}"
        )
    mean, log_scale = jnp.split(wide(outputs), 2, -1)
    return mean, log_scale


def _scaled_log_prob(outputs: Array, targets: Array) -> Array:
    mean, log_scale = _mean_and_log_scale(outputs)
    standard = (targets - mean) * jnp.exp(-log_scale)
    return -jnp.sum(0.5 * standard**2 + log_scale + 0.5 * jnp.log(2 * jnp.pi).astype(mean.dtype), -1)


def _scaled_sample(key: Array, outputs: Array, temperature: float = 1.0) -> Array:
    mean, log_scale = _mean_and_log_scale(outputs)
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    return mean + jnp.sqrt(temperature).astype(mean.dtype) * jnp.exp(log_scale) * noise


def _scaled_information(outputs: Array) -> Array:
    """The output-space Fisher is diagonal: ``1 / scale**2`` of a mean, 2 of a log standard deviation."""
    _, log_scale = _mean_and_log_scale(outputs)
    return jnp.concatenate([jnp.exp(-2 * log_scale), jnp.full_like(log_scale, 2)], -1)


def _scaled_in_range(outputs: Array | jax.ShapeDtypeStruct, targets: Array) -> Array:
    wanted = (*outputs.shape[:-1], outputs.shape[-1] // 2)
    if targets.shape != wanted:
        raise ValueError(
            f"targets of fj.gaussian_with_scale have half as many numbers as the outputs, shape {list(wanted)}, "
            f"found {list(targets.shape)}"
        )
    return jnp.all(jnp.isfinite(targets), -1)


gaussian_with_scale = Likelihood(
    "gaussian_with_scale",
    _scaled_log_prob,
    _scaled_sample,
    lambda outputs, tangent: _scaled_information(outputs) * tangent,
    lambda outputs, k: jnp.sqrt(_scaled_information(outputs)) * (jnp.arange(outputs.shape[-1]) == k),
    _scaled_in_range,
)
"""Means and log standard deviations of independent normals, one after the other along the last axis of the outputs
``[..., 2 K]``, as a policy has them; targets ``[..., K]``; a temperature multiplies the variance."""

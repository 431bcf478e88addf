"""Scores as text makes them: rare, bursty occurrences with log-normal values, in documents of unequal length."""

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj


def documents(rng, number, groups, occurrences, *, burst=2.0, sigma=1.5):
    """Values per token ``[number, groups]`` and lengths ``[number]``; ``occurrences`` in a mean document."""
    length = np.ceil(rng.lognormal(5, 0.6, number))
    rate = (occurrences * np.ones(groups))[:, None] * length / np.exp(5.18)
    met = rng.poisson(rate * rng.gamma(1 / burst, burst, (groups, number)) if burst else rate)
    sums = np.zeros((groups, number))
    inside = np.nonzero(met)
    values = rng.lognormal(0, sigma, met[inside].sum())
    if len(values):
        sums[inside] = np.add.reduceat(values, np.r_[0, np.cumsum(met[inside])[:-1]])
    return (sums / length).T, length


@jax.jit
def _state(values, weights):
    moments = fj.welford.observe(values, weights, unit="sequence")
    return fj.welford.add(fj.welford.init(moments), moments)


def state(values, weights=None):
    """One sequence of each row; compiled once for each shape."""
    weights = np.ones(len(values)) if weights is None else weights
    return _state(jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32))

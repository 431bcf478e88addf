"""Confidence intervals: Student's quantile, and how often they hold the truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fisher_jax as fj
from tests import oracles


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_the_interval_is_t_quantiles_of_the_standard_error(level):
    rng = np.random.default_rng(0)
    values, weights = rng.lognormal(0, 1, (7, 3)).astype(np.float32), np.array([1.0, 9, 4, 0, 2, 30, 5])
    moments = fj.welford.observe({"a": jnp.asarray(values)}, jnp.asarray(weights, jnp.float32), unit="sequence")
    mean, error, n, _ = oracles.moments(values, weights, np.arange(7))
    assert n == 6
    lower, upper = scipy.stats.t.interval(level, n - 1, loc=mean, scale=error)
    for x in (moments, fj.welford.add(fj.welford.init(moments), moments)):
        found = fj.welford.interval(x, level)
        assert found[0]["a"].dtype == np.float64
        np.testing.assert_allclose(found[0]["a"], lower, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[1]["a"], upper, rtol=1e-5)


@pytest.mark.parametrize("level", [0, 1, -0.1, 95, float("nan")])
def test_a_level_is_a_probability(level):
    with pytest.raises(ValueError, match="level is a probability between 0 and 1"):
        fj.welford.interval(fj.welford.observe(jnp.array([1.0, 2.0])), level)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_observations_have_no_interval(n):
    moments = fj.welford.observe(jnp.array([1.0, 2.0]), jnp.arange(2) < n, unit="sequence")
    lower, upper = fj.welford.interval(moments)
    assert np.isnan(lower)
    assert np.isnan(upper)
    assert float(fj.welford.mean(moments)) == n


def test_a_nominal_95_interval_holds_the_truth_as_often_as_it_says():
    """Units of very unequal length, heavy-tailed values whose spread depends on the length."""
    replications, n = 20_000, 80
    rng = np.random.default_rng(1)
    length = np.ceil(rng.lognormal(3, 1, (replications, n)))
    tails = rng.standard_t(4, (replications, n))
    values = 2 + tails / np.sqrt(length) + 0.3 * rng.standard_t(4, (replications, n))

    @jax.jit
    @jax.vmap
    def measure(values, weights):
        moments = fj.welford.observe(values, weights, unit="sequence")
        state = fj.welford.add(fj.welford.init(moments), moments)
        return fj.welford.mean(state), fj.welford.standard_error(state), fj.welford.variance(state)

    mean, error, variance = (np.asarray(x, np.float64) for x in measure(*map(jnp.float32, (values, length))))
    quantile = scipy.stats.t.ppf(0.975, n - 1)
    covered = np.mean(np.abs(mean - 2) <= quantile * error)
    assert 0.92 < covered < 0.97
    # One of them is what the library gives on the host.
    moments = fj.welford.observe(jnp.float32(values[0]), jnp.float32(length[0]), unit="sequence")
    lower, upper = fj.welford.interval(moments)
    np.testing.assert_allclose([lower, upper], mean[0] + quantile * error[0] * np.array([-1, 1]), rtol=1e-5)
    # The spread of single units is no error of the mean: an interval from it would hold the truth always.
    assert np.mean(np.abs(mean - 2) <= quantile * np.sqrt(variance)) == 1

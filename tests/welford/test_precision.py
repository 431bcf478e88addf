"""Float32 states over 1e8 tokens keep what float64 would: relative error 1e-9 in mean and M2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

BATCHES, TOKENS, BLOCK = 101_000, 1000, 5_050
SIGMA = 1.25


def plain_welford(carry, moments):
    """Chan's update in plain float32: what the compensated state is measured against."""
    mean, m2, weight = carry
    total = weight + moments.weight
    delta = moments.mean - mean
    ratio = moments.weight / total
    return mean + delta * ratio, m2 + moments.m2 + delta * delta * weight * ratio, total


@functools.partial(jax.jit, donate_argnums=0)
def feed(carry, values, present):
    def step(carry, x):
        state, plain = carry
        moments = fj.welford.observe(*x)
        return (fj.welford.add(state, moments), plain_welford(plain, moments)), (moments.mean, moments.m2)

    return jax.lax.scan(step, carry, (values, present))


@pytest.fixture(scope="module")
def run():
    """1e8 heavy-tailed values through both states, and the same numbers summed in float64."""
    assert not jax.config.jax_enable_x64
    rng = np.random.default_rng(0)
    zero = jnp.zeros(())
    carry = (fj.welford.init(fj.welford.observe(jnp.zeros(2), jnp.ones(2, bool))), (zero, zero + 0, zero + 0))
    centre = np.exp(SIGMA**2 / 2)  # sums of squares are taken around it, so that they do not cancel
    weights, means, m2s, sums, squares = [], [], [], 0.0, 0.0
    for _ in range(BATCHES // BLOCK):
        values = rng.standard_normal((BLOCK, TOKENS), np.float32)
        values *= np.float32(SIGMA)
        np.exp(values, out=values)
        # Between 0 and 1.2% of each batch is padding: batches have unequal weights.
        present = np.arange(TOKENS) >= rng.integers(0, 13, (BLOCK, 1))
        carry, (mean, m2) = feed(carry, values, present)
        deviations = values.astype(np.float64) - centre
        deviations *= present
        sums += deviations.sum()
        squares += np.vdot(deviations, deviations)
        weights.append(present.sum(1))
        means.append(np.asarray(mean, np.float64))
        m2s.append(np.asarray(m2, np.float64))
    w, mean, m2 = (np.concatenate(x).astype(np.longdouble) for x in (weights, means, m2s))
    total = w.sum()
    merged_mean = (w * mean).sum() / total
    merged = (merged_mean, m2.sum() + (w * (mean - merged_mean) ** 2).sum())
    truth = (centre + sums / total, squares - sums**2 / total)
    state, plain = jax.tree.map(np.asarray, carry)
    return state, plain, merged, truth, int(total)


def error(found, reference):
    return abs(float(found / reference - 1))


def test_mean_and_m2_are_the_exact_merge_of_the_batches_to_1e_9(run):
    state, _, (mean, m2), _, _ = run
    assert error(np.longdouble(state.mean[0]) + state.mean[1], mean) < 1e-9
    assert error(np.longdouble(state.m2[0]) + state.m2[1], m2) < 1e-9


def test_counts_are_exact_beyond_float32(run):
    state, plain, _, _, total = run
    assert total > 1e8 > 2**24
    assert fj.welford.count(state) == fj.welford.weight(state) == total
    assert int(state.rejected) == 0
    assert plain[2] != total  # a plain float32 sum has stopped counting right


def test_plain_float32_misses_by_orders_of_magnitude(run):
    _, (mean, m2, _), (merged_mean, merged_m2), _, _ = run
    assert error(np.longdouble(mean), merged_mean) > 1e-7
    assert error(np.longdouble(m2), merged_m2) > 1e-5


def test_rounding_within_the_batches_averages_out(run):
    state, _, _, (mean, m2), _ = run
    assert error(np.longdouble(state.mean[0]) + state.mean[1], mean) < 2e-9
    assert error(np.longdouble(state.m2[0]) + state.m2[1], m2) < 5e-9

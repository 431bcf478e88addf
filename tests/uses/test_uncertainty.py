"""Signal to noise, effective counts, and how much more text an interval needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fisher_jax as fj
from fisher_jax.welford.observed import as_state
from tests.uses.heavy_tails import documents, state


def test_signal_to_noise_is_mean_over_error():
    values = np.random.default_rng(0).gamma(2.0, 1.0, (9, 4))
    values[:, 2] = 0
    found = jax.jit(fj.stats.signal_to_noise)(state(values))
    kept = [0, 1, 3]
    wanted = values[:, kept].mean(0) / (values[:, kept].std(0, ddof=1) / 3)
    np.testing.assert_allclose(np.asarray(found)[kept], wanted, rtol=1e-5)
    assert found[2] == 0
    assert np.isinf(fj.stats.signal_to_noise(state(np.ones((3, 1)))))
    assert np.isnan(fj.stats.signal_to_noise(state(np.ones((1, 1))))).all()


def test_the_effective_count_is_the_participation_ratio():
    rng = np.random.default_rng(1)
    values, _ = documents(rng, 30, 50, np.geomspace(0.01, 20, 50))
    values[:, 0] = 0
    with np.errstate(invalid="ignore"):
        wanted = np.nan_to_num(values.sum(0) ** 2 / (values**2).sum(0))
    assert wanted[1:].min() < 2
    np.testing.assert_allclose(fj.stats.effective_count(state(values)), wanted, rtol=1e-4)


def test_unequal_weights_count_by_kish():
    weights = np.array([1.0, 3.0, 10.0, 2.0])
    found = fj.stats.effective_count(state(np.full((4, 1), 0.5), weights))
    np.testing.assert_allclose(found, weights.sum() ** 2 / (weights**2).sum(), rtol=1e-6)


def test_an_open_document_counts():
    weights, units = jnp.array([2.0, 1.0, 3.0, 4.0]), jnp.array([5, 5, 7, 9])
    observe = jax.jit(lambda w: fj.welford.observe(jnp.full((4, 1), 0.5), w, unit="document", units=units))
    for x in (observe(weights), as_state(observe(weights))):
        np.testing.assert_allclose(fj.stats.effective_count(x), 100 / (9 + 9 + 16), rtol=1e-6)


def test_the_data_needed_are_the_first_that_suffice():
    values = np.random.default_rng(2).gamma(2.0, 1.0, (12, 5)) * np.array([0.1, 1, 1, 10, 0])
    weights = np.full(12, 50.0)
    spread = values.std(0, ddof=1)
    found = fj.stats.data_needed(state(values, weights), width=0.5, level=0.9)
    for group, sd in enumerate(spread[:4]):
        sizes = np.arange(2, 50_000)
        enough = 2 * scipy.stats.t.ppf(0.95, sizes - 1) * sd / np.sqrt(sizes) <= 0.5
        # float32 errors shift the last of many thousands by one
        np.testing.assert_allclose(found.units[group], max(sizes[enough][0] - 12, 0), rtol=1e-4)
    assert found.units[0] == 0
    assert np.isinf(found.units[4])
    np.testing.assert_array_equal(found.tokens[:4], found.units[:4] * 50)
    relative = fj.stats.data_needed(state(values, weights), relative_width=0.5)
    absolute = fj.stats.data_needed(state(values[:, 1:2], weights), width=0.5 * values[:, 1].mean())
    np.testing.assert_allclose(relative.units[1], absolute.units[0], atol=1)
    scaled = fj.stats.data_needed(state(values * 8, weights), relative_width=0.5)
    np.testing.assert_allclose(relative.units[[1, 3]], scaled.units[[1, 3]], atol=1)


def test_more_than_can_be_counted_is_still_a_number():
    values = np.random.default_rng(2).gamma(2.0, 1.0, (12, 5))
    found = fj.stats.data_needed(state(values), width=1e-12)
    wanted = (2 * scipy.stats.norm.ppf(0.975) * values.std(0, ddof=1) / 1e-12) ** 2
    np.testing.assert_allclose(found.units, wanted, rtol=1e-4)


def test_with_the_data_needed_intervals_have_the_width():
    rng = np.random.default_rng(3)
    values = rng.gamma(2.0, 1.0, (40, 300))
    more = fj.stats.data_needed(state(values), width=0.4)
    total = 40 + int(np.median(more.units))
    values = rng.gamma(2.0, 1.0, (total, 300))
    half = scipy.stats.t.ppf(0.975, total - 1) * values.std(0, ddof=1) / np.sqrt(total)
    assert total > 100
    np.testing.assert_allclose(2 * np.mean(half), 0.4, rtol=0.05)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: fj.stats.data_needed(x), "give one of width= and relative_width="),
        (lambda x: fj.stats.data_needed(x, width=1.0, relative_width=1.0), "give one of width= and relative_width="),
        (lambda x: fj.stats.data_needed(x, width=-1.0), "the width of an interval is positive, found -1.0"),
        (lambda x: fj.stats.data_needed(x, width=1.0, level=95), "level is a probability between 0 and 1, found 95"),
    ],
)
def test_bad_settings_are_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(state(np.ones((3, 2))))


def test_one_observation_has_no_error():
    with pytest.raises(ValueError, match=r"the state has 1 observation \(unit: sequence\)"):
        fj.stats.effective_count(state(np.ones((1, 2))))
    with pytest.raises(TypeError, match="the state is a Welford state or moments"):
        fj.stats.effective_count(jnp.ones(3))

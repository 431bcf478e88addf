"""Spectral density and traces against what the eigenvalues say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fisher_jax as fj
from tests.spectra.krylov import operators_of_known_spectrum as known

KEY = jax.random.key(0)


def density(matrix, **options):
    options = {"num_steps": 40, "num_probes": 12, "key": KEY} | options
    return fj.spectral_density(known.matvec(matrix), known.like(len(matrix)), **options)


def broadened(values, found):
    """Mean over each cell of Gaussians at the eigenvalues, by their distribution functions."""
    below = scipy.stats.norm.cdf(found.edges[:, None], values, found.width).mean(axis=1)
    return np.diff(below) / np.diff(found.edges), below[1:]


@pytest.mark.parametrize("name", ["bulk", "indefinite", "rank 3"])
@pytest.mark.parametrize("storage", ["host", "device"])
def test_the_density_is_that_of_the_eigenvalues_within_its_error_bars(name, storage):
    matrix = known.dense(known.SPECTRA[name])
    found = density(matrix, storage=storage, width=0.3)
    wanted, below = broadened(known.truth(matrix), found)
    inside = wanted > 1e-3 * wanted.max()
    error = np.abs(found.density - wanted)[inside] / np.maximum(found.standard_error[inside], 1e-3 * wanted.max())
    assert np.mean(error < 3) > 0.85
    assert np.max(np.abs(found.cumulative - below)) < 0.1
    assert np.sum(found.density * np.diff(found.edges)) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, rtol=1e-6)
    assert abs(found.mean - known.truth(matrix).mean()) < 4 * found.mean_error + 1e-6


def test_error_bars_are_those_of_repeated_estimates():
    """The spread of independent estimates is what one estimate says of itself."""
    matrix = known.dense(known.SPECTRA["bulk"])
    found = [density(matrix, num_steps=15, key=jax.random.key(i), width=0.5) for i in range(12)]
    edges = np.linspace(0, 5, 6)
    spread = np.std([[np.interp(e, x.edges[1:], x.cumulative) for e in edges] for x in found], axis=0, ddof=1)
    stated = np.mean([[np.interp(e, x.edges[1:], x.cumulative_error) for e in edges] for x in found], axis=0)
    assert 0.6 < np.mean(stated) / np.mean(spread) < 1.6


def test_a_density_narrower_than_its_cells_keeps_its_mass():
    found = density(known.dense(known.SPECTRA["bulk"]), num_steps=20, num_probes=2, width=1e-6, num_points=50)
    assert np.sum(found.density * np.diff(found.edges)) == pytest.approx(1, abs=1e-6)
    assert found.cumulative[-1] == pytest.approx(1, abs=1e-6)


def test_a_spike_at_zero_leaves_the_rest_visible_on_a_log_axis():
    values = np.r_[np.zeros(80), np.full(10, 100.0), np.full(6, 0.1), np.full(4, -1.0)]
    found = density(known.dense(values), num_steps=20, num_probes=20)
    log = found.on_log_axis(floor=1e-3)
    cells = np.diff(log.edges)
    assert log.zero == pytest.approx(0.8, abs=0.03)
    assert np.sum(log.negative * cells) == pytest.approx(0.04, abs=0.02)
    assert np.sum((log.positive + log.negative) * cells) + log.zero == pytest.approx(1, abs=1e-6)
    high = log.grid > 1
    assert np.sum((log.positive * cells)[high]) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("name", ["zero", "identity"])
def test_a_multiple_of_the_identity_is_one_spike(name):
    found = density(known.dense(known.SPECTRA[name]), num_probes=2)
    assert found.num_products <= 3
    value = known.SPECTRA[name][0]
    np.testing.assert_allclose(found.mean, value, atol=1e-6)
    assert np.sum(found.density * np.diff(found.edges)) == pytest.approx(1, abs=1e-6)
    assert found.cumulative[found.edges[1:] > value + 6 * found.width - 1e-9][0] == pytest.approx(1, abs=1e-6)


def test_one_probe_has_no_error_bars():
    found = density(known.dense(known.SPECTRA["bulk"]), num_probes=1, num_steps=5)
    assert np.isnan(found.standard_error).all()
    assert np.isnan(found.mean_error)


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"num_probes": 0}, {"width": 0.0}, {"storage": "disk"}])
def test_what_cannot_be_asked_for_is_an_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        density(known.dense(known.SPECTRA["bulk"]), **options)


ESTIMATES = {
    "trace": (fj.spectra.trace, lambda values: values.sum()),
    "trace of the square": (functools.partial(fj.spectra.trace, power=2), lambda values: (values**2).sum()),
}


def estimate(function, matrix, **options):
    options = {"num_products": 30, "key": KEY} | options
    return function(known.matvec(matrix), known.like(len(matrix)), **options)


@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("kind", ESTIMATES)
def test_estimates_lie_within_their_errors(kind, storage):
    function, of = ESTIMATES[kind]
    matrix = known.dense(known.SPECTRA["bulk"])
    runs = 20 if storage == "host" else 2
    found = [estimate(function, matrix, key=jax.random.key(i), storage=storage) for i in range(runs)]
    scores = [(x.value - of(known.truth(matrix))) / x.standard_error for x in found]
    assert np.mean(np.abs(scores) < 2.5) > 0.8
    if storage == "host":
        assert abs(np.mean(scores)) < 0.8
        assert np.std(scores) > 0.5
    assert {x.num_products for x in found} == {30}


@pytest.mark.parametrize("kind", ESTIMATES)
def test_deflation_takes_variance_away(kind):
    """Ten large eigenvalues found by the first products; plain probes would see them as noise."""
    function, of = ESTIMATES[kind]
    values = np.r_[np.linspace(50, 100, 10), np.full(90, 0.01)]
    found = estimate(function, known.dense(values), num_products=60)
    assert found.value == pytest.approx(of(values), rel=1e-4)
    plain = np.sqrt(2 * (values**2).sum() / 60)
    assert found.standard_error < plain / 100


@pytest.mark.parametrize("kind", ESTIMATES)
@pytest.mark.parametrize("name", ["rank 3", "zero", "rank 1"])
def test_a_low_rank_is_exact(kind, name):
    function, of = ESTIMATES[kind]
    found = estimate(function, known.dense(known.SPECTRA[name]))
    assert found.value == pytest.approx(of(known.SPECTRA[name]), rel=1e-5, abs=1e-6)
    assert found.standard_error <= 1e-5
    assert np.isfinite(found.standard_error)


@pytest.mark.parametrize("kind", ESTIMATES)
def test_a_small_space_is_exact(kind):
    function, of = ESTIMATES[kind]
    values = np.r_[-2.0, np.linspace(1, 3, 16)]
    found = estimate(function, known.dense(values), num_products=60)
    assert found.value == pytest.approx(of(values), rel=1e-5)
    assert (found.standard_error, found.num_products) == (0, 34)


def test_a_nan_or_too_few_products_is_an_error():
    with pytest.raises(ValueError, match="num_products is at least 4, found 3"):
        estimate(fj.spectra.trace, known.dense(known.SPECTRA["bulk"]), num_products=3)
    with pytest.raises(ValueError, match="power is 1 or 2, found 3"):
        estimate(fj.spectra.trace, known.dense(known.SPECTRA["bulk"]), power=3)
    with pytest.raises(fj.InputError, match="NaN"):
        fj.spectra.trace(lambda v: v * jnp.nan, jnp.zeros(5), num_products=4, key=KEY)

"""Adjusted p values are SciPy's, and Holm's by definition."""

import numpy as np
import pytest
import scipy.stats

import fisher_jax as fj


@pytest.mark.parametrize("method", ["bh", "by"])
def test_q_values_are_scipys(method):
    rng = np.random.default_rng(0)
    p = {"a": rng.random((3, 4)), "b": np.r_[rng.random(30) ** 6, 0.25, 0.25, 0.0, 1.0]}
    found = fj.stats.q_values(p, method)
    wanted = scipy.stats.false_discovery_control(np.r_[p["a"].ravel(), p["b"]], method=method)
    np.testing.assert_allclose(np.r_[found["a"].ravel(), found["b"]], wanted, rtol=1e-14)


def test_what_was_not_tested_is_not_counted():
    p = np.array([0.01, np.nan, 0.04, np.nan])
    np.testing.assert_array_equal(fj.stats.q_values(p)[[0, 2]], scipy.stats.false_discovery_control([0.01, 0.04]))
    assert np.isnan(fj.stats.q_values(p)[[1, 3]]).all()
    assert np.isnan(fj.stats.holm(np.array([np.nan]))).all()


def test_holm_rejects_what_stepping_down_rejects():
    p = np.random.default_rng(1).random(40) ** 5
    adjusted = fj.stats.holm(p)
    for level in (0.001, 0.01, 0.05, 0.3):
        rejected = set()
        for i, k in enumerate(np.argsort(p)):
            if p[k] > level / (len(p) - i):
                break
            rejected.add(k)
        assert set(np.flatnonzero(adjusted <= level)) == rejected


@pytest.mark.parametrize("bad", [-0.1, 1.5])
def test_p_values_are_probabilities(bad):
    for adjust in (fj.stats.holm, fj.stats.q_values):
        with pytest.raises(ValueError, match=rf"\['a'\] has the entry {bad}; p values are in \[0, 1\]"):
            adjust({"a": np.array([0.5, bad])})
    with pytest.raises(ValueError, match="method is 'bh' or 'by', found 'storey'"):
        fj.stats.q_values(np.array([0.5]), "storey")


def test_of_nothing_nothing_is_adjusted():
    assert fj.stats.q_values({}) == {}
    assert fj.stats.holm({"a": {}}) == {"a": {}}

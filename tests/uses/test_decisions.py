"""Claims above and below a threshold keep their error, with heavy tails too, and say when nothing is known."""

import numpy as np
import pytest
import scipy.stats

import fisher_jax as fj
from tests.uses.heavy_tails import documents, state


def test_p_values_are_students():
    values = np.random.default_rng(0).gamma(2.0, 1.0, (15, 6)) * np.array([0.2, 0.8, 1, 1.3, 3, 8])
    for side, alternative in (("above", "greater"), ("both", "two-sided")):
        found = fj.stats.decide(state(values), 2.0, side=side)
        wanted = scipy.stats.ttest_1samp(values, 2.0, alternative=alternative).pvalue
        chosen = slice(None) if side == "above" else values.mean(0) > 2
        np.testing.assert_allclose(found.p[chosen], wanted[chosen], rtol=2e-4)


def test_below_takes_the_error_that_the_mean_would_have_at_the_threshold():
    values = np.random.default_rng(1).gamma(2.0, 1.0, (15, 3)) * np.array([0.2, 0.6, 3])
    mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(15)
    count = values.sum(0) ** 2 / (values**2).sum(0)
    wanted = scipy.stats.t.sf((2.0 - mean) / (error * 2.0 / mean), count - 1)
    found = fj.stats.decide(state(values), 2.0, side="below")
    np.testing.assert_allclose(found.p[:2], wanted[:2], rtol=1e-3)
    assert found.p[2] == 1


def test_controls_adjust_all_groups_together():
    values = np.random.default_rng(2).gamma(20.0, 0.05, (25, 30)) * np.geomspace(0.5, 2, 30)
    plain = fj.stats.decide(state(values), 1.0, control="none")
    np.testing.assert_array_equal(plain.adjusted, plain.p)
    for control, adjust in (("holm", fj.stats.holm), ("bh", fj.stats.q_values)):
        found = fj.stats.decide(state(values), 1.0, control=control, level=0.9)
        np.testing.assert_array_equal(found.adjusted, adjust(plain.p))
        sign = np.where(values.mean(0) > 1, 1, -1)
        np.testing.assert_array_equal(found.verdict, np.where(adjust(plain.p) <= 0.1, sign, 0))
    assert set(found.verdict) == {-1, 0, 1}


@pytest.mark.parametrize(("number", "occurrences"), [(12, 1.0), (60, 0.2), (60, 5.0)])
def test_false_claims_stay_rare_with_heavy_tails(number, occurrences):
    """The threshold is the true mean, so every claim is false."""
    rng = np.random.default_rng(3)
    found, plain = [], []
    for _ in range(6):
        values, length = documents(rng, number, 1000, occurrences)
        # Of one occurrence the mean value is exp(sigma**2 / 2); lengths average to exp(5.18).
        truth = occurrences * np.exp(1.5**2 / 2) / np.exp(5.18)
        seen = state(values, length)
        found.append([fj.stats.decide(seen, truth, side=side).p for side in ("below", "above")])
        t = (fj.welford.mean(seen) - truth) / fj.welford.standard_error(seen)
        plain.append(scipy.stats.t.cdf(np.asarray(t, float), number - 1))
    below, above = np.moveaxis(np.array(found), 1, 0)
    for level in (0.05, 0.01, 0.002):
        for p in (below[~np.isnan(below)], above[~np.isnan(above)]):
            assert np.mean(p <= level) <= 1.5 * level
    # The usual test claims "below" falsely far more often: the tests above can fail.
    assert np.nanmean(np.array(plain) <= 0.01) > 0.05


def test_pruning_takes_only_what_is_surely_below():
    rng = np.random.default_rng(4)
    scale = np.r_[np.full(30, 0.1), np.full(30, 0.95), np.full(30, 4.0), np.zeros(10)]
    values = rng.gamma(2.0, 0.5, (60, 100)) * scale
    found = fj.stats.prune_below(state(values), 1.0)
    assert not found.mask[:30].any()
    assert found.mask[30:].all()
    assert np.isnan(found.p[90:]).all()
    assert found.num_pruned == 30
    assert found.num_unsure == int((values.mean(0)[30:] < 1).sum())
    assert found.num_unsure > 15


def test_squares_that_underflowed_are_no_certainty():
    values = np.random.default_rng(5).gamma(2.0, 1.0, (20, 2)) * np.array([1.0, 1e-25])
    found = fj.stats.decide(state(values), 10.0)
    assert np.isnan(found.p[1])
    assert found.verdict.tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": 0.0}, "threshold is a positive mean importance, found 0.0"),
        ({"threshold": 1.0, "level": 1.0}, "level is a probability"),
        ({"threshold": 1.0, "control": "bonferroni"}, "control is 'holm', 'bh' or 'none'"),
        ({"threshold": 1.0, "side": "left"}, "side is 'both', 'below' or 'above'"),
    ],
)
def test_bad_settings_are_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fj.stats.decide(state(np.random.default_rng(6).random((3, 2))), **options)

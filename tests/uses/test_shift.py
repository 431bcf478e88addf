"""Shifts are Welch's tests; false discoveries stay where they are said to be, with heavy tails and unequal texts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fisher_jax as fj
from tests.uses.heavy_tails import documents, state


def test_without_a_guard_it_is_welchs_test():
    rng = np.random.default_rng(0)
    a, b = rng.gamma(2.0, 1.0, (30, 8)), rng.gamma(2.0, 1.3, (12, 8))
    found = fj.importance_shift(state(a), state(b), guard=False)
    wanted = scipy.stats.ttest_ind(a, b, equal_var=False)
    np.testing.assert_allclose(found.difference, a.mean(0) - b.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.z, wanted.statistic, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.degrees_of_freedom, wanted.df, rtol=1e-4)
    np.testing.assert_allclose(found.p, wanted.pvalue, rtol=1e-3)
    np.testing.assert_allclose(found.q, scipy.stats.false_discovery_control(found.p), rtol=1e-12)
    np.testing.assert_allclose(found.difference / found.z, found.standard_error, rtol=1e-9)


def test_the_guard_is_students_test_where_that_is_larger():
    rng = np.random.default_rng(0)
    a, b = rng.gamma(2.0, 1.0, (30, 8)), rng.gamma(2.0, 1.3, (12, 8))
    found = fj.importance_shift(state(a), state(b)).p
    both = [scipy.stats.ttest_ind(a, b, equal_var=equal).pvalue for equal in (False, True)]
    np.testing.assert_allclose(found, np.maximum(*both), rtol=1e-3)


def test_documents_of_unequal_length_lower_the_degrees_of_freedom():
    rng = np.random.default_rng(1)
    (a, w_a), (b, w_b) = ((rng.gamma(2.0, 1.0, (30, 8)), rng.lognormal(0, 1, 30)) for _ in range(2))
    found = fj.importance_shift(state(a, w_a), state(b, w_b), guard=False)
    sides = []
    for values, w in ((a, w_a), (b, w_b)):
        mean = w @ values / w.sum()
        square = 30 / 29 * w**2 @ (values - mean) ** 2 / w.sum() ** 2
        sides.append((mean, square, w.sum() ** 2 / (w**2).sum()))
    (m_a, s_a, n_a), (m_b, s_b, n_b) = sides
    freedom = (s_a + s_b) ** 2 / (s_a**2 / (n_a - 1) + s_b**2 / (n_b - 1))
    np.testing.assert_allclose(found.degrees_of_freedom, freedom, rtol=1e-4)
    wanted = 2 * scipy.stats.t.sf(np.abs(m_a - m_b) / np.sqrt(s_a + s_b), freedom)
    np.testing.assert_allclose(found.p, wanted, rtol=1e-3)


def test_the_order_of_the_states_is_the_sign():
    rng = np.random.default_rng(2)
    a, b = (state(rng.gamma(2.0, 1.0, (30, 8))) for _ in range(2))
    one, other = fj.importance_shift(a, b), fj.importance_shift(b, a)
    np.testing.assert_array_equal(one.difference, -other.difference)
    np.testing.assert_array_equal(one.p, other.p)
    np.testing.assert_array_equal(fj.importance_shift(a, a).p, 1)


OCCURRENCES = np.repeat(np.geomspace(0.01, 10, 8), 150)


@pytest.mark.parametrize("sizes", [(60, 60), (100, 15), (6, 6)])
def test_two_halves_of_one_text_have_few_false_discoveries(sizes):
    """Rows from a hundredth of an occurrence in a document to ten, bursty, log-normal: nothing differs."""
    rng = np.random.default_rng(3)
    p, discoveries, welch = [], [], []
    for _ in range(8):
        a, b = (state(*documents(rng, number, len(OCCURRENCES), OCCURRENCES)) for number in sizes)
        found = fj.importance_shift(a, b)
        p.append(found.p)
        discoveries.append(np.nanmin(found.q) <= 0.05)
        plain = fj.importance_shift(a, b, guard=False)
        welch.append(plain.p)
        assert (found.p >= plain.p)[found.testable].all()
    p, welch = (x[~np.isnan(x)] for x in (np.concatenate(p), np.concatenate(welch)))
    for level in (0.2, 0.05, 0.01, 0.001):
        assert np.mean(p <= level) <= 1.25 * level + 0.0005
    assert sum(discoveries) <= 2
    if sizes[0] != sizes[1]:
        # Without the guard this very test fails.
        assert np.mean(welch <= 0.001) > 0.005


def test_p_is_uniform_where_much_was_seen():
    rng = np.random.default_rng(4)
    p = np.concatenate([
        fj.importance_shift(*(state(*documents(rng, 60, 1200, 10.0, burst=0, sigma=0.5)) for _ in range(2))).p
        for _ in range(2)
    ])  # fmt: skip
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.001


def test_what_changed_is_found():
    rng = np.random.default_rng(5)
    occurrences = np.full(1200, 2.0)
    a = state(*documents(rng, 60, 1200, occurrences))
    occurrences[:60] = 20
    b = state(*documents(rng, 60, 1200, occurrences))
    found = fj.importance_shift(a, b)
    claimed = found.q < 0.05
    assert claimed[:60].mean() > 0.5
    assert claimed[60:].sum() <= 0.15 * claimed.sum()
    assert (found.difference[:60][claimed[:60]] < 0).all()


def test_rows_that_were_hardly_seen_are_not_tested_and_not_counted():
    values = np.random.default_rng(6).gamma(2.0, 1.0, (30, 8))
    values[1:, 1], values[4:, 2], values[:, 3], values[:, 4] = 0, 0, 0, values[:, 4] * 1e-25
    found = fj.importance_shift(state(values), state(values[::-1]))
    np.testing.assert_array_equal(found.testable, [1, 0, 1, 0, 0, 1, 1, 1])
    assert (np.isnan(found.p) == ~found.testable).all()
    rng = np.random.default_rng(7)
    other = state(rng.gamma(2.0, 1.0, (30, 8)) * (values.mean(0) > 0))
    found = fj.importance_shift(state(values), other)
    np.testing.assert_allclose(
        found.q[found.testable], scipy.stats.false_discovery_control(found.p[found.testable]), rtol=1e-12
    )


def windows(rng, number, size, scales=None):
    parts = []
    for i in range(number):
        values, length = documents(rng, size, len(OCCURRENCES), OCCURRENCES)
        parts.append(state(values if scales is None else values * scales[i], length))
    return parts


@pytest.mark.parametrize("alternative", ["step", "window"])
def test_a_steady_stream_does_not_drift(alternative):
    rng = np.random.default_rng(8)
    p, discoveries = [], []
    for _ in range(4):
        found = fj.shift.importance_drift(windows(rng, 5, 15), alternative=alternative)
        p.append(found.p)
        discoveries.append(np.nanmin(found.q) <= 0.05)
    p = np.concatenate(p)
    p = p[~np.isnan(p)]
    for level in (0.2, 0.05, 0.01, 0.001):
        assert np.mean(p <= level) <= 1.25 * level + 0.0005
    assert sum(discoveries) <= 1


def test_a_step_is_found_where_it_happened():
    rng = np.random.default_rng(9)
    scales = np.ones((6, 1, 8))
    scales[2:, 0, 0] = 3
    scales[4, 0, 1] = 4
    values = rng.gamma(2.0, 1.0, (6, 30, 8)) * scales
    step = fj.shift.importance_drift([state(x) for x in values])
    window = fj.shift.importance_drift([state(x) for x in values], alternative="window")
    assert (step.change[0], window.change[1]) == (2, 4)
    assert step.q[0] < 1e-6
    assert window.q[1] < 1e-3
    assert (step.q[2:] > 0.01).all()
    assert (window.q[2:] > 0.01).all()
    after, before = values[2:, :, 0].ravel(), values[:2, :, 0].ravel()
    both = [scipy.stats.ttest_ind(after, before, equal_var=equal).pvalue for equal in (False, True)]
    np.testing.assert_allclose(step.p[0], 5 * max(both), rtol=1e-2)
    np.testing.assert_allclose(step.difference[0], after.mean() - before.mean(), rtol=1e-5)


def test_two_windows_are_a_shift():
    rng = np.random.default_rng(10)
    a, b = (state(rng.gamma(2.0, 1.0, (30, 8))) for _ in range(2))
    drift, shift = fj.shift.importance_drift([a, b]), fj.importance_shift(b, a)
    for name in ("difference", "standard_error", "z", "p", "q", "testable"):
        np.testing.assert_allclose(getattr(drift, name), getattr(shift, name), rtol=1e-6)


def good(groups=8, rows=30):
    return state(np.random.default_rng(11).gamma(2.0, 1.0, (rows, groups)))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: fj.importance_shift(good(), good(7)),
            r"array has shape \[8\] in the first state and \[7\] in the sec",
        ),
        (
            lambda: fj.importance_shift(good(), dataclasses.replace(good(), unit="token")),
            "the first state observes by sequence and the second state by token; compare states of one unit",
        ),
        (lambda: fj.importance_shift(good(), good(rows=1)), r"the second state has 1 observation \(unit: sequence\)"),
        (lambda: fj.importance_shift(good(), jnp.ones(8)), "the second state is a Welford state or moments"),
        (lambda: fj.importance_shift(good(), good(), min_effective=99), "no group has 99 effective observations"),
        (lambda: fj.importance_shift(good(), good(), method="by chance"), "method is 'bh' or 'by'"),
        (lambda: fj.shift.importance_drift([good()]), "two or more windows, found 1"),
        (
            lambda: fj.shift.importance_drift([good(), good(7)]),
            r"array has shape \[8\] in window 0 and \[7\] in window 1",
        ),
        (
            lambda: fj.shift.importance_drift([good(), good()], alternative="ramp"),
            "alternative is 'step' or 'window', found 'ramp'",
        ),
    ],
)
def test_states_that_do_not_belong_together_are_refused(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()

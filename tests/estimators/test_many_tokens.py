"""Estimators on as many tokens as real batches have, against loops of ``jax.grad`` compiled apart."""

import jax
import numpy as np
import pytest

import fisher_jax as fj
from tests.oracle_loops import case, close, label_scores, only, scores

pytestmark = pytest.mark.optimized
KEY = jax.random.key(5)


def weighted(w, values):
    return np.tensordot(w, values, 1)


def mean_of(of, batch, key=None, **options):
    fisher = fj.group_fisher(of.apply, **options)
    return fj.welford.mean(jax.jit(fisher.observe)(of.params, batch, key))


@pytest.mark.parametrize(("rows", "length"), [(16, 32), (32, 32), (8, 128)])
def test_exact_is_a_loop_over_tokens(rows, length):
    """The mean of squares and their squared deviations, of every single parameter."""
    apply, params, batch, _ = of = case(rows, length)
    fisher = fj.group_fisher(apply, estimator="exact")
    found = jax.jit(fisher.observe)(params, batch)
    w, squares = of.weights, jax.tree.map(np.square, scores(rows, length))
    mean = jax.tree.map(lambda f: weighted(w, f) / w.sum(), squares)
    variance = jax.tree.map(lambda f, m: weighted(w, (f - m) ** 2) / (w.sum() - 1), squares, mean)
    close(fj.welford.mean(found), mean)
    close(fj.welford.variance(found, "frequency"), variance, 1e-3)


def test_the_exact_true_fisher_is_a_loop_over_tokens_and_labels():
    of = case(16, 32, vocabulary=8)
    every, p = label_scores(of, of.counted[3])
    found = mean_of(of, only(of, [3]), estimator="exact", kind="true")
    close(found, jax.tree.map(lambda s: weighted(p, s**2), every))


def test_sequence_is_a_loop_over_rows():
    of = case(32, 32)
    rows = of.counted // 32
    sums = jax.tree.map(
        lambda s: np.stack([weighted(of.weights[rows == r], s[rows == r]) for r in set(rows)]), scores(32, 32)
    )
    found = mean_of(of, of.batch, estimator="sequence")
    close(found, jax.tree.map(lambda s: (s**2).sum(0) / of.weights.sum(), sums))


def one_of_each_row(of, length):
    return np.unique(of.counted // length, return_index=True)[1]


def test_signs_of_rows_with_one_token_are_its_squares():
    of = case(32, 32)
    kept = one_of_each_row(of, 32)
    found = mean_of(of, only(of, kept), KEY, estimator="signs", unit="sequence", num_samples=2)
    close(found, jax.tree.map(lambda s: (s[kept] ** 2).mean(0), scores(32, 32)))


def test_several_samples_of_one_token_average_squares_of_its_labels():
    of = case(32, 32, vocabulary=8)
    every, _ = label_scores(of, of.counted[3])
    squares = jax.tree.map(np.square, every)
    found = mean_of(of, only(of, [3]), KEY, estimator="sampled", unit="sequence", num_samples=2)
    error = sum(
        np.abs(np.asarray(x) - (f[:, None] + f[None]) / 2).sum(axis=tuple(range(2, f.ndim + 1))) / np.abs(f).sum()
        for x, f in zip(jax.tree.leaves(found), jax.tree.leaves(squares), strict=True)
    )
    first, second = np.unravel_index(np.argmin(error), error.shape)
    close(found, jax.tree.map(lambda f: (f[first] + f[second]) / 2, squares))


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_the_head_in_closed_form_is_a_loop(kind):
    of = case(32, 32)
    if kind == "empirical":
        batch, w, s = of.batch, of.weights, scores(32, 32)["head"]
    else:
        s, w = label_scores(of, of.counted[3])
        batch, s = only(of, [3]), s["head"]
    found = mean_of(of, batch, estimator="head", kind=kind, groups=fj.groups.param, example=batch)
    close(found["head"], weighted(w, s**2) / w.sum())

"""Estimators on as many tokens as real batches have, against loops of ``jax.grad`` compiled apart."""

import jax
import numpy as np
import pytest

import fisher_jax as fj
from tests.oracle_loops import case, close, scores


def weighted(w, values):
    return np.tensordot(w, values, 1)


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

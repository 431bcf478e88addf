"""Products with curvature and Lanczos on 1,024 tokens, against loops of ``jax.grad`` compiled apart."""

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import fisher_jax as fj
from tests.oracle_loops import case, close, label_scores, only, scores


def flat(tree):
    return np.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(tree)], 1)


def vector(params):
    size, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(jax.random.key(3), size.shape))


def test_the_empirical_fisher_and_its_largest_eigenvalues_are_those_of_a_loop():
    of = case()
    matvec = fj.operators.empirical_fisher(of.apply, fj.categorical, of.params, of.batch)
    x = np.sqrt(of.weights / of.weights.sum())[:, None] * flat(scores())
    v = vector(of.params)
    found = np.asarray(ravel_pytree(jax.jit(lambda m, v: m(v))(matvec, v))[0], np.float64)
    wanted = x.T @ (x @ np.asarray(ravel_pytree(v)[0], np.float64))
    close(found, wanted)
    found = fj.lanczos(matvec, of.params, num_steps=20, num_eigenvalues=2, key=jax.random.key(0), verify=False)
    wanted = np.linalg.svd(x, compute_uv=False)[:2] ** 2
    np.testing.assert_allclose(found.eigenvalues[:2], wanted, rtol=1e-3)


def test_the_fisher_is_that_of_a_loop_over_labels_in_micro_batches_too():
    of = case()
    s, p = label_scores(of, of.counted[3])
    x = np.sqrt(p)[:, None] * flat(s)
    v = vector(of.params)
    wanted = x.T @ (x @ np.asarray(ravel_pytree(v)[0], np.float64))
    for options in ({}, {"microbatch_size": 8}):
        matvec = fj.operators.fisher(of.apply, fj.categorical, of.params, only(of, [3]), **options)
        found = jax.jit(lambda m, v: m(v))(matvec, v)
        close(np.asarray(ravel_pytree(found)[0]), wanted)


def test_trace_and_density_are_those_of_a_loop():
    """24 tokens have a loss, so that a range of 24 holds everything and a probe's nodes are all eigenvalues."""
    of = case()
    matvec = fj.operators.empirical_fisher(of.apply, fj.categorical, of.params, of.batch)
    x = np.sqrt(of.weights / of.weights.sum())[:, None] * flat(scores())
    wanted = np.linalg.svd(x, compute_uv=False) ** 2
    found = fj.spectra.trace(matvec, of.params, num_products=3 * len(wanted) + 6, key=jax.random.key(1))
    assert abs(found.value / wanted.sum() - 1) < 1e-4
    found = fj.spectral_density(matvec, of.params, num_steps=len(wanted) + 4, num_probes=4, key=jax.random.key(2))
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        large = np.sort(nodes[weights > 0])[::-1][:3]
        np.testing.assert_allclose(large, wanted[:3], rtol=1e-3)
    mean = wanted.sum() / x.shape[1]
    assert found.mean_error < 0.2 * mean
    assert abs(found.mean - mean) < 5 * found.mean_error

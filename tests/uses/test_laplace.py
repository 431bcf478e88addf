"""Laplace posteriors against dense Gaussians in float64: covariances, roots, determinants, evidence, outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisher_jax as fj
from tests.operators.test_kfac_operator import apply_fn, factors_of

WEIGHT, PRIOR = 700.0, 3.0
CURVATURES = {
    "kfac": {"policy": "never"},
    "corrected": {"policy": "never", "eigenvalue_correction": True},
    "columns": {"policy": "all"},
}


def columns(function, params):
    """The dense matrix of a linear function of trees like the parameters."""
    flat, unravel = ravel_pytree(params)
    return np.stack([ravel_pytree(function(unravel(e)))[0] for e in jnp.eye(flat.size, dtype=flat.dtype)], 1)


@functools.cache
def problem(choice, tied=False):
    """Parameters, a batch, a posterior and its dense precision."""
    with jax.enable_x64(True):
        params, batch, factors = factors_of(tied, **CURVATURES.get(choice, CURVATURES["kfac"]))
        if choice == "diagonal":
            curvature = jax.tree.map(lambda x: jnp.cos(x) ** 2, params)
            C = np.diag(ravel_pytree(curvature)[0])
        else:
            curvature = factors
            C = columns(jax.jit(fj.operators.kfac(factors)), params)
        posterior = fj.laplace(params, curvature, weight=WEIGHT, prior_precision=PRIOR)
    return params, batch, posterior, WEIGHT * C + PRIOR * np.eye(len(C))


@pytest.mark.parametrize("choice", [*CURVATURES, "diagonal"])
def test_covariance_and_determinant_are_those_of_the_dense_gaussian(choice):
    params, _, posterior, precision = problem(choice)
    with jax.enable_x64(True):
        covariance = columns(jax.jit(posterior.covariance), params)
        root = columns(jax.jit(posterior.sqrt_covariance), params)
        determinant = posterior.log_determinant()
        evidence = posterior.log_marginal_likelihood(-50.0)
        mean = np.asarray(ravel_pytree(params)[0])
    wanted = np.linalg.inv(precision)
    np.testing.assert_allclose(covariance, wanted, atol=1e-10 * np.abs(wanted).max())
    np.testing.assert_allclose(root @ root.T, wanted, atol=1e-10 * np.abs(wanted).max())
    np.testing.assert_allclose(determinant, np.linalg.slogdet(precision)[1], rtol=1e-10)
    evidence_wanted = (
        -50 - PRIOR / 2 * mean @ mean + (len(mean) * np.log(PRIOR) - np.linalg.slogdet(precision)[1]) / 2
    )
    np.testing.assert_allclose(evidence, evidence_wanted, rtol=1e-10)


@pytest.mark.parametrize("choice", ["kfac", "diagonal"])
def test_outputs_vary_as_the_linearised_model_does(choice):
    params, batch, posterior, precision = problem(choice)
    with jax.enable_x64(True):
        found = posterior.predictive_covariance(apply_fn, batch.inputs)
        flat, unravel = ravel_pytree(params)
        jacobian = np.asarray(jax.jacrev(lambda x: apply_fn(unravel(x), batch.inputs))(flat))
    wanted = np.einsum("tkp,pq,tlq->tkl", jacobian, np.linalg.inv(precision), jacobian)
    np.testing.assert_allclose(found, wanted, atol=1e-10 * np.abs(wanted).max())


def test_samples_have_the_mean_and_the_covariance():
    params, _, posterior, precision = problem("kfac")
    with jax.enable_x64(True):
        drawn = jax.vmap(posterior.sample)(jax.random.split(jax.random.key(0), 20_000))
        flat = np.concatenate([np.asarray(x).reshape(20_000, -1) for x in jax.tree.leaves(drawn)], 1)
        mean = np.asarray(ravel_pytree(params)[0])
    wanted = np.linalg.inv(precision)
    deviation = np.sqrt(np.diag(wanted))
    assert np.abs((flat.mean(0) - mean) / deviation).max() < 5 / np.sqrt(20_000)
    scaled = np.cov(flat.T) / np.outer(deviation, deviation)
    assert np.abs(scaled - wanted / np.outer(deviation, deviation)).max() < 6 * np.sqrt(2 / 20_000)


def test_the_evidence_of_a_linear_model_is_exact():
    """Least squares with one output: the Gaussian is the posterior, and its evidence a closed form."""
    rng = np.random.default_rng(0)
    x, y, prior = rng.standard_normal((30, 4)), rng.standard_normal((30, 1)), 0.7
    with jax.enable_x64(True):
        mean = jnp.asarray(np.linalg.solve(x.T @ x + prior * np.eye(4), x.T @ y))
        batch = fj.Batch(jnp.asarray(x), jnp.asarray(y))

        def model(kernel, x):
            return x @ kernel

        factors = fj.kfac_factors(model, fj.gaussian, mean, batch, curvature=fj.Curvature(estimator="ggn"))
        posterior = fj.laplace(mean, factors, weight=30.0, prior_precision=prior)
        found = posterior.log_marginal_likelihood(fj.gaussian.log_prob(x @ mean, batch.targets).sum())
    covariance = np.eye(30) + x @ x.T / prior
    wanted = -(y.T @ np.linalg.solve(covariance, y)).item() / 2 - np.linalg.slogdet(2 * np.pi * covariance)[1] / 2
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_what_does_not_fit_or_has_no_root_raises_a_sentence():
    params, batch, posterior, _ = problem("columns", tied=True)
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match="power"):
            posterior.sample(jax.random.key(0))
        for options, named in (
            ({"weight": 0.0}, "weight"),
            ({"prior_precision": -1.0}, "prior_precision"),
            ({"weight": jnp.ones(2)}, "weight"),
        ):
            with pytest.raises(ValueError, match=named):
                fj.laplace(params, posterior.curvature, **{"weight": 1.0, "prior_precision": 1.0, **options})
        diagonal = jax.tree.map(jnp.ones_like, params)
        for change, named in (
            ({"embed": -diagonal["embed"]}, "negative"), ({"scale": jnp.ones(2)}, "scale"), ({"bias": None}, "bias"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=named):
                fj.laplace(params, diagonal | change, weight=1.0, prior_precision=1.0)

        def linked(params, inputs):
            outputs = apply_fn(params, inputs)
            return outputs - outputs.mean(0)

        with pytest.raises(ValueError, match="row"):
            posterior.predictive_covariance(linked, batch.inputs)
    assert len(repr(posterior)) < 500

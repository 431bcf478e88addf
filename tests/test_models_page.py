"""The recipes of ``docs/models.md``, and that errors say them."""

import importlib.util
import pathlib
import re
import sys

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fisher_jax as fj

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "models.md").read_text()
BLOCKS = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
NEEDS = {"haiku": "haiku", "penzai": "penzai", "Keras": "keras"}
BATCH = fj.Batch(jnp.ones((4, 3)), jnp.zeros(4, int))


@pytest.mark.parametrize("library", BLOCKS)
def test_recipes_run(library):
    """Those of packages that are no dependency of the tests run where these are installed."""
    if library in NEEDS and importlib.util.find_spec(NEEDS[library]) is None:
        assert NEEDS[library] not in sys.modules
        return
    exec(compile(BLOCKS[library], library, "exec"), {"__name__": library})


def assert_refused(match, apply_fn, params, not_run=()):
    """By every way into the library but those that do not run the model."""
    ways = {
        "kfac": lambda: fj.kfac_factors(apply_fn, fj.categorical, params, BATCH),
        "coverage": lambda: fj.kfac_tools.kfac_coverage(apply_fn, fj.categorical, params, BATCH),
        "ggn": lambda: fj.operators.ggn(apply_fn, fj.categorical, params, BATCH),
    }
    for estimator in ("exact", "sequence", "signs", "head"):
        fisher = fj.group_fisher(apply_fn, estimator=estimator, example=BATCH)
        ways[estimator] = lambda fisher=fisher: fisher.observe(params, BATCH, jax.random.key(0))
        ways[f"init of {estimator}"] = lambda fisher=fisher: fisher.init(params)
    for name in ways.keys() - set(not_run):
        with pytest.raises(ValueError, match=match):
            ways[name]()


NOT_RUN = ("init of exact", "init of sequence", "init of signs")


def test_a_module_that_holds_functions_is_to_be_split():
    module = equinox.nn.MLP(3, 2, 4, depth=1, key=jax.random.key(0))
    match = r"parameter \.activation is of type .* equinox\.partition\(.*nnx\.split"
    assert_refused(match, lambda p, x: jax.vmap(p)(x), module)


class Norms(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(self.norm(self.first(x))))


def test_state_that_a_module_changes_is_to_be_copied():
    graph, params, rest = nnx.split(Norms(nnx.Rngs(0)), nnx.Param, ...)
    assert_refused(
        r"nnx\.merge\(graph, params, rest, copy=True\)", lambda p, x: nnx.merge(graph, p, rest)(x), params, NOT_RUN
    )


def test_outputs_and_a_new_state_are_not_one_array():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=False)(x))

    model = Model()
    variables = model.init(jax.random.key(0), BATCH.inputs)
    assert_refused(
        r"found tuple: of outputs and a new state .* return the outputs alone",
        lambda p, x: model.apply(p, x, mutable=["batch_stats"]),
        variables,
        NOT_RUN,
    )


def test_running_statistics_are_no_parameters():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(x))

    model = Model()
    variables = model.init(jax.random.key(0), BATCH.inputs)
    with pytest.raises(ValueError, match=r"\['batch_stats'\].*running statistics.*no parameters.*docs/models\.md"):
        fj.kfac_factors(model.apply, fj.categorical, variables, BATCH)


def laplace(outputs, targets):
    return -jnp.abs(targets - outputs).sum(-1)


def test_a_likelihood_needs_what_is_used():
    own = fj.Likelihood("laplace", laplace)
    params, targets = jnp.ones((3, 2)), jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    batch = fj.Batch(BATCH.inputs, targets)

    def apply_fn(p, x):
        return x @ p

    for estimator in ("exact", "sequence", "signs"):
        fisher = fj.group_fisher(apply_fn, own, estimator=estimator)
        assert float(fisher.observe(params, batch, jax.random.key(0)).weight) == 4
    fj.kfac_factors(apply_fn, own, params, batch, curvature=fj.Curvature(estimator="empirical"))
    fj.operators.empirical_fisher(apply_fn, own, params, batch)
    fj.operators.hessian(apply_fn, own, params, batch)
    bad = fj.Batch(BATCH.inputs, targets.at[0, 0].set(jnp.nan))
    assert int(fj.group_fisher(apply_fn, own, estimator="exact").observe(params, bad).rejected) == 1
    with pytest.raises(ValueError, match=r"needs the likelihood's sample\(.*fj\.Likelihood\(\.\.\., sample=\)"):
        fj.group_fisher(apply_fn, own, estimator="sampled").observe(params, batch, jax.random.key(0))
    with pytest.raises(ValueError, match=r"needs the likelihood's fisher_factor\("):
        fj.group_fisher(apply_fn, own, estimator="exact", kind="true").observe(params, batch)
    with pytest.raises(ValueError, match=r"needs the likelihood's fisher_product\("):
        fj.operators.ggn(apply_fn, own, params, batch)(params)


def test_mean_and_scale_of_a_policy():
    """Log-likelihood against scipy's, and the true Fisher against the mean of many draws' outer products."""
    scipy = pytest.importorskip("scipy.stats")
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        outputs, targets = rng.normal(size=(5, 4)), rng.normal(size=(5, 2))
        found = fj.gaussian_with_scale.log_prob(jnp.asarray(outputs), jnp.asarray(targets))
        wanted = scipy.norm(outputs[:, :2], np.exp(outputs[:, 2:])).logpdf(targets).sum(1)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        z = jnp.asarray(outputs[0])
        # The Fisher is minus the mean second derivative, here by Gauss-Hermite points, which are exact.
        x, w = np.polynomial.hermite_e.hermegauss(5)
        points = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
        weights = np.outer(w, w).ravel() / np.sum(np.outer(w, w))
        hessian = jax.vmap(jax.hessian(fj.gaussian_with_scale.log_prob), (None, 0))
        fisher = -np.einsum("n,nij->ij", weights, hessian(z, z[:2] + jnp.exp(z[2:]) * points))
        product = jax.vmap(lambda v: fj.gaussian_with_scale.fisher_product(z, v))(jnp.eye(4))
        np.testing.assert_allclose(product, fisher, atol=1e-12)
        factor = np.stack([fj.gaussian_with_scale.fisher_factor(z, k) for k in range(4)], 1)
        np.testing.assert_allclose(factor @ factor.T, fisher, atol=1e-12)
        draws = fj.gaussian_with_scale.sample(jax.random.key(0), jnp.broadcast_to(z, (20000, 4)), 4.0)
        np.testing.assert_allclose(draws.mean(0), z[:2], atol=0.05 * float(jnp.exp(z[2:]).max()))
        np.testing.assert_allclose(draws.std(0), 2 * jnp.exp(z[2:]), rtol=0.03)
    batch = fj.Batch(BATCH.inputs, jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"half as many numbers as the outputs, shape \[4, 2\], found \[4, 3\]"):
        fj.group_fisher(lambda p, x: x @ p, fj.gaussian_with_scale, estimator="exact").observe(
            jnp.ones((3, 4)), batch
        )


def test_outputs_of_two_arrays_are_to_be_put_side_by_side():
    fisher = fj.group_fisher(lambda p, x: (x @ p, x @ p), fj.gaussian_with_scale, estimator="exact")
    with pytest.raises(ValueError, match=r"found tuple.*jnp\.concatenate.*fj\.gaussian_with_scale"):
        fisher.observe(jnp.ones((3, 2)), BATCH)

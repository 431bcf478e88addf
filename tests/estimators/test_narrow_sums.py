"""bfloat16 parameters that many tokens share: their gradients are sums in float32, by lookups and by loops.

A sum of 256 ones in bfloat16 takes no further one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

TOKENS = 600


def lookup(params, tokens):
    return params["embed"][tokens] @ params["head"]


def loop(params, tokens):
    """A loop over positions that share a table, a kernel and a bias."""

    def step(h, token):
        x = params["embed"][token] + h @ params["kernel"] + params["bias"]
        return 0.1 * jnp.tanh(x), x

    def row(tokens):
        return jax.lax.scan(step, jnp.zeros(4, params["embed"].dtype), tokens)[1]

    return jax.vmap(row)(tokens) @ params["head"]


MODELS = {"lookup": lookup, "loop": loop}


@functools.cache
def problem(model):
    """Narrow parameters and a batch in which one token fills a row."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (3, 4), "head": (4, 5)} | ({"kernel": (4, 4), "bias": (4,)} if model == "loop" else {})
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for name, shape in shapes.items()}
    targets = jnp.arange(TOKENS)[None] % 2
    return params, fj.Batch(jnp.zeros((1, TOKENS), jnp.int32), targets)


def near(model, found):
    """The same of the parameters in float32, whose values are the same."""
    params, batch = problem(model)
    narrow = found(MODELS[model], params, batch)
    wide = found(MODELS[model], jax.tree.map(lambda x: x.astype(jnp.float32), params), batch)
    for name, x in jax.tree.map(np.float32, narrow).items():
        np.testing.assert_allclose(x, wide[name], atol=0.03 * np.abs(wide[name]).max(), err_msg=name)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("estimator", ["sequence", "signs"])
def test_scores_of_rows(model, estimator):
    def found(apply_fn, params, batch):
        fisher = fj.group_fisher(apply_fn, estimator=estimator, unit="sequence", example=batch)
        return fj.mean(fisher.observe(params, batch, jax.random.key(0)))

    near(model, found)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher", "hessian"])
def test_products(model, kind):
    def found(apply_fn, params, batch):
        return getattr(fj.operators, kind)(apply_fn, fj.categorical, params, batch)(jax.tree.map(jnp.cos, params))

    near(model, found)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_beside_taps_and_from_them(model):
    def gradients(rebuilt, apply_fn, params, batch):
        def loss(params, batch):
            return -fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets).mean()

        _, grads, taps = fj.value_grad_and_taps(loss)(params, batch)
        return fj.gradients_from_taps(taps, params) if rebuilt else grads

    near(model, functools.partial(gradients, False))
    near(model, functools.partial(gradients, True))


def test_scores_of_block_spectra():
    def found(apply_fn, params, batch):
        spectra = fj.block_spectrum(apply_fn, fj.categorical, params, batch, unit="sequence", top_k=1)
        return {name: one.eigenvalues for name, one in spectra.items()}

    near("lookup", found)

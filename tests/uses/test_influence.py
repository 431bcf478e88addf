"""Influence of tokens on a query: the dense formula in float64, and what retraining with other weights does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisher_jax as fj
from tests import oracle_curvature

V, H, B, S = 5, 3, 4, 6
DAMPING = 1e-2


def tied(params, tokens):
    """Positions mix, and the embedding is the head."""
    x = params["embed"][tokens]
    x = x + jnp.cumsum(jnp.tanh(x @ params["mix"] + params["bias"]), 1) / 3
    return x @ params["embed"].T


def untied(params, tokens):
    x = params["embed"][tokens]
    return jnp.tanh(x @ params["mix"] + params["bias"]) @ params["head"]


MODELS = {"tied": tied, "untied": untied}


@functools.cache
def problem(model):
    rng = np.random.default_rng(0)
    shapes = {"embed": (V, H), "mix": (H, H), "bias": (H,)} | ({"head": (H, V)} if model == "untied" else {})
    with jax.enable_x64(True):
        params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
        tokens, targets = (rng.integers(0, V, (B, S)) for _ in range(2))
        weights = rng.integers(0, 3, (B, S)) * 0.5
        text = fj.Batch(jnp.asarray(tokens), jnp.asarray(targets), jnp.asarray(weights))
        query = fj.Batch(jnp.asarray(tokens[:1, ::-1]), jnp.asarray(targets[1:2]))
    return params, text, query


def single(model):
    """The same in 32 bits."""

    def cast(x):
        return jnp.asarray(np.asarray(x), jnp.float32 if np.issubdtype(x.dtype, np.floating) else jnp.int32)

    return jax.tree.map(cast, problem(model))


def scores(model, params, batch):
    return oracle_curvature.scores(MODELS[model], "categorical", params, batch.inputs, jnp.asarray(batch.targets))


def direction_of(model, params, text, query, **options):
    matvec = fj.operators.ggn(MODELS[model], fj.categorical, params, text)
    gradient = fj.operators.gradient(MODELS[model], fj.categorical, params, query)
    return fj.solve(matvec, gradient, damping=DAMPING, **options)


@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_dense_formula(model):
    params, text, query = problem(model)
    with jax.enable_x64(True):
        C = oracle_curvature.dense(
            "ggn", MODELS[model], "categorical", params, text.inputs, text.targets, text.weights
        )
        s, g = scores(model, params, text), -scores(model, params, query).mean(0)
        wanted = np.asarray(text.weights) * (s @ np.linalg.solve(C + DAMPING * np.eye(len(C)), g)).reshape(B, S)
        direction = direction_of(model, params, text, query, rtol=1e-13)
        found = fj.influence(MODELS[model], fj.categorical, params, text, direction)
        several = jax.tree.map(lambda x: jnp.stack([x, -2 * x]), direction.x)
        both = fj.influence(MODELS[model], fj.categorical, params, text, several, several=True)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-8 * np.abs(wanted).max())
    np.testing.assert_allclose(both, [wanted, -2 * wanted], atol=1e-8 * np.abs(wanted).max())


def test_the_gradient_is_that_of_the_mean_loss():
    params, text, _ = problem("tied")
    with jax.enable_x64(True):
        found = ravel_pytree(fj.operators.gradient(tied, fj.categorical, params, text))[0]
        weights = np.asarray(text.weights).ravel()
        np.testing.assert_allclose(found, -weights @ scores("tied", params, text) / weights.sum(), rtol=1e-10)


def test_what_has_no_weight_is_not_read():
    params, text, query = single("untied")
    direction = direction_of("untied", params, text, query)
    wanted = fj.influence(untied, fj.categorical, params, text, direction)
    spoiled = dataclasses.replace(text, targets=jnp.where(text.weights > 0, text.targets, 99))
    found = fj.influence(untied, fj.categorical, params, spoiled, direction)
    np.testing.assert_array_equal(found, wanted)
    assert not np.asarray(found)[np.asarray(text.weights) == 0].any()


def test_leaves_without_a_direction_stand_still():
    params, text, query = single("untied")
    full = fj.operators.gradient(untied, fj.categorical, params, query)
    some = fj.operators.gradient(untied, fj.categorical, params, query, parameters="mix|bias")
    zeros = {name: x if name in ("mix", "bias") else jnp.zeros_like(x) for name, x in full.items()}
    found = fj.influence(untied, fj.categorical, params, text, some)
    wanted = fj.influence(untied, fj.categorical, params, text, zeros)
    assert some["embed"] is None
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_it_predicts_training_again_with_other_weights():
    """A softmax regression at its minimum: the query's loss after one document has the weight 1 + eps."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x, labels = jnp.asarray(rng.standard_normal((6, 4, 3))), jnp.asarray(rng.integers(0, 3, (6, 4)))
        weights = jnp.asarray(rng.integers(1, 3, (6, 4)) * 0.5)
        text = fj.Batch(x, labels, weights)
        query = fj.Batch(jnp.asarray(rng.standard_normal((2, 4, 3))), jnp.asarray(rng.integers(0, 3, (2, 4))))
        total = weights.sum()

        def model(kernel, x):
            return x @ kernel

        def objective(kernel, weights):
            picked = jnp.take_along_axis(jax.nn.log_softmax(x @ kernel), labels[..., None], -1)[..., 0]
            return -jnp.sum(weights * picked) / total + DAMPING / 2 * jnp.sum(kernel**2)

        @jax.jit
        def trained(weights):
            def newton(_, kernel):
                gradient = jax.grad(objective)(kernel, weights).ravel()
                hessian = jax.hessian(objective)(kernel, weights).reshape(9, 9)
                return kernel - jnp.linalg.solve(hessian, gradient).reshape(3, 3)

            return jax.lax.fori_loop(0, 20, newton, jnp.zeros((3, 3)))

        def query_loss(kernel):
            logits = jax.nn.log_softmax(query.inputs @ kernel)
            return -jnp.mean(jnp.take_along_axis(logits, query.targets[..., None], -1))

        kernel = trained(weights)
        matvec = fj.operators.ggn(model, fj.categorical, kernel, text)
        gradient = fj.operators.gradient(model, fj.categorical, kernel, query)
        direction = fj.solve(matvec, gradient, damping=DAMPING, rtol=1e-12)
        found = fj.influence(model, fj.categorical, kernel, text, direction).sum(1)
        eps = 1e-5
        changes = []
        for document in range(6):
            more, less = (weights.at[document].multiply(1 + sign * eps) for sign in (1, -1))
            changes.append((query_loss(trained(more)) - query_loss(trained(less))) / (2 * eps))
        np.testing.assert_allclose(found / fj.operators.total_weight(matvec), changes, rtol=1e-6)
        assert (np.asarray(found) < 0).any()
        assert (np.asarray(found) > 0).any()


def test_what_does_not_fit_raises_and_what_values_show_is_nan():
    params, text, query = single("untied")
    direction = fj.operators.gradient(untied, fj.categorical, params, query)
    with pytest.raises(ValueError, match="mix"):
        fj.influence(untied, fj.categorical, params, text, direction | {"mix": jnp.ones(2)})
    with pytest.raises(ValueError, match="structure"):
        fj.influence(untied, fj.categorical, params, text, direction | {"other": jnp.ones(2)})
    with pytest.raises(ValueError, match="leading axis"):
        fj.influence(untied, fj.categorical, params, text, direction, several=True)
    with pytest.raises(fj.RejectedBatchError):
        fj.influence(
            untied, fj.categorical, params, dataclasses.replace(text, targets=jnp.full((B, S), V)), direction
        )
    inside = jax.jit(lambda text: fj.influence(untied, fj.categorical, params, text, direction))
    assert np.isnan(inside(dataclasses.replace(text, weights=-jnp.ones((B, S))))).all()

"""The defaults train what a newcomer tries first: models of a few rows, whose factors are of low rank."""

import inspect

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_jax as fj

STEPS = 200


def draw(*shape, seed=0):
    scale = np.prod(shape[:-1]) ** -0.5
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) * scale, jnp.float32)


def data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def labels(classes, *shape):
    return jnp.asarray(np.random.default_rng(shape).integers(0, classes, shape))


def mlp(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["o"] + params["c"]


def layers(inputs, width, outputs):
    zeros = jnp.zeros
    return {"w": draw(inputs, width), "b": zeros(width), "o": draw(width, outputs, seed=1), "c": zeros(outputs)}


def linear(params, x):
    return x @ params["w"] + params["b"]


def decoder(params, tokens):
    def norm(x, scale):
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    length = tokens.shape[1]
    hidden = params["embed"][tokens] + params["places"][None, :length]
    normed = norm(hidden, params["first"])
    q, k, v = (normed @ params[name] for name in "qkv")
    seen = jnp.where(jnp.tril(jnp.ones((length, length), bool)), jnp.einsum("bsd,btd->bst", q, k), -1e9)
    hidden += jax.nn.softmax(seen / 8**0.5) @ v @ params["o"]
    hidden += jax.nn.relu(norm(hidden, params["second"]) @ params["up"]) @ params["down"]
    return norm(hidden, params["third"]) @ params["head"]


DECODER = {
    "embed": draw(11, 8), "places": draw(6, 8), **{x: jnp.ones(8) for x in ("first", "second", "third")},
    **{name: draw(8, 8, seed=i) for i, name in enumerate("qkvo")},
    "up": draw(8, 16), "down": draw(16, 8), "head": draw(8, 11),
}  # fmt: skip


def convnet(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=numbers) + params["a"]
    return jax.nn.relu(y).mean((1, 2)) @ params["w"] + params["b"]


def recurrent(params, x):
    def step(state, x):
        state = jnp.tanh(x @ params["w"] + state @ params["u"] + params["b"])
        return state, state

    _, states = jax.lax.scan(step, jnp.zeros((x.shape[0], 6)), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(states, 0, 1) @ params["o"] + params["c"]


RECURRENT = layers(3, 6, 2) | {"u": draw(6, 6, seed=2)}
CONVNET = {"k": draw(3, 3, 2, 4), "a": jnp.zeros(4), "w": draw(4, 3), "b": jnp.zeros(3)}
CLASSES = jnp.array([0, 1, 2, 0, 1])
LINEAR = {"w": jnp.zeros((20, 2)), "b": jnp.zeros(2)}
CASES = {
    "regression": (mlp, fj.gaussian, layers(4, 8, 1), fj.Batch(data(6, 4), 3 * data(6, 1))),
    "decoder": (decoder, fj.categorical, DECODER, fj.next_token_batch(labels(11, 2, 7))),
    "convnet": (convnet, fj.categorical, CONVNET, fj.Batch(data(4, 6, 6, 2), jnp.array([0, 1, 2, 0]))),
    "recurrent": (recurrent, fj.gaussian, RECURRENT, fj.Batch(data(3, 5, 3), data(3, 5, 2))),
    "logistic": (linear, fj.categorical, LINEAR, fj.Batch(data(12, 20), labels(2, 12))),
    "one row many times": (mlp, fj.categorical, layers(4, 8, 3), fj.Batch(jnp.tile(data(1, 4), (5, 1)), CLASSES)),
    "more features than rows": (mlp, fj.gaussian, layers(30, 8, 2), fj.Batch(2 * data(3, 30), data(3, 2))),
    "inputs of zero": (mlp, fj.categorical, layers(4, 8, 3), fj.Batch(jnp.zeros((5, 4)), CLASSES)),
}  # fmt: skip


def losses(apply_fn, likelihood, params, batch, make):
    """Before each of the steps of ``make(damping)`` at a small and at the default damping, and the last states."""

    def loss(params):
        found = likelihood.log_prob(apply_fn(params, batch.inputs), batch.targets)
        return -jnp.average(found, weights=batch.weights)

    def run(damping):
        tx = make(damping)

        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params, batch=batch, key=key)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(0), STEPS)
        (_, state), values = jax.lax.scan(step, (params, tx.init(params)), keys)
        return values, state

    values, state = jax.jit(jax.vmap(run))(jnp.array([1e-3, 1e-2]))
    return np.asarray(values), state


@pytest.mark.parametrize("name", CASES)
def test_the_readme_trains_a_small_model(name):
    apply_fn, likelihood, _, batch = CASES[name]
    given = inspect.signature(fj.scale_by_kfac).parameters
    assert (given["damping"].default, given["kl_clip"].default) == (1e-2, "auto")

    def make(damping):
        return optax.chain(
            fj.scale_by_kfac(apply_fn, likelihood, example=batch, damping=damping),
            optax.trace(0.9),
            optax.scale_by_learning_rate(0.1),
        )

    values, state = losses(*CASES[name], make)
    assert np.isfinite(values).all()
    little, default = values
    assert default[-20:].mean() < 0.97 * default[0]
    assert default.max() < 1.5 * default[0]
    assert little.max() < 20 * little[0]
    fj.check(state)


def test_a_step_is_the_natural_gradient_shortened_to_its_predicted_divergence():
    apply_fn, likelihood, params, batch = CASES["regression"]

    def loss(params):
        return -likelihood.log_prob(apply_fn(params, batch.inputs), batch.targets).mean()

    grads = jax.grad(loss)(params)
    natural = fj.precondition(fj.kfac_factors(apply_fn, likelihood, params, batch, damping=0.1), grads)

    def step(**options):
        tx = fj.scale_by_kfac(apply_fn, likelihood, example=batch, damping=0.1, **options)
        return jax.flatten_util.ravel_pytree(tx.update(grads, tx.init(params), params, batch=batch)[0])[0]

    x, g = (np.asarray(jax.flatten_util.ravel_pytree(t)[0], np.float64) for t in (natural, grads))
    np.testing.assert_allclose(step(kl_clip=None), x, rtol=1e-3, atol=1e-3 * np.abs(x).max())
    np.testing.assert_allclose(step(kl_clip=1e3), x, rtol=1e-3, atol=1e-3 * np.abs(x).max())
    short = x * np.sqrt(2 * 1e-3 / (x @ g))
    np.testing.assert_allclose(step(), short, rtol=1e-3, atol=1e-3 * np.abs(short).max())

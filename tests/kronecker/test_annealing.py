"""How `fj.kfac` shortens its steps against the noise of batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_jax as fj


def line(params, x):
    return x @ params["w"]


def optimizer(batch, **options):
    return fj.kfac(
        line,
        fj.gaussian,
        example=batch,
        curvature=fj.Curvature(estimator="ggn"),
        refresh=fj.Refresh(period=1),
        step=fj.Adaptive(**options),
    )


def loss(params, batch):
    return -fj.gaussian.log_prob(line(params, batch.inputs), batch.targets).mean()


def stream(steps, rows, noise):
    """Rows of one linear model with eight inputs and noisy targets."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(steps, rows, 8))
    y = x.sum(-1, keepdims=True) + noise * rng.normal(size=(steps, rows, 1))
    return fj.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))


def train(batches, **options):
    """Parameters and states of every step."""
    tx = optimizer(jax.tree.map(lambda x: x[0], batches), **options)
    params = {"w": jnp.zeros((8, 1))}

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, value=value)
        params = optax.apply_updates(params, updates)
        seen = state.annealing, state.learning_rate, state.momentum, state.damping
        return (params, state), (params["w"], updates["w"], grads["w"], seen)

    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), batches)[1])()


def test_the_scale_follows_the_slope_along_the_last_update():
    batches = stream(40, 6, noise=1.0)
    _, updates, grads, (annealing, _, _, damping) = train(batches)
    x = np.asarray(batches.inputs, np.float64)
    scale, slope, curvature, before = 1.0, 0.0, 0.0, np.zeros((8, 1))
    dampings = np.concatenate([[0.1], np.asarray(damping, np.float64)])
    for t in range(40):
        pushed = x[t] @ before
        slope = 0.9 * slope + 0.1 * np.vdot(grads[t], before)
        curvature = 0.9 * curvature + 0.1 * (np.vdot(pushed, pushed) / 6 + dampings[t] * np.vdot(before, before))
        relation = slope / curvature if curvature else 0.0
        scale = min(scale * np.exp(0.1 * np.clip(0.4 - relation, -1, 1)), 1.0)
        np.testing.assert_allclose(
            [annealing.slope[t], annealing.curvature[t]], [slope, curvature], rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(annealing.scale[t], scale, rtol=1e-3)
        before = np.asarray(updates[t], np.float64)
    assert annealing.scale.min() < 0.8  # it has something to follow


def test_noise_shortens_steps_and_its_absence_does_not():
    # Six rows of eight inputs: the model of one batch is at its best where the batch is fitted, noise and all.
    ends = {}
    for noise in (1.0, 0.0):
        for scale in ("auto", 1.0):
            batches = stream(400, 6, noise)
            weights, _, _, (annealing, *_) = train(batches, rate_scale=scale)
            ends[noise, scale] = float(jnp.mean(jnp.square(weights[-100:] - 1))), float(annealing.scale[-1])
    assert ends[1.0, "auto"][0] < 0.1 * ends[1.0, 1.0][0]
    assert ends[1.0, "auto"][1] < 0.1
    assert ends[0.0, "auto"][0] < 1e-9
    assert ends[1.0, 1.0][1] == 1


def test_a_rate_scale_that_cannot_be_used_is_refused():
    batch = jax.tree.map(lambda x: x[0], stream(1, 6, 1.0))
    with pytest.raises(ValueError, match="rate_scale is one of auto, a number or a schedule, found 'falling'"):
        optimizer(batch, rate_scale="falling")
    with pytest.raises(ValueError, match="needs max_momentum"):
        optimizer(batch, max_momentum=None)

"""Measuring inside optax: updates pass through, and the state is what the estimator alone gives."""

import functools

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fisher_jax as fj

PARAMS = {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "bias": jnp.zeros(3)}


def apply_fn(params, inputs):
    return inputs @ params["kernel"] + params["bias"]


def batches(number):
    rng = np.random.default_rng(0)
    return [
        fj.Batch(jnp.asarray(rng.standard_normal((5, 2)), jnp.float32), jnp.asarray(rng.integers(0, 3, 5)))
        for _ in range(number)
    ]


def loss(params, batch):
    return -jnp.mean(fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets))


FISHER = fj.group_fisher(apply_fn, estimator="exact")


def train(tx, number=4, **more):
    """Parameters and optimizer state after some steps, jitted with donation."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        extra = {"batch": batch, **({"model_params": params} if more else {})}
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params, **extra)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for batch in batches(number):
        params, state = step(params, state, batch)
    return params, state


def along(period=1, optimizer=None, number=4):
    """What the estimator sees along plain training, without optax's help."""
    tx = optimizer or optax.sgd(0.1)
    params, state = PARAMS, tx.init(PARAMS)
    fisher = FISHER.init(params)
    for index, batch in enumerate(batches(number)):
        if index % period == 0:
            fisher = FISHER.update(fisher, params, batch)
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    return params, fisher


def assert_same(found, wanted):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("period", [1, 3])
def test_updates_pass_through_and_the_state_is_the_estimators(period):
    params, state = train(optax.chain(fj.track_fisher(FISHER, period), optax.sgd(0.1)))
    plain, fisher = along(period)
    assert_same(params, plain)
    assert_same(fj.welford.mean(state[0]), fj.welford.mean(fisher))
    assert fj.welford.count(state[0]) == fj.welford.count(fisher) == (20 if period == 1 else 10)
    assert int(state[0].step) == 4


def test_masked_and_multi_transform_measure_their_part_of_the_model():
    _, fisher = along()
    wanted = fj.welford.mean(fisher)["kernel"]
    only = {"kernel": True, "bias": False}
    tx = optax.chain(optax.masked(fj.track_fisher(FISHER), only), optax.sgd(0.1))
    _, state = train(tx, model_params=True)
    found = fj.welford.mean(state[0].inner_state)
    assert jax.tree.leaves(found["bias"]) == []
    assert_same(found["kernel"], wanted)
    parts = {"a": optax.chain(fj.track_fisher(FISHER), optax.sgd(0.1)), "b": optax.sgd(0.1)}
    _, state = train(optax.multi_transform(parts, {"kernel": "a", "bias": "b"}), model_params=True)
    assert_same(fj.welford.mean(state.inner_states["a"].inner_state[0])["kernel"], wanted)


def test_around_multi_steps_every_micro_batch_counts():
    tx = optax.chain(fj.track_fisher(FISHER), optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
    _, state = train(tx)
    assert fj.welford.count(state[0]) == 20


def test_in_a_scan_the_state_keeps_its_types():
    tx = optax.chain(fj.track_fisher(fj.group_fisher(apply_fn)), optax.adamw(0.1))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches(4))

    def step(carry, x):
        params, state = carry
        batch, key = x
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params, batch=batch, key=key)
        return (optax.apply_updates(params, updates), state), None

    (_, state), _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), (stacked, jax.random.split(jax.random.key(0), 4)))
    assert fj.welford.count(state[0]) == 4
    assert fj.welford.weight(state[0]) == 20


def test_flax_train_state_recipe():
    """``TrainState.apply_gradients`` has no extra arguments; two lines take its place."""
    tx = optax.chain(fj.track_fisher(FISHER), optax.sgd(0.1))
    state = flax.training.train_state.TrainState.create(apply_fn=apply_fn, params=PARAMS, tx=tx)

    @jax.jit
    def step(state, batch):
        grads = jax.grad(loss)(state.params, batch)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, batch=batch)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    for batch in batches(4):
        state = step(state, batch)
    plain, fisher = along()
    assert_same(state.params, plain)
    assert_same(fj.welford.mean(state.opt_state[0]), fj.welford.mean(fisher))


def test_an_average_can_be_tracked_too():
    _, state = train(optax.chain(fj.track_fisher(fj.ema(FISHER, 0.5)), optax.sgd(0.1)))
    recent, params = fj.ema(FISHER, 0.5), PARAMS
    average = recent.init(params)
    for batch in batches(4):
        average = recent.update(average, params, batch)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, batch))
    assert_same(fj.moving_average.mean(state[0].fisher), fj.moving_average.mean(average))


def test_what_is_missing_is_named():
    tx = fj.track_fisher(FISHER)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="needs batch="):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(PARAMS, state, batch=batches(1)[0])
    with pytest.raises(ValueError, match="period is at least 1"):
        fj.track_fisher(FISHER, 0)
    masked = optax.masked(fj.track_fisher(FISHER), {"kernel": True, "bias": False})
    with pytest.raises(ValueError, match="model_params="):
        masked.update(PARAMS, masked.init(PARAMS), PARAMS, batch=batches(1)[0])


def test_nnx_optimizer_recipe():
    """``nnx.Optimizer.update`` hands its extra arguments on; the model is a function of ``nnx.Param``s."""

    class Model(nnx.Module):
        def __init__(self):
            self.kernel, self.bias = nnx.Param(PARAMS["kernel"]), nnx.Param(PARAMS["bias"])

        def __call__(self, inputs):
            return inputs @ self.kernel[...] + self.bias[...]

    model = Model()
    graph, _ = nnx.split(model, nnx.Param)
    one = batches(1)[0]
    fisher = fj.group_fisher(
        lambda params, inputs: nnx.merge(graph, params)(inputs), estimator="exact", groups="row", example=one
    )
    optimizer = nnx.Optimizer(model, optax.chain(fj.track_fisher(fisher), optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(lambda m: -jnp.mean(fj.categorical.log_prob(m(batch.inputs), batch.targets)))(model)
        optimizer.update(model, grads, batch=batch)

    for batch in batches(4):
        step(model, optimizer, batch)
    plain, wanted = along()
    assert_same({"bias": model.bias[...], "kernel": model.kernel[...]}, plain)
    found = fj.welford.mean(nnx.as_pure(optimizer.opt_state)[0])
    assert_same(found["kernel"], fj.welford.mean(wanted)["kernel"].sum(0))
    assert_same(found["bias"], fj.welford.mean(wanted)["bias"])


def test_a_state_in_host_memory_stays_there_and_has_the_same_numbers():
    _, wanted = along(period=3)
    _, state = train(optax.chain(fj.track_fisher(fj.estimators.on_host(FISHER), 3), optax.sgd(0.1)))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state[0].fisher)}
    assert kinds == {"pinned_host"}
    assert_same(fj.welford.mean(state[0]), fj.welford.mean(wanted))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(fj.estimators.on_device(state[0].fisher))} == {"device"}
    average = fj.estimators.on_host(fj.ema(FISHER, 0.5))
    found = average.add(average.init(PARAMS), FISHER.observe(PARAMS, batches(1)[0]))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(found)} == {"pinned_host"}

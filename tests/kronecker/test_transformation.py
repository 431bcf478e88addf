"""K-FAC inside optax: what it computes, when it refreshes, and what it composes with."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import fisher_jax as fj


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["head"]


def setting(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4), "b": (4,), "head": (4, 5)}
    params = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
    batch = fj.Batch(jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), jnp.asarray(rng.integers(0, 5, size=6)))
    return params, batch


def mean_loss(params, batch):
    return -jnp.mean(fj.categorical.log_prob(model(params, batch.inputs), batch.targets))


def other(batch, seed):
    rng = np.random.default_rng(seed)
    return fj.Batch(jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), jnp.asarray(rng.integers(0, 5, size=6)))


def close(a, b, rtol=2e-5):
    """Entries of one leaf share the rounding of the largest: an inverse mixes them."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max()), a, b)


gradient = jax.jit(jax.grad(mean_loss))


@jax.jit
def reference(params, batch, grads, damping=1e-2):
    """The natural gradient of factors from this batch, outside optax."""
    return fj.precondition(fj.kfac_factors(model, fj.categorical, params, batch, damping=damping), grads)


@functools.cache
def jitted():
    _, batch = setting()
    tx = fj.scale_by_kfac(model, example=batch, damping=1e-2, kl_clip=None, refresh=fj.Refresh(period=2))
    return tx, jax.jit(tx.update, donate_argnames="state")


def test_factors_are_fresh_from_the_first_step_and_every_period():
    params, batch = setting()
    tx, update = jitted()
    state = tx.init(params)
    types = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    grads = gradient(params, batch)
    batches = [batch, other(batch, 1), other(batch, 2)]
    for step, served in enumerate((0, 0, 2)):
        updates, state = update(grads, state, params, batch=batches[step])
        close(updates, reference(params, batches[served], grads))
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == types
    assert (int(state.step), int(state.age)) == (3, 1)
    fj.check(state)


def test_taps_of_the_training_step_serve_instead_of_another_evaluation():
    params, batch = setting()
    tx = fj.scale_by_kfac(model, example=batch, damping=1e-2, kl_clip=None)

    @jax.jit
    def both(params, state):
        _, grads, taps = fj.value_grad_and_taps(mean_loss)(params, batch)
        return (
            tx.update(grads, state, params, taps=taps, taps_scale=6.0),
            tx.update(grads, state, params, batch=batch),
        )

    (from_taps, _), (from_batch, _) = both(params, tx.init(params))
    close(from_taps, from_batch)


def test_a_bad_batch_leaves_the_factors_and_is_counted_and_the_next_one_serves():
    params, batch = setting()
    tx, update = jitted()
    grads = gradient(params, batch)
    nan = fj.Batch(batch.inputs.at[0, 0].set(jnp.nan), batch.targets)
    label = fj.Batch(batch.inputs, batch.targets.at[0].set(9))
    updates, state = update(grads, tx.init(params), params, batch=nan)
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(updates))
    with pytest.raises(fj.RejectedBatchError, match=r"1 batch was rejected.*NaN"):
        fj.check(state)
    updates, state = update(grads, state, params, batch=batch)
    close(updates, reference(params, batch, grads))
    _, state = update(grads, state, params, batch=batch)
    kept = jax.tree.map(np.asarray, state.blocks)
    _, state = update(grads, state, params, batch=label)  # due, and refused
    jax.tree.map(np.testing.assert_array_equal, state.blocks, kept)
    assert int(state.rejected) == 2
    updates, state = update(grads, state, params, batch=other(batch, 1))  # the next one is taken
    close(updates, reference(params, other(batch, 1), grads))
    with pytest.raises(fj.RejectedBatchError, match=r"2 batches.*target"):
        fj.check(state)
    _, state = update(jax.tree.map(lambda x: x * jnp.nan, grads), state, params, batch=batch)
    assert int(state.rejected) == 3


def test_padding_alone_changes_nothing_and_one_token_is_enough():
    params, batch = setting()
    tx, update = jitted()
    grads = gradient(params, batch)
    empty = fj.Batch(batch.inputs, batch.targets, jnp.zeros(6), jnp.zeros(6, bool))
    updates, state = update(grads, tx.init(params), params, batch=empty)
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(updates))
    assert (int(state.age), int(state.rejected)) == (-1, 0)
    single = fj.Batch(batch.inputs, batch.targets, jnp.zeros(6).at[2].set(1.0), jnp.arange(6) == 2)
    updates, state = update(grads, state, params, batch=single)
    assert int(state.age) == 1
    alone = fj.Batch(batch.inputs[2:3], batch.targets[2:3])
    close(updates, reference(params, alone, grads), 1e-3)


def test_it_trains_inside_scan():
    params, batch = setting()
    precondition = fj.scale_by_kfac(
        model,
        example=batch,
        damping=0.1,
        kl_clip=None,
        curvature=fj.Curvature(estimator="ggn"),
        refresh=fj.Refresh(period=3),
    )
    tx = optax.chain(precondition, optax.scale(-0.5))

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.jit(lambda c: jax.lax.scan(step, c, None, length=20))((params, tx.init(params)))
    assert losses[-1] < 0.2 * losses[0]


def test_multi_transform_gives_it_some_parameters_and_adamw_others():
    params, batch = setting()
    labels = {"w": "kfac", "b": "kfac", "head": "adamw"}
    inner = fj.scale_by_kfac(model, example=batch, damping=1e-2, kl_clip=None, model_params=params)
    tx = optax.multi_transform({"kfac": inner, "adamw": optax.adamw(1e-3)}, labels)
    grads = gradient(params, batch)
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(grads, state, params, batch=batch, model_params=params)
    alone = reference(params, batch, grads)
    close((updates["w"], updates["b"]), (alone["w"], alone["b"]))
    with pytest.raises(ValueError, match=r"update.*model_params="):
        tx.update(grads, state, params, batch=batch)
    bare = fj.scale_by_kfac(model, example=batch)
    with pytest.raises(ValueError, match=r"scale_by_kfac\(..., model_params=\)"):
        optax.masked(bare, {"w": True, "b": True, "head": False}).init(params)


def test_inject_hyperparams_moves_the_damping():
    params, batch = setting()
    tx = optax.inject_hyperparams(fj.scale_by_kfac, static_args=("apply_fn", "likelihood"))(
        model, example=batch, damping=1e-2, kl_clip=None
    )
    grads = gradient(params, batch)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for damping in (1e-2, 1.0):
        state.hyperparams["damping"] = jnp.asarray(damping)
        updates, _ = update(grads, state, params, batch=batch)
        close(updates, reference(params, batch, grads, damping))


def test_multi_steps_and_apply_if_finite_pass_the_batch_on():
    params, batch = setting()
    grads = gradient(params, batch)
    alone = reference(params, batch, grads)
    inner = fj.scale_by_kfac(model, example=batch, damping=1e-2, kl_clip=None)
    tx = optax.MultiSteps(inner, 2)
    state = tx.init(params)
    update = jax.jit(tx.update)
    _, state = update(grads, state, params, batch=other(batch, 1))
    updates, state = update(grads, state, params, batch=batch)
    close(updates, alone)
    tx = optax.apply_if_finite(inner, 2)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
    close(updates, alone)


def test_nnx_optimizer_recipe():
    """``nnx.Optimizer.update`` hands its extra arguments on; the model is a function of ``nnx.Param``s."""
    params, batch = setting()

    class Model(nnx.Module):
        def __init__(self):
            self.w, self.b, self.head = (nnx.Param(params[k]) for k in ("w", "b", "head"))

        def __call__(self, x):
            return model({"w": self.w[...], "b": self.b[...], "head": self.head[...]}, x)

    module = Model()
    graph, _ = nnx.split(module, nnx.Param)
    precondition = fj.scale_by_kfac(
        lambda params, x: nnx.merge(graph, params)(x),
        example=batch,
        damping=1e-2,
        kl_clip=None,
        curvature=fj.Curvature(token_cap=4, policy="all"),
    )
    optimizer = nnx.Optimizer(module, optax.chain(precondition, optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, batch, key):
        grads = nnx.grad(lambda m: -jnp.mean(fj.categorical.log_prob(m(batch.inputs), batch.targets)))(module)
        optimizer.update(module, grads, batch=batch, key=key)

    key = jax.random.key(0)
    step(module, optimizer, batch, key)

    # The cap draws the same columns inside the transformation as outside.
    @jax.jit
    def by_hand(params):
        factors = fj.kfac_factors(
            model,
            fj.categorical,
            params,
            batch,
            damping=1e-2,
            key=key,
            curvature=fj.Curvature(token_cap=4, policy="all"),
        )
        natural = fj.precondition(factors, jax.grad(mean_loss)(params, batch))
        return jax.tree.map(lambda p, x: p - 0.1 * x, params, natural), factors

    wanted, factors = by_hand(params)
    assert {b.G.columns.shape[-1] for b in factors.blocks} == {4}
    found = {k: getattr(module, k)[...] for k in params}
    close(found, wanted)
    assert float(jnp.abs(found["w"] - params["w"]).max()) > 1e-3
    fj.check(nnx.as_pure(optimizer.opt_state)[0])


def test_a_flax_train_state_in_bfloat16():
    module = nn.Dense(5, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    _, batch = setting()
    params = module.init(jax.random.key(0), batch.inputs)
    tx = optax.chain(
        fj.scale_by_kfac(
            module.apply, example=batch, curvature=fj.Curvature(factor_dtype=jnp.bfloat16, policy="all")
        ),
        optax.scale(-1.0),
    )
    state = TrainState.create(apply_fn=module.apply, params=params, tx=tx)

    @jax.jit
    def step(state, batch):
        def loss(params):
            return -jnp.mean(fj.categorical.log_prob(module.apply(params, batch.inputs), batch.targets))

        grads = jax.grad(loss)(state.params)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, batch=batch)
        return state.replace(
            step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )

    after = step(state, batch)
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype("bfloat16")}
    assert after.opt_state[0].blocks[0].G.columns.dtype == jnp.bfloat16
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(after.params))


def test_what_cannot_be_is_said_at_once():
    params, batch = setting()
    with pytest.raises(ValueError, match="period is a whole number"):
        fj.scale_by_kfac(model, example=batch, refresh=fj.Refresh(period=0))
    with pytest.raises(ValueError, match="policy is one of"):
        fj.scale_by_kfac(model, example=batch, curvature=fj.Curvature(policy="some"))
    tx = fj.scale_by_kfac(model, example=batch, curvature=fj.Curvature(estimator="sampled"))
    state = tx.init(params)
    with pytest.raises(ValueError, match="pass key="):
        tx.update(params, state, params, batch=batch)
    with pytest.raises(ValueError, match="example="):
        tx.update(params, state, params, batch=fj.Batch(batch.inputs[:3], batch.targets[:3]))
    with pytest.raises(ValueError, match="needs batch= or taps="):
        tx.update(params, state, params)

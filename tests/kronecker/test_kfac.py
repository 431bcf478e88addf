"""The ready-made optimizer: its two ways to choose a step, against definitions written out."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_jax as fj


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["head"]


def setting(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 4), "b": (4,), "head": (4, 5)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    x, y = rng.normal(size=(8, 3)), rng.integers(0, 5, size=8)
    weights = jnp.asarray([1.0, 1, 0, 1, 1, 1, 0, 1])
    return params, fj.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y), weights)


def mean_loss(params, batch):
    log_p = fj.categorical.log_prob(model(params, batch.inputs), batch.targets)
    return -jnp.sum(batch.weights * log_p) / jnp.sum(batch.weights)


value_and_gradient = jax.jit(jax.value_and_grad(mean_loss))


def dot(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.vdot(np.asarray(x), np.asarray(y))) for x, y in pairs)


def test_a_fixed_rate_has_momentum_a_trust_region_and_weight_decay():
    params, batch = setting()
    rate, momentum, clip, decay = 0.3, 0.8, 1e-3, 0.1
    tx = fj.kfac(
        model,
        example=batch,
        damping=1e-2,
        momentum=momentum,
        weight_decay=decay,
        learning_rate=rate,
        curvature=fj.Curvature(estimator="ggn"),
        refresh=fj.Refresh(ramp=None),
        step=fj.FixedRate(kl_clip=clip),
    )
    update, state = jax.jit(tx.update), tx.init(params)
    factors = jax.jit(
        lambda p: fj.kfac_factors(
            model, fj.categorical, p, batch, damping=1e-2, curvature=fj.Curvature(estimator="ggn")
        )
    )(params)
    precondition = jax.jit(fj.precondition)
    velocity = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):  # both within the first refresh
        _, grads = value_and_gradient(params, batch)
        updates, state = update(grads, state, params, batch=batch)
        natural = precondition(factors, grads)
        nu = min(1, np.sqrt(2 * clip / (rate**2 * dot(natural, grads))))
        assert nu < 0.9
        pulled = jax.tree.map(lambda x, p, nu=nu: nu * x + decay * p, natural, params)
        velocity = jax.tree.map(lambda v, d: momentum * v + d, velocity, pulled)
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, -rate * v, rtol=1e-4, atol=1e-6), updates, velocity)
        params = optax.apply_updates(params, updates)


def test_the_adaptive_step_minimises_the_exact_quadratic_model():
    params, batch = setting()
    decay = 0.05
    tx = fj.kfac(
        model,
        example=batch,
        damping=0.2,
        weight_decay=decay,
        curvature=fj.Curvature(estimator="ggn"),
        step=fj.Adaptive(adapt_period=1, min_momentum=None, max_momentum=None, rate_scale=1.0),
    )
    update, state = jax.jit(tx.update), tx.init(params)
    previous = jax.tree.map(jnp.zeros_like, params)
    product = jax.jit(lambda params, u: fj.operators.ggn(model, fj.categorical, params, batch)(u))
    damping = 0.2
    for step in range(3):
        value, grads = value_and_gradient(params, batch)
        matvec = functools.partial(product, params)
        slope = jax.tree.map(lambda g, p: g + decay * p, grads, params)

        def quadratic(u):
            return dot(slope, u) + (dot(u, matvec(u)) + (damping + decay) * dot(u, u)) / 2  # noqa: B023

        updates, state = update(grads, state, params, batch=batch)
        # No other combination of the two directions does better: the gradient of the model along both is zero.
        pulled = jax.tree.map(lambda s, c, u: s + c + (damping + decay) * u, slope, matvec(updates), updates)  # noqa: B023
        if step:
            assert abs(dot(pulled, previous)) < 1e-4 * np.sqrt(dot(slope, slope) * dot(previous, previous))
        assert abs(dot(pulled, updates)) < 1e-4 * np.sqrt(dot(slope, slope) * dot(updates, updates))
        assert quadratic(updates) < 0
        moved = optax.apply_updates(params, updates)
        change = float(mean_loss(moved, batch)) + decay / 2 * (dot(moved, moved) - dot(params, params)) - float(value)
        ratio = change / quadratic(updates)
        np.testing.assert_allclose(state.ratio, ratio, rtol=2e-3)
        damping *= 0.9 if ratio > 0.75 else 1 / 0.9 if ratio < 0.25 else 1
        np.testing.assert_allclose(state.damping, damping, rtol=1e-5)
        params, previous = moved, updates


def line(params, x):
    return x @ params["w"]


def linear_setting(seed):
    """Parameters, a batch, the gradient's function and the exact Fisher matrix of a linear-Gaussian model."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 1))
    batch = fj.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    return batch, lambda w: x.T @ (x @ w - y) / 6, x.T @ x / 6


def test_momentum_and_damping_stay_above_their_bounds():
    # The second batch is another one: its own model would undo the last update.
    (batch, gradient, _), (other, other_gradient, fisher) = linear_setting(0), linear_setting(1)
    found = {}
    for least, most in ((None, None), (0.9, 1.0), (None, 0.1)):
        tx = fj.kfac(
            line,
            fj.gaussian,
            example=batch,
            damping=0.2,
            curvature=fj.Curvature(estimator="ggn"),
            step=fj.Adaptive(adapt_period=1, min_damping=0.19, min_momentum=least, max_momentum=most, rate_scale=1.0),
        )
        update, w = jax.jit(tx.update), np.ones((3, 1))
        state = tx.init({"w": jnp.ones((3, 1))})
        previous, state = update(
            {"w": jnp.asarray(gradient(w), jnp.float32)}, state, {"w": jnp.asarray(w)}, batch=batch
        )
        assert float(state.damping) == np.float32(0.19)  # 0.9 of 0.2 is less
        state = state._replace(factors=state.factors._replace(step=jnp.asarray(24)))  # then it is half of the bound
        previous = np.asarray(previous["w"], np.float64)
        w = w + previous
        slope = other_gradient(w)
        given = {"w": jnp.asarray(slope, jnp.float32)}
        updates, state = update(given, state, {"w": jnp.asarray(w, jnp.float32)}, batch=other)
        step = np.asarray(updates["w"], np.float64)
        found[most] = float(state.momentum)
        assert float(state.damping) >= np.float32(0.19)
        # Nothing along the natural gradient does better with that momentum.
        natural = (found[most] * previous - step) / float(state.learning_rate)
        flat = np.vdot(natural, slope + fisher @ step + 0.19 * step)
        assert abs(flat) < 1e-4 * np.linalg.norm(natural) * np.linalg.norm(slope)
    assert 0.1 < found[None] < 0.4
    np.testing.assert_allclose([found[1.0], found[0.1]], [0.45, 0.1], rtol=1e-6)


def test_the_curvature_of_a_step_can_come_from_the_first_rows():
    batch, gradient, _ = linear_setting(0)
    x, w = np.asarray(batch.inputs, np.float64), np.ones((3, 1))
    rates = []
    for rows in (None, 4):
        tx = fj.kfac(
            line,
            fj.gaussian,
            example=batch,
            damping=0.2,
            curvature=fj.Curvature(estimator="ggn"),
            step=fj.Adaptive(model_rows=rows),
        )
        params = {"w": jnp.ones((3, 1))}
        given = {"w": jnp.asarray(gradient(w), jnp.float32)}
        updates, state = jax.jit(tx.update)(given, tx.init(params), params, batch=batch)
        natural = np.linalg.solve(x.T @ x / 6 + 0.2 * np.eye(3), gradient(w))
        seen = x[:rows]
        curved = np.vdot(natural, (seen.T @ seen / len(seen) + 0.2 * np.eye(3)) @ natural)
        rates.append(np.vdot(natural, gradient(w)) / curved)
        np.testing.assert_allclose(state.learning_rate, rates[-1], rtol=1e-4)
        np.testing.assert_allclose(updates["w"], -rates[-1] * natural, rtol=1e-3)
        # The ratio compares losses of all rows with what the model predicts from the first ones.
        moved = w - rates[-1] * natural
        change = (np.sum((x @ moved - batch.targets) ** 2) - np.sum((x @ w - batch.targets) ** 2)) / 12
        np.testing.assert_allclose(state.ratio, change / (-rates[-1] * np.vdot(natural, gradient(w)) / 2), rtol=1e-3)
    assert abs(rates[0] - rates[1]) > 0.01 * rates[0]


def test_the_rate_can_be_scaled_by_a_schedule():
    batch, gradient, fisher = linear_setting(0)
    w, damping = np.ones((3, 1)), 0.2
    given = {"w": jnp.asarray(gradient(w), jnp.float32)}
    tx = fj.kfac(
        line,
        fj.gaussian,
        example=batch,
        damping=damping,
        curvature=fj.Curvature(estimator="ggn"),
        step=fj.Adaptive(rate_scale=lambda n: 0.5 / (1 + n / 2)),
    )
    update, state = jax.jit(tx.update), tx.init({"w": jnp.ones((3, 1))})
    for number, share in ((0, 0.5), (2, 0.25)):
        state = state._replace(factors=state.factors._replace(step=jnp.asarray(number)))
        updates, after = update(given, state, {"w": jnp.ones((3, 1))}, batch=batch)
        step = np.asarray(updates["w"], np.float64)
        # Along one direction a quadratic model falls by 1 - (1 - share)**2 of the most that it can.
        curved = np.vdot(step, fisher @ step + damping * step)
        np.testing.assert_allclose(-np.vdot(gradient(w), step) * share, curved, rtol=1e-4)
        change = np.vdot(gradient(w), step) + np.vdot(step, fisher @ step) / 2
        np.testing.assert_allclose(after.ratio, change / (np.vdot(gradient(w), step) + curved / 2), rtol=1e-3)


def test_the_loss_that_is_given_is_not_evaluated_anew():
    batch, gradient, _ = linear_setting(0)
    params, given = {"w": jnp.ones((3, 1))}, {"w": jnp.asarray(gradient(np.ones((3, 1))), jnp.float32)}
    tx = fj.kfac(
        line,
        fj.gaussian,
        example=batch,
        damping=0.2,
        curvature=fj.Curvature(estimator="ggn"),
        step=fj.Adaptive(model_rows=4),
    )
    update, state = jax.jit(tx.update), tx.init(params)
    _, own = update(given, state, params, batch=batch)
    value = float(jnp.sum((batch.inputs @ params["w"] - batch.targets) ** 2)) / 12 + 0.5 * np.log(2 * np.pi)
    ratios = []
    for shift in (0.0, 1.0):
        updates, seen = update(given, state, params, batch=batch, value=jnp.float32(value + shift))
        ratios.append(float(seen.ratio))
    np.testing.assert_allclose(ratios[0], own.ratio, rtol=1e-4)
    step = np.asarray(updates["w"], np.float64)
    curved = np.sum((np.asarray(batch.inputs[:4], np.float64) @ step) ** 2) / 4 + 0.2 * np.sum(step**2)
    predicted = np.vdot(gradient(np.ones((3, 1))), step) + curved / 2
    np.testing.assert_allclose(ratios[1] - ratios[0], -1 / predicted, rtol=1e-3)


def test_factors_can_come_from_a_window_of_rows_that_moves_on():
    batch, gradient, _ = linear_setting(0)
    x, w = np.asarray(batch.inputs, np.float64), np.ones((3, 1))
    tx = fj.kfac(
        line,
        fj.gaussian,
        example=batch,
        damping=0.2,
        curvature=fj.Curvature(estimator="ggn"),
        refresh=fj.Refresh(period=1, factor_rows=4),
        step=fj.Adaptive(min_momentum=0.0, max_momentum=0.0, adapt_period=100),
    )
    params = {"w": jnp.ones((3, 1))}
    given = {"w": jnp.asarray(gradient(w), jnp.float32)}
    update, state = jax.jit(tx.update), tx.init(params)
    for first in (0, 3, 1):  # 6 times the golden section 0.618, twice, modulo 6
        rows = [(first + i) % 6 for i in range(4)]
        damping = float(state.damping)
        updates, state = update(given, state, params, batch=batch)
        natural = np.linalg.solve(x[rows].T @ x[rows] / 4 + damping * np.eye(3), gradient(w))
        np.testing.assert_allclose(updates["w"], -float(state.learning_rate) * natural, rtol=1e-4)
    with pytest.raises(ValueError, match="from 1 to the 6 rows"):
        fj.kfac(line, fj.gaussian, example=batch, refresh=fj.Refresh(factor_rows=7))
    with pytest.raises(ValueError, match="leave out factor_rows"):
        tx.update(given, state, params, batch=batch, taps=[])


@pytest.mark.parametrize("kept", [{}, {"statistics_period": 2}])
def test_factors_are_renewed_more_often_at_first(kept):
    batch, gradient, _ = linear_setting(0)
    tx = fj.kfac(
        line,
        fj.gaussian,
        example=batch,
        learning_rate=0.1,
        curvature=fj.Curvature(estimator="empirical"),
        refresh=fj.Refresh(period=4, ramp=3, **kept),
    )
    params = {"w": jnp.ones((3, 1))}
    given = {"w": jnp.asarray(gradient(np.ones((3, 1))), jnp.float32)}

    def step(state, _):
        _, state = tx.update(given, state, params, batch=batch)
        return state, state.factors.age

    _, ages = jax.jit(lambda state: jax.lax.scan(step, state, None, length=18))(tx.init(params))
    # After n updates at most 1 + n // 3 with the same factors, and never more than 4.
    assert ages.tolist() == [1, 1, 1, 2, 1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]


def train(damping, params, batch, steps):
    tx = fj.kfac(model, example=batch, damping=damping)

    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, key=key)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)


def test_the_adaptive_optimizer_forgives_its_first_damping():
    params, batch = setting()
    run = jax.jit(train, static_argnames="steps")
    for damping in (1e-3, 1.0):
        (_, state), losses = run(damping, params, batch, 60)
        assert losses[-1] < 0.05 * losses[0]
        fj.check(state)


def test_a_step_that_raises_the_loss_is_not_taken():
    params, batch = setting()
    grads = jax.tree.map(
        lambda g: -g, value_and_gradient(params, batch)[1]
    )  # uphill: what the model predicts is wrong
    tx = fj.kfac(model, example=batch, damping=0.5, curvature=fj.Curvature(estimator="ggn"))
    start = tx.init(params)
    start = start._replace(factors=start.factors._replace(step=jnp.asarray(60)))  # later than the first fifty
    updates, state = jax.jit(tx.update)(grads, start, params, batch=batch)
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(updates))
    assert float(state.damping) == 2.0
    assert float(state.ratio) < 0


def test_a_bad_batch_moves_nothing_and_is_counted():
    params, batch = setting()
    _, grads = value_and_gradient(params, batch)
    nan = fj.Batch(batch.inputs.at[0, 0].set(jnp.nan), batch.targets, batch.weights)
    for rate in (0.1, None):
        tx = fj.kfac(model, example=batch, learning_rate=rate, curvature=fj.Curvature(estimator="ggn"))
        update = jax.jit(tx.update)
        _, state = update(grads, tx.init(params), params, batch=batch)
        bad_grads = jax.tree.map(lambda x: x * jnp.nan, grads)
        updates, after = update(bad_grads, state, params, batch=nan)
        assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(updates))
        jax.tree.map(np.testing.assert_array_equal, after.velocity, state.velocity)
        jax.tree.map(np.testing.assert_array_equal, after.factors.blocks, state.factors.blocks)
        with pytest.raises(fj.RejectedBatchError, match="1 batch was rejected"):
            fj.check(after)


def test_it_serves_a_part_of_the_parameters():
    params, batch = setting()
    inner = fj.kfac(model, example=batch, model_params=params, curvature=fj.Curvature(estimator="ggn"))
    labels = {"w": "kfac", "b": "kfac", "head": "adamw"}
    tx = optax.multi_transform({"kfac": inner, "adamw": optax.adamw(1e-2)}, labels)
    state, update = tx.init(params), jax.jit(tx.update)
    first = mean_loss(params, batch)
    for _ in range(5):
        _, grads = value_and_gradient(params, batch)
        updates, state = update(grads, state, params, batch=batch, model_params=params)
        params = optax.apply_updates(params, updates)
    assert mean_loss(params, batch) < 0.5 * first


def test_the_example_of_the_readme_runs():
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "scale_by_kfac" in c)
    params, batch = setting()
    _, grads = value_and_gradient(params, batch)
    names = {
        "fj": fj,
        "optax": optax,
        "params": params,
        "grads": grads,
        "batch": batch,
        "key": None,
        "apply_fn": model,
    }
    *first, last = code.splitlines()
    exec("\n".join(first), names)
    names["tx"] = names["tx"]._replace(update=jax.jit(names["tx"].update))
    exec(last, names)
    assert mean_loss(optax.apply_updates(params, names["updates"]), batch) < mean_loss(params, batch)

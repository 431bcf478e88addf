"""K-FAC's options objects: plain values that refuse what is wrong, and what optax does with them."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_jax as fj

CLASSES = (fj.Curvature, fj.Refresh, fj.Adaptive, fj.FixedRate)


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["head"]


def setting():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in (("w", (3, 4)), ("head", (4, 5)))}
    return params, fj.Batch(jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), jnp.asarray([0, 1, 2, 3, 4, 0]))


def mean_loss(params, batch):
    return -fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets).mean()


@pytest.mark.parametrize("kind", CLASSES)
def test_options_are_frozen_hashable_and_never_taken_for_schedules(kind):
    found = kind()
    assert not callable(found)
    assert hash(found) == hash(kind())
    assert found == kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(found, dataclasses.fields(kind)[0].name, None)
    for field in dataclasses.fields(kind):
        assert len(re.findall(rf"^    (?:\w+, )*{field.name}(?:, \w+)*: ", inspect.getdoc(kind), re.M)) == 1, (
            field.name
        )


@pytest.mark.parametrize(
    ("kind", "field", "value", "allowed"),
    [
        (fj.Curvature, "estimator", "true", "auto, empirical, sampled, exact_head, ggn"),
        (fj.Curvature, "policy", "some", "auto, all, hybrid, never"),
        (fj.Curvature, "form", "half", "auto, exact, factored"),
        (fj.Curvature, "shared", "sum", "expand, reduce"),
        (fj.Curvature, "token_cap", 0, "at least 1, or None"),
        (fj.Curvature, "token_cap", 2.5, "whole number"),
        (fj.Curvature, "temperature", 0.0, "positive"),
        (fj.Curvature, "power", float("nan"), "finite"),
        (fj.Curvature, "factor_dtype", jnp.int8, "floating dtype or None"),
        (fj.Curvature, "diagonal", "kernel", "function of a leaf's path or None"),
        (fj.Curvature, "eigenvalue_correction", "all", "True, False or a function"),
        (fj.Refresh, "period", 0, "at least 1"),
        (fj.Refresh, "period", True, "whole number"),
        (fj.Refresh, "statistics_period", 0, "at least 1, or None"),
        (fj.Refresh, "factor_decay", 1.0, r"in \[0, 1\)"),
        (fj.Refresh, "factor_rank", 0, "at least 1, or None"),
        (fj.Refresh, "factor_rows", -1, "at least 1, or None"),
        (fj.Refresh, "ramp", 0, "at least 1, or None"),
        (fj.Adaptive, "adapt_period", 0, "at least 1"),
        (fj.Adaptive, "min_damping", -1.0, "at least 0, or None"),
        (fj.Adaptive, "min_momentum", "half", "at least 0, or None"),
        (fj.Adaptive, "max_momentum", float("nan"), "at least 0, or None"),
        (fj.Adaptive, "rate_scale", "falling", "auto, a number or a schedule"),
        (fj.Adaptive, "rate_scale", 0.0, "positive, 'auto' or a schedule"),
        (fj.Adaptive, "model_rows", 0, "at least 1, or None"),
        (fj.FixedRate, "kl_clip", 0.0, "positive, or None"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_and_what_is_allowed(kind, field, value, allowed):
    with pytest.raises(ValueError, match=f"^{field} is .*{allowed}") as error:
        kind(**{field: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": fj.FixedRate()}, "FixedRate.* needs learning_rate="),
        ({"step": fj.Adaptive(), "learning_rate": 0.1}, "leave out learning_rate="),
        ({"momentum": 0.9}, "momentum= is that of a fixed learning rate"),
        ({"damping": lambda step: 0.1}, "its first value, not a schedule"),
        ({"curvature": fj.Curvature(estimator="exact_head"), "refresh": fj.Refresh(factor_decay=0.9)}, "leave out"),
    ],
)
def test_a_contradiction_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fj.kfac(apply_fn, example=setting()[1], **options)


@pytest.mark.parametrize("name", ["curvature", "refresh", "step"])
def test_an_options_object_of_another_class_is_named(name):
    with pytest.raises(TypeError, match=rf"^{name} is fj\.\w+\(\.\.\.\).*found dict"):
        fj.kfac(apply_fn, example=setting()[1], **{name: {}})


def test_a_temperature_needs_labels_that_are_drawn():
    params, batch = setting()
    fj.kfac(apply_fn, example=batch, curvature=fj.Curvature(temperature=2.0))  # draws its labels by itself
    with pytest.raises(ValueError, match=r"temperature=2\.0.*estimator='sampled'"):
        fj.kfac_factors(apply_fn, fj.categorical, params, batch, curvature=fj.Curvature(temperature=2.0))


def steps_of(tx, params, batch, steps=4):
    """Updates of several steps, under jit."""
    update, state, found = jax.jit(tx.update), tx.init(params), []
    for step in range(steps):
        grads = jax.grad(mean_loss)(params, batch)
        updates, state = update(grads, state, params, batch=batch, key=jax.random.key(step))
        found.append(updates)
        params = optax.apply_updates(params, updates)
    return found, state


def falling(first):
    return lambda step: first / (1 + step)


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max()), a, b)


STATIC = ("apply_fn", "likelihood")


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": falling(0.3), "damping": falling(0.1), "momentum": falling(0.5)},
        {"learning_rate": 0.1, "damping": falling(0.1), "step": fj.FixedRate(kl_clip=None)},
        {"damping": 0.2, "step": fj.Adaptive(max_momentum=0.9), "weight_decay": 0.01},
    ],
    ids=["schedules", "numbers", "adaptive"],
)
def test_kfac_under_inject_hyperparams_is_kfac(options):
    params, batch = setting()
    options = {"curvature": fj.Curvature(policy="never"), "refresh": fj.Refresh(period=2)} | options
    injected = optax.inject_hyperparams(fj.kfac, static_args=STATIC)(
        apply_fn=apply_fn, likelihood=fj.categorical, example=batch, **options
    )
    plain = fj.kfac(apply_fn, fj.categorical, example=batch, **options)
    (found, state), (wanted, _) = steps_of(injected, params, batch), steps_of(plain, params, batch)
    same(found, wanted)
    assert {name for name, x in options.items() if callable(x)} <= state.hyperparams.keys()


def test_scale_by_kfac_under_inject_hyperparams_follows_a_schedule_of_the_damping():
    params, batch = setting()
    refresh = fj.Refresh(period=1)
    injected = optax.inject_hyperparams(fj.scale_by_kfac, static_args=STATIC)(
        apply_fn=apply_fn,
        likelihood=fj.categorical,
        example=batch,
        damping=falling(0.1),
        kl_clip=None,
        refresh=refresh,
    )
    plain = fj.scale_by_kfac(apply_fn, example=batch, damping=falling(0.1), kl_clip=None, refresh=refresh)
    found, state = steps_of(injected, params, batch)
    same(found, steps_of(plain, params, batch)[0])
    assert float(state.hyperparams["damping"]) == np.float32(0.1 / 4)
    start = params
    for step, updates in enumerate(found):
        factors = fj.kfac_factors(apply_fn, fj.categorical, start, batch, damping=0.1 / (1 + step))
        same(updates, fj.precondition(factors, jax.grad(mean_loss)(start, batch)))
        start = optax.apply_updates(start, updates)


def test_the_rows_and_the_ramp_of_a_refresh_hold_without_kfac_too():
    params, batch = setting()
    first = fj.Batch(batch.inputs[:2], batch.targets[:2])
    refresh = fj.Refresh(period=4, factor_rows=2, ramp=2)
    tx = fj.scale_by_kfac(apply_fn, example=batch, damping=0.1, kl_clip=None, refresh=refresh)
    grads = jax.grad(mean_loss)(params, batch)
    state, ages, update = tx.init(params), [], jax.jit(tx.update)
    for step in range(6):
        updates, state = update(grads, state, params, batch=batch)
        ages.append(int(state.age))
        if step == 0:
            factors = fj.kfac_factors(apply_fn, fj.categorical, params, first, damping=0.1)
            same(updates, fj.precondition(factors, grads))
    assert ages == [1, 1, 2, 1, 2, 3]


NUMBERS = {
    "learning_rate": (-0.1, float("nan"), float("inf"), "0.1", True, np.ones(2), [0.1]),
    "damping": (-1, float("nan"), float("inf"), "0.1", False, jnp.ones(2), jnp.array(True)),
    "momentum": (2, 1.0, -0.5, float("nan"), "0.9", True),
    "weight_decay": (-0.1, float("nan"), "0", True),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_a_number_out_of_its_range_is_refused_by_name(name, value):
    options = {"learning_rate": 0.1, name: value}
    with pytest.raises(
        ValueError, match=f"^{name} is (at least 0|in ).*a number, an array of shape .. or a schedule"
    ):
        fj.kfac(apply_fn, example=setting()[1], **options)


@pytest.mark.parametrize("value", NUMBERS["damping"])
def test_a_damping_is_checked_wherever_it_is_given(value):
    params, batch = setting()
    with pytest.raises(ValueError, match=r"^damping is at least 0"):
        fj.scale_by_kfac(apply_fn, example=batch, damping=value)
    with pytest.raises(ValueError, match=r"^damping is at least 0"):
        fj.kfac_factors(apply_fn, fj.categorical, params, batch, damping=value)


@pytest.mark.parametrize("value", [0.0, -1e-3, float("nan"), float("inf"), "0.1", "none", True])
def test_a_trust_region_is_positive(value):
    batch = setting()[1]
    with pytest.raises(ValueError, match=r"^kl_clip is positive"):
        fj.scale_by_kfac(apply_fn, example=batch, kl_clip=value)
    with pytest.raises(ValueError, match=r"^kl_clip is positive"):
        fj.FixedRate(kl_clip=value)


def test_a_trust_region_needs_the_inverse():
    batch, curvature = setting()[1], fj.Curvature(power=-0.5)
    fj.scale_by_kfac(apply_fn, example=batch, curvature=curvature)
    with pytest.raises(ValueError, match=r"only power=-1 predicts, found power=-0\.5"):
        fj.scale_by_kfac(apply_fn, example=batch, curvature=curvature, kl_clip=1e-3)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (fj.Curvature, "estimator", 3),
        (fj.Curvature, "form", None),
        (fj.Curvature, "temperature", float("inf")),
        (fj.Curvature, "temperature", "hot"),
        (fj.Curvature, "power", True),
        (fj.Curvature, "power", jnp.array(float("nan"))),
        (fj.Refresh, "period", "10"),
        (fj.Refresh, "period", jnp.array(10)),
        (fj.Refresh, "factor_decay", float("nan")),
        (fj.Adaptive, "min_damping", float("inf")),
        (fj.Adaptive, "max_momentum", jnp.array(-1.0)),
        (fj.Adaptive, "rate_scale", True),
    ],
)
def test_odd_values_of_fields_are_refused_in_a_sentence(kind, field, value):
    with pytest.raises(ValueError, match=f"^{field} is .*found "):
        kind(**{field: value})


@pytest.mark.parametrize("make", [
    lambda x: fj.Refresh(period=x), lambda x: fj.Curvature(token_cap=x), lambda x: fj.Curvature(power=x),
    lambda x: fj.Curvature(temperature=x), lambda x: fj.Curvature(estimator=x), lambda x: fj.Adaptive(model_rows=x),
])  # fmt: skip
def test_what_the_program_depends_on_is_known_before_tracing(make):
    with pytest.raises(ValueError, match=r"^\w+ is .*found .*Trace"):
        jax.jit(make)(jnp.ones(()))


def after(options, bad_at=1, steps=4):
    """States before, at and after an update with an option out of range, and the updates."""
    params, batch = setting()
    tx = fj.kfac(apply_fn, example=batch, curvature=fj.Curvature(estimator="empirical"), **options(bad_at))
    grads, state, found = jax.grad(mean_loss)(params, batch), tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params, batch=batch)
        found.append((updates, state))
    return found


def turning(good, bad):
    return lambda bad_at: lambda step: jnp.where(step == bad_at, bad, good)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("learning_rate", 0.1, -0.1), ("learning_rate", 0.1, jnp.nan), ("damping", 0.1, -1.0), ("momentum", 0.5, 2.0),
        ("momentum", 0.5, jnp.nan), ("weight_decay", 0.01, jnp.inf),
    ],
)  # fmt: skip
def test_a_schedule_out_of_range_rejects_its_update_and_no_other(name, good, bad):
    schedule = turning(good, bad)
    (_, before), (updates, state), (later, _), (_, last) = after(
        lambda bad_at: {"learning_rate": 0.1, name: schedule(bad_at)}
    )
    assert int(state.factors.rejected) == int(last.factors.rejected) == 1
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(updates))
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(later))
    for a, b in zip(jax.tree.leaves(before.factors.blocks), jax.tree.leaves(state.factors.blocks), strict=True):
        np.testing.assert_array_equal(a, b)
    for kept in ("velocity", "damping", "learning_rate", "momentum"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, kept), getattr(state, kept))
    with pytest.raises(fj.RejectedBatchError, match="learning rate, damping, momentum"):
        fj.check(last)


@pytest.mark.parametrize("name", ["damping", "kl_clip"])
def test_a_traced_option_of_scale_by_kfac_out_of_range_gives_no_update(name):
    params, batch = setting()
    grads = jax.grad(mean_loss)(params, batch)

    @jax.jit
    def step(value):
        tx = fj.scale_by_kfac(apply_fn, example=batch, **{name: value})
        return tx.update(grads, tx.init(params), params, batch=batch)

    updates, state = step(-1.0)
    assert (int(state.rejected), int(state.age)) == (1, -1)
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(updates))
    assert int(step(0.1)[1].rejected) == 0


def test_an_inverse_that_overflows_is_counted():
    """Without damping a factor without rank has no inverse."""
    params, batch = setting()
    tx = fj.scale_by_kfac(apply_fn, example=batch, damping=0.0, curvature=fj.Curvature(policy="all"))
    updates, state = tx.update(jax.grad(mean_loss)(params, batch), tx.init(params), params, batch=batch)
    assert int(state.rejected) == 1
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(updates))


def of_four_rows(params, x):
    return (x.reshape(4 * 3, 2) @ params["w"]).reshape(4, 3, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [("factor_rows", {"refresh": fj.Refresh(factor_rows=2)}), ("model_rows", {"step": fj.Adaptive(model_rows=2)})],
)
def test_a_model_of_one_number_of_rows_is_not_run_on_a_part_of_them(name, options):
    batch = fj.Batch(jnp.ones((4, 3, 2)), jnp.zeros((4, 3), int))
    params = {"w": jnp.zeros((2, 3))}
    fj.kfac(of_four_rows, example=batch).init(params)
    with pytest.raises(ValueError, match=rf"^{name}=2 runs the model on 2 rows.*leave out {name}"):
        fj.kfac(of_four_rows, example=batch, **options).init(params)


def test_a_key_is_a_key():
    params, batch = setting()
    with pytest.raises(TypeError, match=r"^key is one of jax\.random.*found 0"):
        fj.kfac_factors(apply_fn, fj.categorical, params, batch, key=0)

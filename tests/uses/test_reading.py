"""Every state of Fisher information is read alike: by `fj.mean` and its kin, and by all that take a Fisher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import fisher_jax as fj

PARAMS = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.array([1.0, 2.0])}
BATCH = fj.Batch(jnp.ones((8, 3)), jnp.array([0, 1, 1, 0] * 2))
CONSTANT = fj.group_fisher(lambda p, x: x @ p["w"] + p["b"], estimator="exact")


def tracked(estimator):
    """The state of a whole chain after one update."""
    tx = optax.chain(optax.clip(1.0), fj.track_fisher(estimator), optax.adam(1e-3))
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=BATCH)[1]


MOMENTS = CONSTANT.observe(PARAMS, BATCH)
VALUES = fj.welford.mean(MOMENTS)
WITH_ERRORS = {
    "moments": MOMENTS,
    "welford": CONSTANT.update(CONSTANT.init(PARAMS), PARAMS, BATCH),
    "plain numbers": fj.welford.add(fj.welford.plain(CONSTANT.init(PARAMS)), MOMENTS),
    "tracked": tracked(CONSTANT)[1],
    "chain": tracked(CONSTANT),
}
WITHOUT = {
    "values": VALUES,
    "average": fj.moving_average.add(fj.moving_average.init(MOMENTS, 0.9), MOMENTS),
    "tracked average": tracked(fj.ema(CONSTANT, 0.9)),
}
STATES = WITH_ERRORS | WITHOUT


def assert_equal(found, wanted, rtol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), found, wanted)


@pytest.mark.parametrize("name", STATES)
def test_every_state_has_the_same_mean(name):
    assert_equal(fj.mean(STATES[name]), VALUES)
    assert_equal(jax.jit(fj.mean)(STATES[name]), VALUES)


@pytest.mark.parametrize("name", WITH_ERRORS)
def test_errors_and_intervals_are_those_of_the_moments(name):
    state = WITH_ERRORS[name]
    errors = fj.welford.standard_error(MOMENTS)
    assert_equal(fj.standard_error(state), errors, 1e-5)
    half = jax.tree.map(lambda e: np.float64(e) * scipy.stats.t.ppf(0.95, 7), errors)
    lower, upper = fj.interval(state, level=0.9)
    assert_equal(jax.tree.map(np.subtract, VALUES, half), lower, 1e-5)
    assert_equal(jax.tree.map(np.add, VALUES, half), upper, 1e-5)


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("read", [fj.standard_error, fj.interval, fj.stats.signal_to_noise, fj.stats.effective_count])
def test_what_keeps_no_spread_has_no_error(read, name):
    with pytest.raises(TypeError, match=r"a moving average|MovingAverage|dict|tuple"):
        read(WITHOUT[name])


def test_two_states_in_one_tree_are_not_guessed_between():
    with pytest.raises(ValueError, match=r"2 Fisher states"):
        fj.mean((WITH_ERRORS["chain"], MOMENTS))


def first_update(tx):
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]


TAKE_A_FISHER = {
    "per_parameter": lambda f: fj.per_parameter(f, PARAMS),
    "saliency": lambda f: fj.saliency(PARAMS, f),
    "merge_params": lambda f: fj.merge_params([PARAMS, jax.tree.map(jnp.cos, PARAMS)], [f, PARAMS]),
    "merge_task_vectors": lambda f: fj.continual.merge_task_vectors(PARAMS, [PARAMS, PARAMS], [f, f]),
    "ewc_penalty": lambda f: fj.ewc_penalty(PARAMS, jax.tree.map(jnp.cos, PARAMS), f),
    "scale_by_fisher": lambda f: first_update(fj.continual.scale_by_fisher(f, damping=0.1)),
    "project_away": lambda f: fj.continual.project_away(PARAMS, f, 0.5),
    "protect_important": lambda f: first_update(fj.continual.protect_important(f, 0.5)),
    "overlap": lambda f: fj.overlap(f, PARAMS)[:4],
    "conflict": lambda f: fj.shift.conflict(PARAMS, jax.tree.map(jnp.cos, PARAMS), f),
    "conflict of two": lambda f: fj.shift.conflict(PARAMS, jax.tree.map(jnp.cos, PARAMS), f, f),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("use", TAKE_A_FISHER)
def test_what_takes_a_fisher_takes_every_state(use, name):
    assert_equal(TAKE_A_FISHER[use](STATES[name]), TAKE_A_FISHER[use](VALUES), 1e-5)


@pytest.mark.parametrize("name", WITH_ERRORS)
def test_what_takes_errors_takes_every_state_that_has_them(name):
    for use in (fj.stats.signal_to_noise, fj.stats.effective_count, fj.stats.shrunk_mean,
                lambda x: fj.stats.data_needed(x, width=0.1).units, lambda x: fj.stats.decide(x, 0.1).p,
                lambda x: fj.importance_shift(x, x).p):  # fmt: skip
        assert_equal(use(WITH_ERRORS[name]), use(MOMENTS), 1e-4)


def test_what_holds_no_fisher_values_is_refused_by_every_reading():
    params, batch = {"w": jnp.zeros((2, 3))}, fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
    tx = fj.scale_by_kfac(lambda p, x: x @ p["w"], example=batch)
    state = jax.eval_shape(tx.init, params)
    others = (state, (state, optax.EmptyState()), batch, {"a": jnp.arange(3)}, {"a": jnp.ones(2, complex)}, "x")
    for other in others:
        for read in (fj.mean, fj.standard_error, fj.interval, fj.welford.mean, fj.welford.interval):
            with pytest.raises(TypeError, match="expected a Welford state"):
                read(other)

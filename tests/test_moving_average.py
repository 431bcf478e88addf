"""The exponential average: no bias at the start, decay per update, weights in numerator and denominator."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

add = jax.jit(fj.moving_average.add)


def formula(means, weights, decay):
    """``N / D`` by its definition."""
    n, d = 0.0, 0.0
    for f, w in zip(np.asarray(means, np.float64), np.asarray(weights, np.float64), strict=True):
        n, d = decay * n + (1 - decay) * w * f, decay * d + (1 - decay) * w
    return n / d, d


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 2.0**-24])
def test_a_constant_reads_back_from_the_first_step_on(decay):
    constant = np.array([0.1, 1 / 3, 1e-30, 7e20, 0.0], np.float32)
    rng = np.random.default_rng(0)
    state = fj.moving_average.init(jnp.zeros(5), decay)
    # The first weight times 1 - decay is below what float32 holds.
    for w in [np.float32(2e-38), *rng.lognormal(0, 3, 12).astype(np.float32)]:
        # Weighted by hand: w x / w is not always x.
        state = add(
            state, dataclasses.replace(fj.welford.observe(jnp.asarray(constant)[None]), weight=jnp.asarray(w))
        )
        np.testing.assert_array_equal(fj.moving_average.mean(state), constant)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
def test_it_is_the_explicit_formula(decay):
    rng = np.random.default_rng(1)
    values = rng.lognormal(0, 1, (60, 4, 3)).astype(np.float32)
    weights = (rng.integers(0, 5, (60, 4)) * 0.5).astype(np.float32)
    weights[::7] = 0
    means = [
        np.tensordot(w, v.astype(np.float64), 1) / max(w.sum(), 1e-9) for v, w in zip(values, weights, strict=True)
    ]
    state = fj.moving_average.init({"a": jnp.zeros(3)}, decay)
    for i in range(60):
        state = add(state, fj.welford.observe({"a": values[i]}, weights[i]))
        used = [k for k in range(i + 1) if weights[k].sum() > 0]
        if used:
            mean, d = formula([means[k] for k in used], [weights[k].sum() for k in used], decay)
            np.testing.assert_allclose(fj.moving_average.mean(state)["a"], mean, rtol=3e-6)
            np.testing.assert_allclose(state.weight, d, rtol=3e-6)
        else:
            assert (np.asarray(state.average["a"]) == 0).all()


def bits(state):
    return [np.asarray(x).tobytes() for x in (*jax.tree.leaves(state.average), state.weight)]


def test_empty_and_rejected_batches_change_nothing():
    values, weights = jnp.array([[0.1, 2.0], [0.7, 5.0]]), jnp.array([1.0, 0.5])
    good = fj.welford.observe(values, weights)
    state = add(add(fj.moving_average.init(good, 0.9), good), fj.welford.observe(values * 3, weights))
    for begin in (fj.moving_average.init(good, 0.9), state):
        after = add(begin, fj.welford.observe(values * jnp.nan, weights * 0))
        assert bits(after) == bits(begin)
        assert (int(after.rejected), int(after.reasons)) == (0, 0)
        for n, bad in enumerate([(values * jnp.nan, weights), (values, -weights)], 1):
            after = add(after, fj.welford.observe(*bad))
            assert bits(after) == bits(begin)
            assert int(after.rejected) == n
        with pytest.raises(fj.RejectedBatchError, match="2 batches were rejected"):
            fj.check(after)


def test_documents_that_are_not_finished_count_too():
    moments = fj.welford.observe(jnp.array([1.0, 3.0, 8.0]), unit="document", units=jnp.array([1, 2, 2]))
    state = add(fj.moving_average.init(moments, 0.5), moments)
    assert (float(fj.moving_average.mean(state)), float(state.weight)) == (4.0, 1.5)


def test_the_scale_is_removed_before_averaging():
    moments = fj.welford.observe(jnp.array([2.0**20, 2.0**21]), scale=20)
    assert float(fj.moving_average.mean(add(fj.moving_average.init(moments, 0.5), moments))) == 1.5


def test_types_do_not_change_under_jit_scan_and_donation():
    moments = fj.welford.observe({"a": jnp.ones((2, 3)), "b": jnp.ones(2, jnp.bfloat16)})
    state = fj.moving_average.init(jax.eval_shape(lambda: moments), 0.9)
    types = jax.tree.map(jax.typeof, state)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, moments):
        return jax.lax.scan(lambda s, _: (fj.moving_average.add(s, moments), None), state, None, length=3)[0]

    after = run(state, moments)
    assert jax.tree.map(jax.typeof, after) == types
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert {x.dtype.name for x in jax.tree.leaves(after)} == {"float32", "int32"}
    assert float(after.weight) == pytest.approx(2 * (1 - 0.9**3), rel=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, float("nan")])
def test_a_decay_is_a_share(decay):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        fj.moving_average.init(jnp.zeros(3), decay)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        fj.ema(fj.FisherEstimator(None, None, None), decay)


@pytest.mark.parametrize("other", [jnp.ones((2, 3)), {"a": jnp.ones(2)}])
def test_moments_of_another_shape_or_tree_are_refused(other):
    # A scalar average would broadcast against them in silence.
    state = fj.moving_average.init(jnp.zeros(()), 0.9)
    with pytest.raises(ValueError, match=r"different (shapes|trees).*fj.moving_average.init\(moments, decay\)"):
        fj.moving_average.add(state, fj.welford.observe(other))


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(2)
    params = {"embed": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)}
    params["head"] = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)
    batches = [
        fj.next_token_batch(
            jnp.asarray(rng.integers(0, 6, (3, 5))),
            loss_mask=jnp.asarray(rng.integers(0, 3, (3, 5))),
            units=jnp.arange(3),
        )
        for _ in range(4)
    ]
    return params, batches


@pytest.mark.parametrize("options", [{}, {"groups": "column", "unit": "document"}])
def test_ema_of_an_estimator_and_one_observation_for_both(problem, options):
    params, batches = problem
    estimator = fj.lm_head.estimator(lambda p, x: p["embed"][x], lambda p: p["head"], **options)
    recent = fj.ema(estimator, 0.8)
    assert recent.observe is estimator.observe
    observe = jax.jit(estimator.observe)
    average, state = recent.init(params), estimator.init(params)
    by_hand, in_state = average, state
    update = jax.jit(recent.update), jax.jit(estimator.update)
    assert average.decay == 0.8
    means, weights = [], []
    for batch in batches:
        average, state = update[0](average, params, batch), update[1](state, params, batch)
        moments = observe(params, batch)
        by_hand, in_state = add(by_hand, moments), fj.welford.add(in_state, moments)
        means.append(np.asarray(fj.welford.mean(moments)))
        weights.append(fj.welford.weight(moments))
    np.testing.assert_allclose(average.average, formula(means, weights, 0.8)[0], rtol=3e-6)
    np.testing.assert_allclose(by_hand.average, average.average, rtol=1e-6)
    np.testing.assert_allclose(fj.welford.mean(in_state), fj.welford.mean(state), rtol=1e-6)
    np.testing.assert_allclose(fj.welford.mean(state), np.average(means, axis=0, weights=weights), rtol=3e-6)
    fj.check({"recent": average, "all": state})

"""A bad batch changes nothing but its count and its reason, and `fj.check` says so in words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax._support import rejection
from fisher_jax.welford.moments import UNITS

GOOD = (np.arange(12.0).reshape(4, 3) ** 2, np.array([1.0, 0.5, 2.0, 1.0]))
BAD = {
    "nan value": (0, np.nan, rejection.NON_FINITE),
    "infinite value": (0, -np.inf, rejection.NON_FINITE),
    "overflow": (0, 3e38, rejection.NON_FINITE),
    "negative weight": (1, -1.0, rejection.NEGATIVE_WEIGHT),
    "nan weight": (1, np.nan, rejection.NEGATIVE_WEIGHT),
    "infinite weight": (1, np.inf, rejection.NEGATIVE_WEIGHT),
}


def batch(bad=None):
    values, weights = (x.astype(np.float32) for x in GOOD)
    if bad is not None:
        where, number, _ = BAD[bad]
        (values[1], weights[1:2])[where][:] = number
    return values, weights


def observe(values, weights, unit):
    return fj.welford.observe(values, weights, unit=unit, units=jnp.array([3, 3, 5, 6]))


@functools.partial(jax.jit, static_argnames="unit")
def step(state, values, weights, unit):
    return fj.welford.add(state, observe(values, weights, unit))


def fresh(unit):
    return fj.welford.init(jax.eval_shape(functools.partial(observe, unit=unit), *batch()))


def statistics(state):
    kept = [name for name in state.__dataclass_fields__ if name not in ("rejected", "reasons", "unit", "scale")]
    return {name: [np.asarray(x).tobytes() for x in jax.tree.leaves(getattr(state, name))] for name in kept}


@pytest.mark.parametrize("unit", UNITS)
def test_a_bad_batch_leaves_every_bit_and_is_counted_with_its_reason(unit):
    state = step(fresh(unit), *batch(), unit)
    for bad, (_, _, reason) in BAD.items():
        if bad == "overflow" and unit == "batch":
            continue  # one observation has no squared deviations that could overflow
        after = step(state, *batch(bad), unit)
        assert statistics(after) == statistics(state), bad
        assert int(after.rejected) == int(state.rejected) + 1
        assert int(after.reasons) & reason, bad
        state = after
    assert int(state.reasons) == rejection.NON_FINITE | rejection.NEGATIVE_WEIGHT
    # A good batch is still taken.
    again = step(state, *batch(), unit)
    assert fj.welford.weight(again) == 2 * fj.welford.weight(state) == 9
    assert int(again.rejected) == int(state.rejected)


@pytest.mark.parametrize("unit", UNITS)
def test_an_empty_batch_changes_nothing_to_the_last_bit(unit):
    values, weights = batch()
    state = fresh(unit)
    for begin in (state, step(step(state, values, weights, unit), values * np.float32(0.7), weights, unit)):
        # Where the weight is zero even NaN is void.
        after = step(begin, np.full_like(values, np.nan), np.zeros_like(weights), unit)
        assert statistics(after) == statistics(begin)
        assert (int(after.rejected), int(after.reasons)) == (0, 0)


def test_bad_batches_are_left_out_inside_scan():
    names = [None, "nan value", None, "negative weight", "nan value", None]
    xs = jax.tree.map(lambda *x: np.stack(x), *[batch(name) for name in names])
    run = jax.jit(lambda s, xs: jax.lax.scan(lambda s, x: (step(s, *x, "document"), None), s, xs)[0])
    state = run(fresh("document"), xs)
    good = fresh("document")
    for _ in range(3):
        good = step(good, *batch(), "document")
    # A loop may be compiled to another order of the sums of a batch.
    for name in ("mean", "m2", "square_mean", "square_m2", "weight", "weight_sq", "count"):
        found, wanted = (np.asarray(getattr(x, name), np.float64).sum(0) for x in (state, good))
        np.testing.assert_allclose(found, wanted, rtol=2e-7, err_msg=name)
    assert int(state.rejected) == 3
    assert int(state.reasons) == rejection.NON_FINITE | rejection.NEGATIVE_WEIGHT


def test_merging_adds_up_what_was_rejected():
    state = step(fresh("token"), *batch(), "token")
    a, b = (step(state, *batch(bad), "token") for bad in ("nan value", "negative weight"))
    merged = fj.welford.merge(a, b)
    assert int(merged.rejected) == 2
    assert int(merged.reasons) == int(a.reasons) | int(b.reasons) == 5
    assert fj.welford.weight(merged) == 9


def test_check_passes_on_good_states():
    state = step(fresh("token"), *batch(), "token")
    average = fj.moving_average.init(jnp.zeros(3), 0.9)
    assert fj.check(state) is None
    assert fj.check({"task": state, "recent": [average, None], "step": 3}) is None


def test_check_says_how_many_and_why():
    state = step(fresh("token"), *batch(), "token")
    bad = step(state, *batch("nan value"), "token")
    with pytest.raises(fj.RejectedBatchError, match=r"^1 batch was rejected \(a NaN or infinite value in the loss"):
        fj.check(bad)
    worse = step(bad, *batch("negative weight"), "token")
    with pytest.raises(fj.RejectedBatchError) as raised:
        fj.check({"good": state, "bad": worse})
    assert str(raised.value) == (
        "2 batches were rejected (a NaN or infinite value in the loss, the scores or the parameters; a weight that "
        "is negative, NaN or infinite); the state does not contain them"
    )
    # One reason in each of several states: all are named.
    average = fj.moving_average.init(jnp.zeros(3), 0.9)
    average = fj.moving_average.add(average, observe(*batch("negative weight"), "token"))
    with pytest.raises(fj.RejectedBatchError, match=r"NaN or infinite value.*; a weight that is negative"):
        fj.check([bad, average])


def test_check_reads_stacked_states_and_moments():
    moments = [observe(*batch(bad), "token") for bad in (None, "nan value", "nan value")]
    with pytest.raises(fj.RejectedBatchError, match="2 batches were"):
        fj.check(jax.tree.map(lambda *x: jnp.stack(x), *moments))
    with pytest.raises(fj.RejectedBatchError, match="1 batch was"):
        fj.check(moments[1])


@pytest.mark.parametrize("nothing", [{}, None, {"a": jnp.zeros(3)}, 3])
def test_check_wants_something_to_check(nothing):
    with pytest.raises(TypeError, match=f"no state .* found in {type(nothing).__name__}"):
        fj.check(nothing)


def test_every_reason_has_a_sentence_of_its_own():
    mask = rejection.reason_mask(non_finite=True, target_out_of_range=jnp.array(True), negative_weight=False)
    assert int(mask) == rejection.NON_FINITE | rejection.TARGET_OUT_OF_RANGE
    assert mask.dtype == jnp.int32
    assert len(set(rejection.reasons(7))) == 3
    assert rejection.reasons(0) == []
    assert "outside [0, number of outputs)" in rejection.reasons(rejection.TARGET_OUT_OF_RANGE)[0]

"""Welford states in plain float32: the same numbers up to rounding, in half the memory or a quarter of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

SHAPE = (5, 3)


@functools.partial(jax.jit, static_argnames="unit", donate_argnums=0)
def step(state, values, weights, ids, unit):
    return fj.welford.add(state, fj.welford.observe(values, weights, unit=unit, units=ids))


def batches(number=6, rows=7):
    rng = np.random.default_rng(0)
    for i in range(number):
        values = rng.lognormal(0, 1, (rows, *SHAPE)).astype(np.float32)
        yield values, rng.integers(0, 9, rows).astype(np.float32), np.arange(rows, dtype=np.int32) // 3 + 2 * i


def run(unit, of=lambda state: state):
    like = jax.eval_shape(lambda v, w, i: fj.welford.observe(v, w, unit=unit, units=i), *next(batches()))
    state = of(fj.welford.init(like))
    for values, weights, ids in batches():
        state = step(state, values, weights, ids, unit)
    return state


def without_errors(state):
    return fj.welford.plain(state, standard_errors=False)


def size(state):
    """Bytes of what is kept for every entry."""
    return sum(x.nbytes for x in jax.tree.leaves((state.mean, state.m2, state.square_mean, state.square_m2)))


@pytest.mark.parametrize("unit", ["sequence", "document"])
def test_plain_states_hold_the_same_numbers_in_half_the_memory(unit):
    whole, plain = run(unit), run(unit, fj.welford.plain)
    for read in (fj.welford.mean, fj.welford.variance, fj.welford.standard_error):
        np.testing.assert_allclose(read(plain), read(whole), rtol=3e-6)
    assert fj.welford.count(plain) == fj.welford.count(whole)
    entries = int(np.prod(SHAPE))
    assert (size(whole), size(plain), size(without_errors(plain))) == (32 * entries, 16 * entries, 8 * entries)


def test_without_standard_errors_mean_and_variance_stay_and_others_are_refused(tmp_path):
    whole, lean = run("sequence"), run("sequence", without_errors)
    for read in (fj.welford.mean, fj.welford.variance):
        np.testing.assert_allclose(read(lean), read(whole), rtol=3e-6)
    np.testing.assert_array_equal(fj.welford.mean(without_errors(whole)), fj.welford.mean(whole))
    fj.exchange.save(tmp_path / "state.safetensors", lean)
    fj.checkpoint.save(tmp_path / "state", lean)
    fj.checkpoint.save(tmp_path / "half", lean, dtype=jnp.bfloat16)
    restored = [fj.exchange.load(tmp_path / "state.safetensors"), fj.checkpoint.restore(tmp_path / "state", lean)]
    for state in (lean, *restored, fj.checkpoint.restore(tmp_path / "half", lean)):
        with pytest.raises(ValueError, match="keeps no sums for standard errors"):
            fj.welford.standard_error(state)
    for state in restored:
        np.testing.assert_array_equal(state.mean, lean.mean)
        np.testing.assert_array_equal(state.m2, lean.m2)


def test_states_of_two_forms_do_not_merge():
    whole = run("sequence")
    plain, lean = fj.welford.plain(whole), without_errors(whole)
    both = fj.welford.merge(plain, plain)
    np.testing.assert_allclose(fj.welford.mean(both), fj.welford.mean(whole), rtol=1e-6)
    with pytest.raises(ValueError, match="plain, the other compensated"):
        fj.welford.merge(plain, whole)
    with pytest.raises(ValueError, match="without; make both alike"):
        fj.welford.merge(plain, lean)
    with pytest.raises(ValueError, match="dropped its sums"):
        fj.welford.plain(lean)

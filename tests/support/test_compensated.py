"""Compensated sums stay exact under XLA: in every loop, and with constants that the compiler can see."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax._support import compensated


def pairs(rng, size):
    """Numbers of very different magnitudes and signs."""
    a, b = (rng.standard_normal(size) * 2.0 ** rng.integers(-25, 25, size) for _ in range(2))
    return a.astype(np.float32), b.astype(np.float32)


def exact(high, low):
    return np.asarray(high, np.float64) + np.asarray(low, np.float64)


def test_two_sum_loses_nothing_under_jit():
    a, b = pairs(np.random.default_rng(0), 1 << 20)
    s, e = jax.jit(compensated.two_sum)(a, b)
    np.testing.assert_array_equal(s, a + b)
    # Both sums are rounded to float64 alike, since the exact numbers are equal.
    np.testing.assert_array_equal(exact(s, e), a.astype(np.float64) + b)


def test_two_sum_loses_nothing_in_loops():
    a, b = pairs(np.random.default_rng(1), (64, 1024))

    def step(_, x):
        return None, compensated.two_sum(*x)

    def body(i, out):
        return out.at[i].set(jnp.stack(compensated.two_sum(a_[i], b_[i])))

    a_, b_ = jnp.asarray(a), jnp.asarray(b)
    _, (s, e) = jax.jit(lambda a, b: jax.lax.scan(step, None, (a, b)))(a, b)
    np.testing.assert_array_equal(exact(s, e), a.astype(np.float64) + b)
    out = jax.lax.fori_loop(0, 64, body, jnp.zeros((64, 2, 1024)))
    np.testing.assert_array_equal(exact(out[:, 0], out[:, 1]), a.astype(np.float64) + b)


def test_a_pair_carried_through_a_loop_is_the_exact_sum():
    rng = np.random.default_rng(2)
    terms = (rng.lognormal(0, 2, 20_000) * 1e-3).astype(np.float32)
    for loop in ("scan", "fori_loop"):

        @jax.jit
        def total(x, loop=loop):
            zero = jnp.zeros(2)
            if loop == "scan":
                return jax.lax.scan(lambda p, v: (compensated.add_pair(p, v), None), zero, x)[0]
            return jax.lax.fori_loop(0, x.shape[0], lambda i, p: compensated.add_pair(p, x[i]), zero)

        pair = total(terms)
        truth = float(sum(map(Fraction, terms.tolist())))
        assert abs(exact(*pair) / truth - 1) < 1e-13
        assert abs(float(np.cumsum(terms)[-1]) / truth - 1) > 1e-6  # a plain sum is not
        # Normalised: the correction is at most half an ulp of the value.
        assert abs(float(pair[1])) <= np.spacing(np.float32(pair[0])) / 2


def test_pairs_add_subtract_and_read_back():
    a = jnp.array([1.0, 2.0**-40])
    b = jnp.array([2.0**-24, -(2.0**-46)])
    assert exact(*compensated.add(a, b)) == 1 + 2.0**-40 + 2.0**-24 - 2.0**-46
    assert exact(*compensated.two_difference(a, b)) == 2.0**-24 - 2.0**-46 - 1 - 2.0**-40
    assert float(compensated.value(compensated.from_value(jnp.float32(0.1)))) == np.float32(0.1)


def test_a_sum_with_a_constant_is_exact_where_the_constant_is_hidden():
    # Why `runtime` exists: some compilers simplify (c + a) - c to a if they know c.
    a = np.random.default_rng(4).lognormal(0, 5, 10_000).astype(np.float32)
    constant = np.full(a.shape, 0.1, np.float32)

    s, e = jax.jit(lambda a: compensated.two_sum(compensated.runtime(jnp.asarray(constant)), a))(a)
    np.testing.assert_array_equal(exact(s, e), a.astype(np.float64) + constant)


def batches_of_equal_weight():
    """Two batches of one weight: their merge halves, which no product rounds."""
    rng = np.random.default_rng(5)
    return [
        fj.welford.observe(rng.lognormal(0, 5, (1, 5000)).astype(np.float32), jnp.ones(1, bool)) for _ in range(2)
    ]


def assert_exact_merge(state, one, other):
    half = (np.asarray(one.mean, np.float64) + np.asarray(other.mean, np.float64)) / 2
    np.testing.assert_allclose(exact(*state.mean), half, rtol=1e-13)


def test_a_batch_that_the_compiler_can_see_is_joined_exactly():
    one, other = batches_of_equal_weight()
    state = fj.welford.add(fj.welford.init(one), one)
    assert_exact_merge(jax.jit(lambda s: fj.welford.add(s, other))(state), one, other)


def test_a_state_that_the_compiler_can_see_is_joined_exactly():
    one, other = batches_of_equal_weight()
    state, second = (fj.welford.add(fj.welford.init(m), m) for m in (one, other))
    for joined in (
        jax.jit(lambda m: fj.welford.add(state, m))(other),
        jax.jit(lambda b: fj.welford.merge(state, b))(second),
        jax.jit(lambda b: fj.welford.merge(b, state))(second),
    ):
        assert_exact_merge(joined, one, other)

    large = dataclasses.replace(state, weight=jnp.array([2.0**24, 0.125]))
    for join in (
        lambda w: fj.welford.add(large, dataclasses.replace(other, weight=w)),
        lambda w: fj.welford.merge(
            large, fj.welford.add(fj.welford.init(other), dataclasses.replace(other, weight=w))
        ),
    ):
        weight = jax.jit(join)(jnp.float32(0.75)).weight
        assert exact(*weight) == 2.0**24 + 0.875


def test_a_constant_batch_adds_up_exactly_thousands_of_times():
    steps = 5000
    moments = fj.welford.observe(jnp.array([0.1, 0.7, 1.3]), jnp.array([0.1, 0.3, 0.7]))
    run = jax.jit(lambda s: jax.lax.fori_loop(0, steps, lambda _, s: fj.welford.add(s, moments), s))
    state = run(fj.welford.init(moments))
    assert abs(fj.welford.weight(state) / (steps * float(moments.weight)) - 1) < 1e-13
    assert abs(exact(*state.weight_sq) / (steps * float(moments.weight_sq)) - 1) < 1e-13
    assert abs(exact(*state.m2) / (steps * float(moments.m2)) - 1) < 1e-12
    assert abs(exact(*state.mean) / float(moments.mean) - 1) < 1e-13
    assert fj.welford.count(state) == 3 * steps


def test_divide_is_correctly_rounded():
    x = np.random.default_rng(3).lognormal(0, 1, 1 << 16).astype(np.float32)
    by = np.float32(1000)
    right = x / by  # NumPy divides as IEEE 754 says
    np.testing.assert_array_equal(jax.jit(compensated.divide)(x, by), right)

    plain = np.asarray(jax.jit(lambda x, s: x / s)(x, by))
    bias = np.mean(plain.astype(np.float64) / (x.astype(np.float64) / 1000) - 1)
    honest = np.mean(right.astype(np.float64) / (x.astype(np.float64) / 1000) - 1)
    # The reason why `divide` exists: on this backend the plain form is off in one direction.
    assert np.count_nonzero(plain != right) > x.size // 10
    assert abs(bias) > 20 * abs(honest)

"""Compensated sums: numbers carried as a pair (value, correction), stacked on a leading axis of 2.

The pair's value is the unevaluated sum of its parts. A leading axis of 1 is a plain number, without correction: sums
with it are rounded, and take half the memory. Only additions are compensated: a product's rounding error
cannot be recovered where the compiler may contract products into fused multiply-adds.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["add", "add_pair", "divide", "from_value", "runtime", "two_difference", "value"]

Pair = Float[Array, "2 *shape"] | Float[Array, "1 *shape"]


def _low(pair: Pair) -> Array | float:
    return pair[1] if len(pair) == 2 else 0.0


def runtime(tree):
    """The same values, hidden from the compiler: a TwoSum with a compile-time constant would be folded away."""
    return jax.lax.optimization_barrier(tree)


def divide(x: Array, scalar: Array) -> Array:
    """``x / scalar``, correctly rounded.

    XLA turns an array divided by a scalar into a product with the rounded reciprocal, which is off by up to an ulp
    in the same direction in every batch: a bias that no compensated sum can remove.
    """
    # 0 * x makes the divisor an array in the compiler's eyes, and costs no memory.
    return x / (scalar.astype(x.dtype) + 0 * x)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """``s = fl(a + b)`` and the error ``e`` with ``s + e = a + b`` exactly (Knuth, TAOCP 2, 4.2.2)."""
    s = a + b
    b_part = s - a
    return s, (a - (s - b_part)) + (b - b_part)


def two_difference(pair: Pair, other: Pair) -> tuple[Array, Array]:
    """``other - pair`` as value and correction."""
    s, e = two_sum(other[0], -pair[0])
    return s, e + (_low(other) - _low(pair))


def add_pair(pair: Pair, high: Array, low: Array | float = 0.0) -> Pair:
    """``pair + (high + low)``, renormalised so that the correction stays below half an ulp of the value."""
    if len(pair) == 1:
        return pair + (high + low)[None]
    s, e = two_sum(pair[0], high)
    e = e + (pair[1] + low)
    total = s + e
    return jnp.stack([total, e - (total - s)])


def add(pair: Pair, other: Pair) -> Pair:
    """Sum of two pairs."""
    return add_pair(pair, other[0], _low(other))


def from_value(x: Array) -> Pair:
    """A pair that holds ``x`` exactly."""
    return jnp.stack([x, jnp.zeros_like(x)])


def value(pair: Pair) -> Array:
    """The pair as one number of its dtype."""
    return pair[0] + _low(pair)

"""Checksums of values: the same in NumPy and on devices, additive over shards, different for any other bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_jax.checkpoint import sums
from fisher_jax.checkpoint.nodes import DTYPES

RNG = np.random.default_rng(0)


def oracle(x):
    """One element after the other, in Python's whole numbers."""
    data, found = np.ascontiguousarray(x), []
    words = max(1, data.dtype.itemsize // 4)
    for a, b, c, start in sums._LANES:
        total = 0
        for i, element in enumerate(data.reshape(-1)):
            bits = int.from_bytes(element.tobytes(), "little")
            for k in range(words):
                h = ((bits >> (32 * k)) % 2**32) * a + (i % 2**32) * b + (i >> 32) * c + start + k * 0x9E3779B9
                h %= 2**32
                h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
                h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
                total += h ^ (h >> 16)
        found.append(total % 2**32)
    return tuple(found)


def drawn(dtype, shape):
    x = RNG.integers(0, 256, (*shape, np.dtype(jnp.dtype(dtype)).itemsize), np.uint8)
    if dtype in ("bool", "int4", "float4_e2m1fn"):
        return (x[..., 0] % 2).astype(jnp.dtype(dtype))
    return np.ascontiguousarray(x).view(jnp.dtype(dtype)).reshape(shape)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_sum_is_the_formula_for_every_dtype(dtype):
    x = drawn(dtype, (5, 3, 2))
    assert sums.of_host(x) == oracle(x)
    assert sums.of_host(x[:0]) == (0, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool"])
def test_devices_find_the_same_sum(dtype):
    x = drawn(dtype, (7, 5, 3))
    assert sums.of_shards(jnp.asarray(x), small=0) == sums.of_host(x)
    assert sums.of_shards(jnp.asarray(x[0, 0, 0]), small=0) == sums.of_host(x[0, 0, 0])


@pytest.mark.parametrize("cut", [(slice(0, 3), slice(None)), (slice(3, 8), slice(2, 6)), (slice(None), slice(6, 9))])
def test_blocks_add_up(cut):
    x = drawn("float32", (8, 9))
    index = [cut, (slice(0, 8), slice(0, 9))]
    inside = np.zeros(x.shape, bool)
    inside[cut] = True
    start = tuple(part.start or 0 for part in index[0])
    elements = [sums.of_host(x[i : i + 1, j : j + 1], (i, j), x.shape) for i, j in np.argwhere(inside).tolist()]
    assert sums.of_host(x[cut], start, x.shape) == sums.add(*elements)
    rest = [sums.of_host(x[i : i + 1, j : j + 1], (i, j), x.shape) for i, j in np.argwhere(~inside).tolist()]
    assert sums.add(*elements, *rest) == sums.of_host(x)


def test_places_beyond_32_bits_count():
    """A block of a huge array: on the host, on a device, and not what it would be 2**32 places earlier."""
    shape, start = (2**20, 2**20), (2**19 + 5, 77)
    x = drawn("float32", (3, 4))
    there = sums.of_host(x, start, shape)
    assert sums.of_shard(jnp.asarray(x), start, shape, small=0) == there
    assert sums.of_host(x, (start[0] - 2**12, start[1]), shape) != there


def test_every_single_bit_changes_both_lanes():
    x = drawn("float32", (40,))
    before = sums.of_host(x)
    for bit in range(32 * x.size):
        changed = x.copy()
        changed.view(np.uint32)[bit // 32] ^= np.uint32(1 << (bit % 32))
        after = sums.of_host(changed)
        assert after[0] != before[0]
        assert after[1] != before[1]


def test_exchanged_elements_change_the_sum():
    x = np.arange(10, dtype=np.float32)
    y = x[[1, 0, *range(2, 10)]]
    assert sums.of_host(x) != sums.of_host(y)


def test_negative_zero_and_the_payload_of_a_nan_count():
    zeros, nans = np.zeros(2, np.float32), np.full(2, np.nan, np.float32)
    other = nans.copy()
    other.view(np.uint32)[0] ^= 1
    assert sums.of_host(zeros) != sums.of_host(-zeros)
    assert sums.of_shards(jnp.asarray(nans)) == sums.of_host(nans) != sums.of_host(other)


def test_host_arrays_of_64_bits_need_no_x64():
    assert not jax.config.jax_enable_x64
    x = np.ones((300, 1000))
    y = x.copy()
    y[7, 7] += 2.0**-52
    assert sums.of_host(x) != sums.of_host(y)

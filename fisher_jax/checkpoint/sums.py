"""Checksums of the values of an array, whatever mesh it lies on: sums over elements, so that shards add up.

With the words ``x_i`` (the 32-bit pieces of an element's bits) of element ``i`` of the whole array,
``sum_i mix(x_i, i) mod 2**32`` in two lanes. ``mix`` is a bijection of the word for every ``i``: a single changed
element always changes both lanes. The sum of a shard needs only its own elements and their places in the whole.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Lanes = tuple[int, int]

# Odd multipliers of the word and of the parts of its place, and a start, for each lane.
_LANES = ((0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F), (0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09))
_SMALL = 2**18  # elements that NumPy does faster than a new shape compiles
_PIECE = 2**16  # elements that stay in a cache


def add(*sums: Lanes) -> Lanes:
    first, second = (sum(lane) % 2**32 for lane in zip(*sums, strict=True)) if sums else (0, 0)
    return first, second


def of_host(
    value: np.ndarray | np.generic, start: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
) -> Lanes:
    """The checksum of a NumPy array, or of a block that begins at ``start`` in an array of the given shape."""
    x = np.asarray(value)
    if x.size == 0:
        return 0, 0
    if start is not None and shape is not None and x.shape != shape:
        # A row of a block is contiguous in the whole; each is a piece with a place of its own.
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        rows = x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x[None]
        places = np.indices(x.shape[:-1], np.int64).reshape(x.ndim - 1, -1) if x.ndim > 1 else np.zeros((0, 1), int)
        offsets = sum((places[d] + start[d]) * strides[d] for d in range(x.ndim - 1)) + np.full(len(rows), start[-1])
        offsets = offsets.astype(np.uint64)
        per_piece = max(1, _PIECE // rows.shape[1])
        columns = np.arange(rows.shape[1], dtype=np.uint64)
        pieces = range(0, len(rows), per_piece)
        return add(
            *(
                _piece(rows[i : i + per_piece].ravel(), (offsets[i : i + per_piece, None] + columns).ravel())
                for i in pieces
            )
        )  # fmt: skip
    flat, found = np.ascontiguousarray(x).reshape(-1), [0, 0]
    for first in range(0, flat.size, _PIECE):
        words = _host_words(flat[first : first + _PIECE])
        for i, (lane, steps) in enumerate(zip(_LANES, _steps(), strict=True)):
            moved = (first * lane[1] + (first >> 32) * lane[2]) % 2**32  # a piece does not cross 2**32
            found[i] += _sum(words, steps[: words[0].size] + np.uint32(moved), lane)
    return found[0] % 2**32, found[1] % 2**32


@functools.cache
def _steps() -> list[np.ndarray]:
    """The part of a place inside a piece, for each lane."""
    return [np.arange(_PIECE, dtype=np.uint32) * np.uint32(lane[1]) for lane in _LANES]


def _piece(x: np.ndarray, places: np.ndarray) -> Lanes:
    low, high = places.astype(np.uint32), (places >> np.uint64(32)).astype(np.uint32)
    words = _host_words(x)
    first, second = (
        _sum(words, low * np.uint32(lane[1]) + high * np.uint32(lane[2]), lane) % 2**32 for lane in _LANES
    )
    return first, second


def _sum(words: list[np.ndarray], place: np.ndarray, lane: tuple[int, ...]) -> int:
    """`_mix` in place, which spares memory traffic."""
    total = 0
    for k, word in enumerate(words):
        h = word * np.uint32(lane[0])
        h += place
        h += np.uint32(_begin(lane, k))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h ^= h >> np.uint32(shift)
            if factor != 1:
                h *= np.uint32(factor)
        total += int(h.sum(dtype=np.uint32))
    return total


def _begin(lane: tuple[int, ...], k: int) -> int:
    return (lane[3] + k * 0x9E3779B9) % 2**32


def _mix(word: Any, place: Any, lane: tuple[int, ...]) -> Any:
    """MurmurHash3's finaliser of ``word a + place + start``: a bijection of the word."""
    uint = jnp.uint32
    h = word * uint(lane[0]) + place + uint(_begin(lane, 0))
    h = (h ^ (h >> uint(16))) * uint(0x85EBCA6B)
    h = (h ^ (h >> uint(13))) * uint(0xC2B2AE35)
    return h ^ (h >> uint(16))


def _host_words(x: np.ndarray) -> list[np.ndarray]:
    """The 32-bit words of each element, low ones first."""
    size = x.dtype.itemsize
    if size == 1:
        return [x.view(np.uint8).astype(np.uint32)]
    if size == 2:
        return [x.view("<u2").astype(np.uint32)]
    words = x.view("<u4").reshape(x.size, size // 4)
    return [words[:, k] for k in range(size // 4)]


def of_shards(x: jax.Array, small: int = _SMALL) -> Lanes:
    """The share of a JAX array's checksum that this process has: of each part that it holds the first copy of."""
    return add(
        *(
            of_shard(s.data, _start(s.index, x.ndim), x.shape, small)
            for s in x.addressable_shards
            if s.replica_id == 0
        )
    )


def _start(index: tuple, ndim: int) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index) + (0,) * (ndim - len(index))


def of_shard(x: jax.Array, start: tuple[int, ...], shape: tuple[int, ...], small: int = _SMALL) -> Lanes:
    on_device = x.sharding.memory_kind in (None, "device") and x.dtype.itemsize in (1, 2, 4)
    whole = x.dtype.kind in "fiub" or x.dtype == jnp.bfloat16
    if x.size <= small or not (on_device and whole) or max(shape, default=0) >= 2**32:
        return of_host(np.asarray(x), start, shape)
    # Strides and start are numbers, not constants: equal shards of one shape compile once.
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first = sum(a * b for a, b in zip(start, strides, strict=True))
    halves = [jnp.asarray(np.array([n % 2**32, n >> 32], np.uint32)) for n in (first, *strides)]
    wide = math.prod(shape) > 2**32
    sums = np.asarray(_on_device(x, wide, *jax.device_put(halves, x.sharding)))
    return int(sums[0]), int(sums[1])


@functools.partial(jax.jit, static_argnums=1)
def _on_device(x: jax.Array, wide: bool, first: jax.Array, *strides: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        word = x.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        word = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    low = jnp.full(x.shape, first[0], jnp.uint32)
    high = jnp.full(x.shape, first[1], jnp.uint32)
    for axis, stride in enumerate(strides):
        step = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        if not wide:
            low = low + step * stride[0]
            continue
        product_low, product_high = _product(step, stride[0], stride[1])
        total = low + product_low
        high = high + product_high + (total < low).astype(jnp.uint32)
        low = total
    sums = []
    for lane in _LANES:
        place = low * jnp.uint32(lane[1]) + high * jnp.uint32(lane[2])
        sums.append(jnp.sum(_mix(word, place, lane), dtype=jnp.uint32))
    return jnp.stack(sums)


def _product(a: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``a (low + 2**32 high)`` as two words, without 64-bit numbers."""
    mask, half = jnp.uint32(0xFFFF), jnp.uint32(16)
    a0, a1, b0, b1 = a & mask, a >> half, low & mask, low >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    other = a0 * b1 + (middle & mask)
    return a * low, a1 * b1 + (middle >> half) + (other >> half) + a * high

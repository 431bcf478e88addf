"""Passes over one leaf of a basis in numpy arrays ``[rows, entries]``; sums over blocks in float64."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BLOCK = 1 << 17  # numbers of the basis that are looked at together: they stay in the cache
_LARGE = (
    1 << 20
)  # entries from which on several threads share a pass: one core does not use all of the memory's speed


def _blocks(size: int, rows: int) -> list[slice]:
    step = min(max(_BLOCK // max(rows, 1), 1024), 8192)  # float32 sums within a block stay short
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


@functools.cache
def _threads() -> ThreadPoolExecutor | None:
    cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
    return ThreadPoolExecutor(cores, "fisher_jax passes") if cores > 1 else None


def _each(body: Callable[[int, slice], None], size: int, rows: int) -> None:
    """``body(number, block)`` for all blocks, which must not depend on each other."""
    parts = list(enumerate(_blocks(size, rows)))
    pool = _threads() if size >= _LARGE else None
    if pool is None:
        for number, part in parts:
            body(number, part)
        return
    share = -(-len(parts) // pool._max_workers)
    runs = [parts[i : i + share] for i in range(0, len(parts), share)]

    def go(run: list) -> None:
        for number, part in run:
            body(number, part)

    list(pool.map(go, runs))


def write(row: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """``row[:] = scale v``; what is stored, in the memory of ``v`` where it may be written."""
    out = v if v.flags.writeable else np.empty_like(v)
    factor = np.asarray(scale, v.dtype)

    def body(number: int, part: slice) -> None:
        del number
        np.multiply(v[part], factor, out=out[part])
        row[part] = out[part]
        if row.dtype != out.dtype:
            out[part] = row[part]

    _each(body, v.size, 1)
    return out


def project(x: np.ndarray, v: np.ndarray, rows: int) -> np.ndarray:
    """``x[:rows] @ v``."""
    sums = np.zeros((len(_blocks(v.size, rows)), rows))  # added in the same order on any number of threads

    def body(number: int, part: slice) -> None:
        sums[number] = x[:rows, part].astype(v.dtype, copy=False) @ v[part]

    _each(body, v.size, rows)
    return sums.sum(axis=0)


def subtract(x: np.ndarray, v: np.ndarray, coefficients: np.ndarray, measure: bool) -> tuple[np.ndarray, np.ndarray]:
    """``w = v - coefficients @ x[:rows]``, and ``x[:rows] @ w`` (zeros without ``measure``), ``w @ w`` appended."""
    rows, out = len(coefficients), v if v.flags.writeable else np.empty_like(v)
    rounded, used = coefficients.astype(v.dtype), np.flatnonzero(coefficients)
    few, every = len(used) <= 4, slice(0, rows)
    sums = np.zeros((len(_blocks(v.size, rows)), rows + 1))

    def body(number: int, part: slice) -> None:
        left = out[part]
        if few:  # what a three-term recurrence predicts
            left[...] = v[part]
            for i in used:
                left -= rounded[i] * x[i, part].astype(v.dtype, copy=False)
        else:
            np.subtract(v[part], rounded @ x[every, part].astype(v.dtype, copy=False), out=left)
        if measure:
            sums[number, :-1] = x[every, part].astype(v.dtype, copy=False) @ left
        sums[number, -1] = left @ left

    _each(body, v.size, rows)
    return out, sums.sum(axis=0)


def rotate(x: np.ndarray, rotation: np.ndarray) -> None:
    kept, work = rotation.shape[1], np.promote_types(x.dtype, np.float32) if x.dtype.itemsize > 2 else np.float32
    turn = np.ascontiguousarray(rotation.T.astype(work))

    def body(number: int, part: slice) -> None:
        del number
        x[:kept, part] = turn @ x[:, part].astype(work, copy=False)
        x[kept:, part] = 0

    _each(body, x.shape[1], x.shape[0])

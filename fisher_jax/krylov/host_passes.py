"""Passes over one leaf of a basis in numpy arrays ``[rows, entries]``; sums over blocks in float64."""

import numpy as np

__all__ = ["project", "rotate", "subtract"]

_BLOCK = 1 << 17  # numbers of the basis that are looked at together: they stay in the cache


def _blocks(size: int, rows: int):
    step = min(max(_BLOCK // max(rows, 1), 1024), 8192)  # float32 sums within a block stay short
    return (slice(start, start + step) for start in range(0, size, step))


def project(x: np.ndarray, v: np.ndarray, rows: int) -> np.ndarray:
    sums = np.zeros(rows)
    for part in _blocks(v.size, rows):
        sums += x[:rows, part].astype(v.dtype, copy=False) @ v[part]
    return sums


def subtract(x: np.ndarray, v: np.ndarray, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, out = len(coefficients), v if v.flags.writeable else np.empty_like(v)
    rounded, sums = coefficients.astype(v.dtype), np.zeros(len(coefficients) + 1)
    for part in _blocks(v.size, rows):
        block = x[:rows, part].astype(v.dtype, copy=False)
        left = np.subtract(v[part], rounded @ block, out=out[part])
        sums[:-1] += block @ left
        sums[-1] += float(left @ left)
    return out, sums


def rotate(x: np.ndarray, rotation: np.ndarray) -> None:
    kept, work = rotation.shape[1], np.promote_types(x.dtype, np.float32) if x.dtype.itemsize > 2 else np.float32
    turn = np.ascontiguousarray(rotation.T.astype(work))
    for part in _blocks(x.shape[1], x.shape[0]):
        x[:kept, part] = turn @ x[:, part].astype(work, copy=False)
    x[kept:] = 0

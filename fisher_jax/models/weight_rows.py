"""Rows of stored tensors: which of them a parameter needs, read a block at a time."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from fisher_jax._support.errors import InputError

__all__ = ["Rows", "TensorFile", "aligned", "blocks", "fill", "spans"]

# Numbers that are read, dequantised and checked at a time.
BLOCK = 2**21


class TensorFile(Protocol):
    """One or several weight files: what is in them, and each tensor as it lies there."""

    label: str
    names: frozenset[str]
    shapes: dict[str, tuple[int, ...]]

    def stored(self, name: str) -> np.ndarray:
        """The tensor mapped into memory: numbers, or for quantised ones the bytes of each row along the last axis."""
        ...

    def values(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The numbers of some rows of `stored`, or of parts of them."""
        ...

    def unit(self, name: str) -> tuple[int, int]:
        """How many numbers are quantised together, and their bytes."""
        ...


class Rows(NamedTuple):
    """A tensor mapped into memory and the order in which its rows are wanted; nothing is read before it is asked for.

    Attributes:
        tensor: kernels as ``[out, in]``.
        order: numbers of rows; ``None``: all, as they are.
    """

    tensor: np.ndarray
    order: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.order is None else (len(self.order), *self.tensor.shape[1:])

    @property
    def are_bytes(self) -> bool:
        """Those of quantised numbers."""
        return self.tensor.dtype == np.uint8

    def at(self, where: tuple[Any, ...]) -> np.ndarray:
        """What lies at an index of numbers and slices."""
        if self.order is None:
            return self.tensor[where]
        first, *others = where
        return self.tensor[(self.order[first], *others)]


def fill(target: np.ndarray, file: TensorFile, name: str, rows: Rows, where: tuple[slice, ...]) -> None:
    """Writes a part of a tensor into an array, a block at a time; an ``InputError`` where it is not finite.

    Args:
        where: the part, with a beginning and an end along every axis.
    """
    bad, columns, inner = 0, where[-1], slice(None)
    if rows.are_bytes:
        columns, inner = in_units(columns, *file.unit(name))
    for block in blocks(target.shape):
        part = moved(block, where) if target.ndim > 1 else ()
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            values = file.values(name, rows.at((*part, columns)))[..., inner].astype(target.dtype, copy=False)
        bad += values.size - int(np.count_nonzero(np.isfinite(values)))
        target[block] = values
    if bad:
        raise InputError(f"{name} in {file.label} has {bad} values that are NaN or infinite; the file is damaged")


def in_units(columns: slice, numbers: int, size: int) -> tuple[slice, slice]:
    """The bytes of all units in which these columns lie, and the columns among their numbers."""
    first, last = columns.start // numbers, -(-columns.stop // numbers)
    inner = slice(columns.start - first * numbers, columns.stop - first * numbers)
    return slice(first * size, last * size), inner


def moved(block: tuple[Any, ...], where: tuple[slice, ...]) -> tuple[Any, ...]:
    """The index in a tensor of a block of its part ``where``."""
    *place, rows = block
    first = where[len(place)]
    start, stop = first.start + rows.start, min(first.start + rows.stop, first.stop)
    return (*(whole.start + i for i, whole in zip(place, where, strict=False)), slice(start, stop))


def spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Beginning and end along every axis of a part of an array."""
    rest = (slice(None),) * (len(shape) - len(index))
    return tuple(one.indices(size)[:2] for one, size in zip((*index, *rest), shape, strict=True))


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Indices of the rows of an array, together at most `BLOCK` numbers where a row is not longer."""
    if len(shape) < 2:
        yield (slice(None),)
        return
    step = max(1, BLOCK // max(1, shape[-1]))
    for place in np.ndindex(shape[:-2]):
        for start in range(0, shape[-2], step):
            yield (*place, slice(start, start + step))


def aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array without values that `jax.device_put` takes over on the CPU, where it would copy any other."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)

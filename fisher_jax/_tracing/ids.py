"""Whose row and whose position every entry of an array is.

An id lies along the axes that it varies over and has length 1 along all others, so that it is never as large as an
activation. Layout operations act on ids as on values; products and reductions drop the ids of the axes that they
sum over; everything else needs equal ids, or loses them, and says where.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["NOBODY", "Carried", "Ids", "Link", "Lost", "LostError", "along", "compressed", "joined", "placed"]

# Of an entry that belongs to no row: it agrees with any.
NOBODY = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Ids:
    """Ids of one kind.

    Attributes:
        kind: what is counted: ``row``, ``position``.
        values: int32, with the axes of enclosing loops first and then those of the array, of length 1 where the id
            does not vary.
    """

    kind: Any
    values: np.ndarray

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes along which the id varies, those of loops counted."""
        return tuple(i for i, n in enumerate(self.values.shape) if n > 1)

    def same(self, other: "Ids") -> bool:
        return self.values.shape == other.values.shape and bool((self.values == other.values).all())


@dataclasses.dataclass(frozen=True)
class Lost:
    """Ids of one kind that could not be followed: the operation, its line, and why.

    ``mixed`` ones come from many; added to what has ids, they belong where these do.
    """

    kind: Any
    operation: str
    where: str
    reason: str
    mixed: bool = False

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        return f"{self.operation}{place}: {self.reason}"


Carried = tuple[Ids | Lost, ...]


@dataclasses.dataclass(frozen=True)
class Link:
    """What makes an array depend on rows beside its own, or on its place among them.

    Attributes:
        operation, where, reason: as of `Lost`.
        certain: whether no numbers could undo it; an expert's dispatch joins rows, and may keep them apart.
        mixes: whether other rows count, not the place alone.
        recipe: what is done about it.
    """

    operation: str
    where: str
    reason: str
    certain: bool
    recipe: str = ""
    mixes: bool = True

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        return f"{self.operation}{place} {self.reason}"


class LostError(Exception):
    """Ids cannot be followed; the message says why."""


def placed(values: np.ndarray, axis: int, start: int, size: int, whole: int) -> np.ndarray:
    """Ids of a part of an axis, and of nobody in the rest."""
    shape = list(values.shape)
    shape[axis] = whole
    found = np.full(shape, NOBODY, np.int32)
    found[(slice(None),) * axis + (slice(start, start + size),)] = values
    return found


def along(kind: Any, values: np.ndarray, axes: Sequence[int], ndim: int, loops: int = 0) -> Ids:
    """Ids that lie along some axes of an array of ``ndim`` axes inside of ``loops`` loops."""
    shape = [1] * (loops + ndim)
    for axis, size in zip(axes, values.shape, strict=True):
        shape[loops + axis] = size
    return Ids(kind, compressed(np.asarray(values, np.int32).reshape(shape)))


def compressed(values: np.ndarray) -> np.ndarray:
    """Length 1 along every axis on which nothing varies."""
    for axis, size in enumerate(values.shape):
        if size > 1:
            first = values.take([0], axis)
            if (values == first).all():
                values = first
    return values.copy()


def joined(parts: Sequence[Carried], eqn: Any, line: Callable[[Any], str]) -> Carried:
    """Ids of what is made entry by entry from several operands, whose ids must agree where they meet."""
    kinds = dict.fromkeys(one.kind for part in parts for one in part)
    return tuple(one for kind in kinds for one in _joined_of(kind, parts, eqn, line))


def _joined_of(kind: Any, parts: Sequence[Carried], eqn: Any, line: Callable) -> Carried:
    found: list[Ids] = []
    mixed: Carried = ()
    for one in (x for part in parts for x in part if x.kind == kind):
        if isinstance(one, Lost) and one.mixed:
            mixed = (one,)
            continue
        if isinstance(one, Lost):
            return (one,)
        merged = _added(found, one)
        if merged is None:
            return (Lost(kind, eqn.primitive.name, line(eqn), f"its operands belong to different {kind}s"),)
        found = merged
    return tuple(found) or mixed


def _added(found: list[Ids], one: Ids) -> list[Ids] | None:
    """Ids that lie along axes of their own stand side by side, as those of queries and of keys."""
    for i, other in enumerate(found):
        if other.same(one):
            return found
        a, b = np.broadcast_arrays(one.values, other.values)
        if ((a == b) | (a == NOBODY) | (b == NOBODY)).all():
            both = Ids(one.kind, compressed(np.where(a == NOBODY, b, a)))
            return _added([x for j, x in enumerate(found) if j != i], both)
        if set(one.axes) & set(other.axes) or not (one.axes or other.axes):
            return None
    every = [*found, one]
    if one.kind == "row" and len({bool(x.axes) for x in every}) > 1:
        return None  # one row for all the others to see
    # One position for all, as the first one of a sentence, says nothing beside each one's own.
    return [x for x in every if x.axes] or every

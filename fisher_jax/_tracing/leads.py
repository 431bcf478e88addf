"""Which arguments of a model are led by rows and by positions, where their sizes alone do not say."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

__all__ = ["leads_of"]

Lead = tuple[int, ...]
_LEFT_OUT = 2  # arrays of something else at most; every choice of them costs a trace


def leads_of(function: Callable, arguments: Sequence[Any], lead: Lead) -> list[Lead]:
    """Of each argument the part of ``lead`` (rows, positions) that its own leading axes are.

    An array whose first axis is as long as there are rows may be of something else (``[positions, positions]``
    where a batch has as many rows). Where there are several such arrays, the function is traced for another number
    of rows, and of positions: with all of them longer, or else with as few left out as it takes. What can have more
    positions alone, with the outputs as before, has positions of its own, as the source of a translation has.
    """
    shapes = [tuple(x.shape) for x in arguments]
    rows = [i for i, shape in enumerate(shapes) if lead and shape[:1] == lead[:1]]
    rows = _moving(function, arguments, rows, 0, (1,))
    full = [i for i in rows if len(lead) > 1 and shapes[i][: len(lead)] == lead]
    if len(lead) == 2:
        full = _moving(function, arguments, full, 1, (1, -1))
        full = [i for i in full if not _is_apart(function, arguments, i, lead)] or full
    return [lead if i in full else lead[:1] if i in rows else () for i in range(len(shapes))]


def _moving(function: Callable, arguments: Sequence[Any], where: list[int], axis: int, changes: Lead) -> list[int]:
    """Those of some arguments that can have another length along an axis together, as many as can be."""
    if len(where) < 2:
        return where
    for left in range(min(len(where), _LEFT_OUT + 1)):
        for kept in itertools.combinations(where, len(where) - left):
            if any(_runs(function, arguments, kept, axis, change) for change in changes):
                return list(kept)
    return where  # a program for these sizes alone


def _is_apart(function: Callable, arguments: Sequence[Any], i: int, lead: Lead) -> bool:
    """Whether an argument can have more positions where the outputs have as many as before."""
    found = _outputs(function, arguments, [i], 1, 1)
    return found is not None and all(x.shape[:2] == lead for x in found)


def _runs(function: Callable, arguments: Sequence[Any], where: Sequence[int], axis: int, change: int) -> bool:
    return _outputs(function, arguments, where, axis, change) is not None


def _outputs(
    function: Callable, arguments: Sequence[Any], where: Sequence[int], axis: int, change: int
) -> list | None:
    """Types of the results where some arguments have another length along an axis; ``None`` where it does not run."""

    def other(i: int, x: Any) -> jax.ShapeDtypeStruct:
        shape = list(x.shape)
        if i in where:
            shape[axis] += change
        return jax.ShapeDtypeStruct(shape, x.dtype)

    given = [other(i, x) for i, x in enumerate(arguments)]
    try:
        return jax.tree.leaves(jax.eval_shape(function, given))
    except Exception:
        # Whatever a model raises for sizes that it is not made for.
        return None

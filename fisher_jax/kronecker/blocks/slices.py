"""Kernels that a Python loop takes one by one from an array: ``w[0]``, ``w[1]``, ..., as experts and layers are."""

import dataclasses
from collections.abc import Sequence

from fisher_jax._support.jax_internals import contraction
from fisher_jax._tracing.axes import UntraceableError, trace_axes
from fisher_jax._tracing.uses import Segment, Use

__all__ = ["in_order", "is_sliced", "joined"]


def joined(uses: Sequence[Use]) -> Use | None:
    """One use of the whole array that keeps its first axis apart; ``None`` where these are not all of its slices."""
    places = [_place(use) for use in uses]
    (first, *others) = uses
    if None in places or sorted(map(int, places)) != list(range(first.segments[0].source.shape[0])):  # type: ignore
        return None
    if any((x.index, x.roles, contraction(x.options)) != (first.index, first.roles, contraction(first.options))
           for x in others):  # fmt: skip
        return None
    contracted, batch = contraction(first.options)
    numbers = (
        tuple(tuple(i + 1 for i in axes) for axes in contracted),
        tuple((0, *(i + 1 for i in axes)) for axes in batch),
    )
    whole = first.segments[0].source
    return dataclasses.replace(
        first, segments=(Segment(whole),), operand=whole, apply=None, roles=("both", *first.roles),
        options={**first.options, "dimension_numbers": numbers}, experts=None,
    )  # fmt: skip


def is_sliced(use: Use, whole: Use | None) -> bool:
    """Whether ``whole`` is of the slices that this is one of."""
    return whole is not None and use.kind == "dense" and len(whole.operand.shape) == len(use.operand.shape) + 1


def in_order(uses: Sequence[Use]) -> list[int]:
    """Of every place of the array the use of its slice."""
    places = [_place(use) for use in uses]
    return [places.index(i) for i in range(len(places))]


def _place(use: Use) -> int | None:
    """The entry of the first axis of the leaf whose slice this is, all of it and its axes in order."""
    shape = use.segments[0].source.shape
    if use.kind != "dense" or use.loops or (use.experts is not None and (use.experts.outputs or use.experts.inputs)):
        return None
    try:
        axes, taken = trace_axes(use)
    except UntraceableError:
        return None
    if set(taken) != {0} or len(axes) != len(shape) - 1:
        return None
    whole = all(len(own) == 1 and own[0].whole and own[0].axis == i and own[0].size == shape[i]
                for i, own in enumerate(axes, 1))  # fmt: skip
    return taken[0] if whole else None

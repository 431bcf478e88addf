"""Moments of consecutive parts of a batch, which were folded side by side, as those of the whole batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import rejection
from fisher_jax._support.lanes import Lanes
from fisher_jax.welford.moments import Fragment, Moments, close, join_fragments, one, select

__all__ = ["in_lanes", "of_parts"]

Tree = Any  # a pytree of arrays


def in_lanes(
    lanes: Lanes, of_lane: Callable[[Tree, Tree], tuple[Moments, Array]], shared: Tree, rows: Tree,
    of_all: Callable[[], tuple[Moments, Array]],
) -> tuple[Moments, Array]:  # fmt: skip
    """Moments of rows and whether all is finite: of every lane, joined, or of all rows where there is one lane."""
    if lanes.number == 1:
        return of_all()
    try:
        found = lanes.each(of_lane, shared, rows)
    except NotImplementedError:  # an operation that does not run side by side
        return of_all()
    return lanes.together(lambda lane: (of_parts(lane[0]), jnp.all(lane[1])), found)


def of_parts(parts: Moments) -> Moments:
    """Moments of a batch from those of its consecutive parts, stacked along a first axis."""
    flags: dict[str, Any] = {"rejected": parts.rejected.max(0), "reasons": rejection.any_of(parts.reasons)}
    if parts.unit == "batch":
        found = one(_pooled(parts.mean, None, parts.weight)[0], parts.weight.sum(), parts.unit)
        return dataclasses.replace(found, scale=parts.scale, **flags)
    if parts.unit == "document":
        parts, ends = _documents_of_parts(parts)
        flags |= ends
    mean, m2 = _pooled(parts.mean, parts.m2, parts.weight)
    square_mean, square_m2 = parts.square_mean, parts.square_m2
    if square_mean is not None:
        square_mean, square_m2 = _pooled(square_mean, square_m2, parts.weight_sq)
    return dataclasses.replace(
        parts, mean=mean, m2=m2, square_mean=square_mean, square_m2=square_m2, weight=parts.weight.sum(),
        weight_sq=parts.weight_sq.sum(), count=parts.count.sum(), **flags,
    )  # fmt: skip


def _pooled(mean: Tree, m2: Tree | None, weight: Array) -> tuple[Tree, Tree]:
    """Chan's formula for all parts at once: two sums over them."""
    total = weight.sum()
    share = weight / jnp.where(total > 0, total, 1)
    pooled = jax.tree.map(lambda x: jnp.sum(_beside(share, x) * x, 0), mean)
    if m2 is None:
        return pooled, None
    spread = jax.tree.map(lambda s, x, p: jnp.sum(s + _beside(weight, x) * (x - p) ** 2, 0), m2, mean, pooled)
    return pooled, spread


def _documents_of_parts(parts: Moments) -> tuple[Moments, dict[str, Any]]:
    """What each part closes, given what the parts before it leave open, and the ends of the whole batch."""
    ends = _Open(select(parts.several, parts.last, parts.first), parts.several)
    open_after = _running(ends)
    before = jax.tree.map(lambda x: _later(x, 1), open_after)
    first, opened = parts.first, before.fragment
    goes_on = (opened.weight > 0) & (first.weight > 0) & (opened.unit_id == first.unit_id)
    breaks = (opened.weight > 0) & (first.weight > 0) & ~goes_on
    earlier = select(goes_on, jax.vmap(join_fragments)(opened, first), select(opened.weight > 0, opened, first))
    closes = parts.several | breaks
    parts = jax.vmap(close)(parts, earlier, closes & before.several)
    parts = jax.vmap(close)(parts, first, parts.several & breaks)
    final = jnp.arange(closes.shape[0]) == closes.shape[0] - 1
    several, last = open_after.several[-1], _picked(open_after.fragment, final)
    opening = _picked(earlier, closes & ~before.several)
    empty = jax.tree.map(jnp.zeros_like, last)
    return parts, {
        "first": select(several, opening, last), "last": select(several, last, empty), "several": several,
    }  # fmt: skip


class _Open(NamedTuple):
    """The document that some rows leave open, and whether another one began before it."""

    fragment: Fragment
    several: Array


def _running(parts: _Open) -> _Open:
    """Of all rows up to the end of each part, in as many steps as the number of parts has bits."""
    step = 1
    while step < parts.several.shape[0]:
        parts = jax.vmap(_after)(jax.tree.map(lambda x, by=step: _later(x, by), parts), parts)
        step *= 2
    return parts


def _after(a: _Open, b: _Open) -> _Open:
    some = (a.fragment.weight > 0) & (b.fragment.weight > 0)
    same = some & ~b.several & (a.fragment.unit_id == b.fragment.unit_id)
    fragment = select(same, join_fragments(a.fragment, b.fragment), b.fragment)
    fragment = select(b.fragment.weight > 0, fragment, a.fragment)
    return _Open(fragment, a.several | b.several | (some & ~same))


def _later(x: Array, by: int) -> Array:
    """Each part has what belongs to the part ``by`` places before it; the first ones have zeros."""
    moved = jnp.roll(x, by, 0)
    return select(jnp.arange(x.shape[0]) >= by, moved, jnp.zeros_like(x))


def _picked(fragments: Fragment, where: Array) -> Fragment:
    """That of the one part where ``where`` is true; zeros if it is true nowhere."""
    chosen = select(where, fragments, jax.tree.map(jnp.zeros_like, fragments))
    return jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), chosen)


def _beside(of_parts: Array, x: Array) -> Array:
    """Numbers of parts, to be broadcast against arrays of parts."""
    return of_parts.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)

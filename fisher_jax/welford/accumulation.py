"""Moments join a state, and states join each other (Chan's formula in pairs)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import compensated
from fisher_jax.welford.moments import Arithmetic, Fragment, Moments, join_fragments, select, union
from fisher_jax.welford.state import State, state_in

Tree = Any  # a pytree of arrays


def _chan(mean: Tree, m2: Tree, weight: Array, other_mean: Tree, other_m2: Tree, other_weight: Array):
    """Chan's merge of pairs; the weights are pairs too."""
    other = compensated.value(other_weight)
    total = compensated.value(compensated.add(weight, other_weight))
    ratio = jnp.where(total > 0, other / jnp.where(total > 0, total, 1), 0)
    between = compensated.value(weight) * ratio

    def merge_mean(a, b):
        high, low = compensated.two_difference(a, b)
        return compensated.add_pair(a, high * ratio.astype(a.dtype), low * ratio.astype(a.dtype))

    def merge_m2(a_m2, b_m2, a, b):
        delta = sum(compensated.two_difference(a, b))
        return compensated.add_pair(compensated.add(a_m2, b_m2), delta * delta * between.astype(a.dtype))

    return jax.tree.map(merge_mean, mean, other_mean), jax.tree.map(merge_m2, m2, other_m2, mean, other_mean)


_PAIRS = Arithmetic(_chan, compensated.add)


def _square(weight: Array) -> Array:
    return compensated.add_pair(compensated.from_value(weight[0] * weight[0]), 2 * weight[0] * weight[1])


def _close(state: State, observation: Fragment, when=True) -> State:
    """Count one finished observation."""
    weight = jnp.where(when, observation.weight, 0)
    zeros = jax.tree.map(jnp.zeros_like, observation.mean)
    present = (compensated.value(weight) > 0).astype(weight.dtype)
    single = State(
        mean=observation.mean, m2=zeros, square_mean=observation.mean, square_m2=zeros, weight=weight,
        weight_sq=_square(weight), count=compensated.from_value(present), open=None, rejected=state.rejected,
        reasons=state.reasons,
    )  # fmt: skip
    return union(state, single, _PAIRS)


def _as_state(moments: Moments) -> State:
    """Moments as pairs with zero corrections."""
    pairs = functools.partial(jax.tree.map, compensated.from_value)
    return State(
        mean=pairs(moments.mean), m2=pairs(moments.m2), square_mean=pairs(moments.square_mean),
        square_m2=pairs(moments.square_m2), weight=pairs(moments.weight), weight_sq=pairs(moments.weight_sq),
        count=pairs(moments.count), open=None, rejected=moments.rejected, reasons=moments.reasons,
        unit=moments.unit, scale=moments.scale,
    )  # fmt: skip


def _fragment(part: Fragment) -> Fragment:
    pairs = functools.partial(jax.tree.map, compensated.from_value)
    return Fragment(pairs(part.mean), pairs(part.weight), part.unit_id)


def _lead(state: State) -> list:
    return [len(x) for x in jax.tree.leaves(state.mean)]


def _errors(state: State) -> bool:
    return state.errors


def _check_alike(a: State, b: State | Moments, one: str, other: str) -> None:
    for name, what in (("unit", "unit of observation"), ("scale", "scale of the statistic")):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(
                f"{one} and {other} differ in the {what}: {getattr(a, name)!r} and {getattr(b, name)!r}; start the "
                f"state with fj.welford.init(moments)"
            )
    if isinstance(b, State):
        for of, what in (
            (_lead, "plain, the other compensated"),
            (_errors, "with standard errors, the other without"),
        ):
            if of(a) != of(b):
                raise ValueError(f"{one} and {other} differ: one is {what}; make both alike with fj.welford.plain")
    if a.errors and a.square_mean is None and b.square_mean is not None:
        raise ValueError(
            f"{other} carry fractional weights (float weights), {one} only weights of 0 and 1; start the state with "
            f"fj.welford.init(moments) of weighted moments, or pass bool weights"
        )
    if jax.tree.structure(a.mean) != jax.tree.structure(b.mean):  # type: ignore[operator]
        raise ValueError(
            f"{one} and {other} have different trees: {jax.tree.structure(a.mean)} and {jax.tree.structure(b.mean)}"
        )
    shapes = [x.shape[1:] for x in jax.tree.leaves(a.mean)]
    others = [x.shape[1:] if isinstance(b, State) else x.shape for x in jax.tree.leaves(b.mean)]
    if shapes != others:
        raise ValueError(f"{one} and {other} have different shapes: {shapes} and {others}")
    dtypes, others = [[x.dtype for x in jax.tree.leaves(t.mean)] for t in (a, b)]
    if dtypes != others:
        raise ValueError(f"{one} and {other} have different dtypes: {dtypes} and {others}")


def add(state: State, moments: Moments) -> State:
    """Join a batch's moments to the state (Chan, Golub and LeVeque 1979, eq. 2.1, compensated).

    Works under ``jit``, with the state donated, in ``scan`` and ``fori_loop``. A document whose rows stand in several
    batches stays one observation. A batch without weight changes nothing; a rejected one changes only ``rejected``
    and ``reasons``.

    Raises:
        ValueError: moments of another unit, scale, tree, shape or dtype than the state.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([1.0, 2.0, 6.0]))
        >>> state = fj.welford.add(fj.welford.init(moments), moments)
        >>> float(fj.welford.mean(state)), fj.welford.count(state)
        (3.0, 3)
    """
    _check_alike(state, moments, "the state", "the moments")
    state, moments = compensated.runtime((state, moments))
    if state.unit == "document":
        opened, first = state.open, _fragment(moments.first)
        present = moments.first.weight > 0
        same = (compensated.value(opened.weight) > 0) & (opened.unit_id == first.unit_id)
        new = _close(state, opened, when=present & ~same)
        current = select(same, join_fragments(opened, first, _PAIRS), first)
        new = _close(new, current, when=moments.several)
        current = select(moments.several, _fragment(moments.last), select(present, current, opened))
        new = dataclasses.replace(union(new, _as_state(moments), _PAIRS), open=current)
    else:
        new = union(state, _as_state(moments), _PAIRS)
    # An empty batch must change nothing, not even the last bit of a correction.
    keep = (moments.rejected != 0) | ((moments.weight == 0) & _no_fragment(moments))
    new = select(keep, state, new)
    return dataclasses.replace(
        new, rejected=state.rejected + moments.rejected, reasons=state.reasons | moments.reasons
    )


def _no_fragment(moments: Moments) -> Array | bool:
    return True if moments.first is None else moments.first.weight == 0


def merge(a: State, b: State) -> State:
    """Both streams as one: joins two runs, or the shards of one run.

    Associative, and independent of the order up to rounding. The streams are taken to hold different observations;
    only where ``b`` consists of one unfinished document with the id of ``a``'s unfinished one are the two joined. Ids
    that were given anew in each run say nothing of another run's: `finish` ``a`` before.

    Raises:
        ValueError: states of another unit, scale, tree, shape or dtype, or one `plain` and the other not.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> one, two = (fj.welford.observe(jnp.array(x)) for x in ([1.0, 2.0], [6.0]))
        >>> a, b = (fj.welford.add(fj.welford.init(x), x) for x in (one, two))
        >>> float(fj.welford.mean(fj.welford.merge(a, b)))
        3.0
    """
    _check_alike(a, b, "the first state", "the second state")
    _check_alike(b, a, "the second state", "the first state")
    a, b = compensated.runtime((a, b))
    rejected, reasons, opened = a.rejected + b.rejected, a.reasons | b.reasons, None
    if a.open is not None:
        alone = compensated.value(b.weight) == 0
        has_a, has_b = (compensated.value(x.open.weight) > 0 for x in (a, b))
        same = alone & has_a & has_b & (a.open.unit_id == b.open.unit_id)
        opened = select(same, join_fragments(a.open, b.open, _PAIRS), select(has_b, b.open, a.open))
        a = _close(a, a.open, when=has_b & ~same)
    return dataclasses.replace(union(a, b, _PAIRS), open=opened, rejected=rejected, reasons=reasons)


def finish(state: State) -> State:
    """The same state, its last document counted: rows that follow belong to other documents, whatever their id.

    For states of separate runs, each of which numbers its documents itself, before `merge`. A state whose unit is not
    the document is returned as it is.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> observed = fj.welford.observe(jnp.array([1.0, 2.0]), unit="document", units=jnp.array([0, 0]))
        >>> monday = tuesday = fj.welford.add(fj.welford.init(observed), observed)  # one document each, number 0
        >>> fj.welford.count(fj.welford.merge(monday, tuesday))
        1
        >>> fj.welford.count(fj.welford.merge(fj.welford.finish(monday), tuesday))
        2
    """
    if state.open is None:
        return state
    empty = jax.tree.map(jnp.zeros_like, state.open)
    return dataclasses.replace(_close(state, state.open), open=empty)


def closed(x: Any) -> State:
    """A state in which every observation is finished, as the read-outs see it."""
    found = state_in(x, State, Moments)
    if found is None:
        raise TypeError(f"expected a Welford state or moments, found {type(x).__name__}")
    if isinstance(found, State):
        return found if found.open is None else dataclasses.replace(_close(found, found.open), open=None)
    state = _as_state(found)
    if found.first is not None:
        state = _close(_close(state, _fragment(found.first)), _fragment(found.last))
    return _without_numbers_where_rejected(state)


def _without_numbers_where_rejected(state: State) -> State:
    """Moments of a batch that cannot be used are NaN."""

    def leaf(x: Array) -> Array:
        rejected = state.rejected.reshape(state.rejected.shape + (1,) * (x.ndim - state.rejected.ndim))
        return jnp.where(rejected != 0, jnp.full_like(x, jnp.nan), x)

    names = ("mean", "m2", "square_mean", "square_m2")
    return dataclasses.replace(state, **{name: jax.tree.map(leaf, getattr(state, name)) for name in names})

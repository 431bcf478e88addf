"""Moments of one batch: weighted mean and squared deviations over observations, and how rows form observations."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Shaped

from fisher_jax._support import compensated, rejection
from fisher_jax._support.dtypes import wide
from fisher_jax._support.outline import outline
from fisher_jax.batch.tokens import unit_ids, weigh

UNITS = ("token", "sequence", "document", "batch")

Tree = Any  # a pytree of arrays


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean", "weight", "unit_id"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Fragment:
    """A part of one observation: its weighted mean so far, its weight (0: nothing here) and its id."""

    mean: Tree
    weight: Array
    unit_id: Array

    def __repr__(self) -> str:
        return outline(self)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "mean", "m2", "square_mean", "square_m2", "weight", "weight_sq", "count",
        "first", "last", "several", "rejected", "reasons",
    ],
    meta_fields=["unit", "scale"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of the observations of one batch, ready to be joined to a Welford state.

    Over observations ``u`` with value ``f_u`` and weight ``w_u``:
    ``mean = sum w f / W`` and ``m2 = sum w (f - mean)**2`` with ``W = sum w``.

    Attributes:
        mean, m2: trees of arrays, stored multiplied by ``2**scale`` and ``2**(2 * scale)``.
        square_mean, square_m2: the same with weights ``w**2``, for the standard error. ``None`` where every weight is
            0 or 1, since they are then equal to ``mean`` and ``m2``.
        weight, weight_sq, count: ``sum w``, ``sum w**2``, number of observations of positive weight.
        first, last, several: only for the unit ``document``, whose first and last observation may go on in other
            batches: these two are not in ``mean``. ``several`` is false if they are one, kept in ``first``.
        rejected: 1 if the batch is not usable, with the ``reasons`` as a bit mask (`fisher_jax.check` explains it).
        unit: what one observation is.
        scale: exact power of two that keeps fourth powers of small probabilities above float32's underflow.

    Read it with ``fj.welford.mean``, ``.variance``, ``.standard_error`` or ``.interval``.
    """

    mean: Tree
    m2: Tree
    square_mean: Tree | None
    square_m2: Tree | None
    weight: Array
    weight_sq: Array
    count: Array
    first: Tree  # Fragment | None
    last: Tree  # Fragment | None
    several: Tree  # Array | None
    rejected: Array
    reasons: Array
    unit: str = "token"
    scale: int = 0

    def __repr__(self) -> str:
        return outline(self)


def check_unit(unit: str) -> None:
    if unit not in UNITS:
        raise ValueError(f"unit is one of {', '.join(UNITS)}, found {unit!r}")


def plain_chan(mean, m2, weight, other_mean, other_m2, other_weight):
    """Moments of the union of two sets (Chan, Golub and LeVeque 1979), leaf by leaf, in the arrays' own dtype."""
    total = weight + other_weight
    ratio = jnp.where(total > 0, other_weight / jnp.where(total > 0, total, 1), 0)
    delta = jax.tree.map(lambda a, b: b - a, mean, other_mean)
    return (
        jax.tree.map(lambda a, d: a + d * ratio.astype(a.dtype), mean, delta),
        jax.tree.map(lambda a, b, d: a + b + d * d * (weight * ratio).astype(a.dtype), m2, other_m2, delta),
    )


def select(flag, if_true, if_false):
    """``jnp.where`` over whole trees; a flag ``[N]`` chooses among ``N`` that are stacked."""

    def choose(a, b):
        return jnp.where(jnp.reshape(flag, jnp.shape(flag) + (1,) * (jnp.ndim(a) - jnp.ndim(flag))), a, b)

    return jax.tree.map(choose, if_true, if_false)


class Arithmetic(NamedTuple):
    """How moments are merged and weights added: those of a batch as plain numbers, those of a state as pairs."""

    chan: Callable[..., tuple[Tree, Tree]]
    add: Callable[[Array, Array], Array]


PLAIN = Arithmetic(plain_chan, operator.add)


def join_fragments(a: Fragment, b: Fragment, by: Arithmetic = PLAIN) -> Fragment:
    """Both as parts of the observation that ``b`` belongs to."""
    zeros = jax.tree.map(jnp.zeros_like, a.mean)
    mean, _ = by.chan(a.mean, zeros, a.weight, b.mean, zeros, b.weight)
    return Fragment(mean, by.add(a.weight, b.weight), b.unit_id)


class Fold:
    """Rows of one batch on their way to moments: a scan carry (see `start`, `fold`, `finish`)."""

    def __init__(self, moments: Moments, current: Any):  # Fragment | None
        self.moments, self.current = moments, current


jax.tree_util.register_pytree_node(
    Fold, lambda f: ((f.moments, f.current), None), lambda _, children: Fold(*children)
)


def start(like: Tree, unit: str, scale: int = 0) -> Fold:
    """An empty fold for row values shaped like ``like`` (arrays or ShapeDtypeStructs)."""
    check_unit(unit)
    # zeros_like, not zeros: on a mesh of explicit axes a scan's carry keeps the layout of the rows.
    zeros = jax.tree.map(jnp.zeros_like, like)
    zero = jnp.zeros((), jax.tree.leaves(zeros)[0].dtype)
    none = Fragment(zeros, zero, jnp.zeros((), jnp.int32))
    document = unit == "document"
    moments = Moments(
        mean=zeros, m2=zeros, square_mean=zeros, square_m2=zeros, weight=zero, weight_sq=zero, count=zero,
        first=none if document else None, last=none if document else None,
        several=jnp.zeros((), bool) if document else None,
        rejected=jnp.zeros((), jnp.int32), reasons=jnp.zeros((), jnp.int32), unit=unit, scale=scale,
    )  # fmt: skip
    return Fold(moments, none if unit in ("document", "batch") else None)


def close(moments: Moments, observation: Fragment, when=True) -> Moments:
    """Count a finished observation."""
    weight = jnp.where(when, observation.weight, 0)
    zeros = jax.tree.map(jnp.zeros_like, observation.mean)
    single = dataclasses.replace(
        moments, mean=observation.mean, m2=zeros, square_mean=observation.mean, square_m2=zeros, weight=weight,
        weight_sq=weight**2, count=(weight > 0).astype(moments.count.dtype),
    )  # fmt: skip
    return union(moments, single)


def fold(carry: Fold, total: Tree, weight: Array, unit_id: Array) -> Fold:
    """Add one row: ``total`` is the weighted *sum* over its tokens, ``weight`` the sum of their weights.

    A row of weight 0 changes nothing, whatever its id.
    """
    moments, current = carry.moments, carry.current
    safe = jnp.where(weight > 0, weight, 1)
    row = Fragment(jax.tree.map(lambda x: compensated.divide(x, safe), total), weight, unit_id)
    if moments.unit == "sequence":
        return Fold(close(moments, row), None)
    if moments.unit == "batch":
        return Fold(moments, join_fragments(current, row))
    if moments.unit != "document":
        raise ValueError(f"rows do not form observations of unit {moments.unit!r}")
    new = (weight > 0) & (current.weight > 0) & (current.unit_id != unit_id)
    opening = new & ~moments.several
    moments = close(moments, current, when=new & moments.several)
    moments = dataclasses.replace(
        moments, first=select(opening, current, moments.first), several=moments.several | new
    )
    joined = select(new, row, join_fragments(current, row))
    return Fold(moments, select(weight > 0, joined, current))


def finish(carry: Fold) -> Moments:
    """The moments of all rows folded so far."""
    moments, current = carry.moments, carry.current
    if moments.unit == "batch":
        return close(moments, current)
    if moments.unit == "document":
        empty = jax.tree.map(jnp.zeros_like, current)
        return dataclasses.replace(
            moments,
            first=select(moments.several, moments.first, current),
            last=select(moments.several, current, empty),
        )
    return moments


def map_values(moments: Moments, place: Callable[[Tree], Tree]) -> Moments:
    """The same moments with every tree of values through ``place(tree)``."""

    def fragment(part):
        return None if part is None else dataclasses.replace(part, mean=place(part.mean))

    def values(tree):
        return None if tree is None else place(tree)

    return dataclasses.replace(
        moments, mean=values(moments.mean), m2=values(moments.m2), square_mean=values(moments.square_mean),
        square_m2=values(moments.square_m2), first=fragment(moments.first), last=fragment(moments.last),
    )  # fmt: skip


def reject_if(moments: Moments, mask: Array) -> Moments:
    """Mark the batch as not usable if the reason mask or its own values say so."""
    # The largest magnitude is NaN or infinite if any is; asking every entry would materialise a mask.
    finite = functools.reduce(
        jnp.logical_and,
        [
            jnp.isfinite(jnp.max(jnp.abs(x), initial=0))
            for x in jax.tree.leaves(moments)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ],
    )
    mask = mask | rejection.reason_mask(non_finite=~finite)
    return dataclasses.replace(moments, rejected=(mask != 0).astype(jnp.int32), reasons=mask)


def observe(
    values: Tree,
    weights: Shaped[ArrayLike, " observations"] | None = None,
    *,
    unit: str = "token",
    units: Int[ArrayLike, " observations"] | None = None,
    scale: int = 0,
) -> Moments:
    """Moments of given observations, one per element of the leading axis.

    Args:
        values: a tree of arrays ``[N, ...]``: the observations' values ``f_u``.
        weights: ``[N]``, their weights ``w_u`` (the number of active tokens in each). ``None`` or bool: all weights
            are 0 or 1.
        unit: what one entry is: a token, a sequence, or (with ``units``) a part of a document or of the batch.
        units: ids ``[N]``, for the unit ``document``.
        scale: the values are already multiplied by ``2**scale``.

    Returns:
        `Moments`; statistics are at least float32.

    Raises:
        ValueError: leading axes that differ, or a document unit without ids.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([1.0, 2.0, 6.0]))
        >>> float(fj.welford.mean(moments)), float(fj.welford.variance(moments))
        (3.0, 7.0)
    """
    check_unit(unit)
    values = jax.tree.map(wide, values)
    sizes = {x.shape[:1] for x in jax.tree.leaves(values)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"values have one common leading axis of observations, found {sorted(sizes)}")
    (size,) = sizes.pop()
    binary = weights is None or jnp.asarray(weights).dtype == bool
    dtype = jax.tree.leaves(values)[0].dtype
    weights, bad = weigh(weights, (size,), dtype, "observation")
    values = jax.tree.map(lambda x: jnp.where(_over(weights, x) == 0, 0, x), values)
    if unit in ("document", "batch"):
        ids = unit_ids(unit, units, size)
        totals = jax.tree.map(lambda x: x * _over(weights, x), values)
        like = jax.eval_shape(lambda rows: jax.tree.map(lambda x: x.sum(0), rows), totals)
        carry, _ = jax.lax.scan(
            lambda c, row: (fold(c, *row), None), start(like, unit, scale), (totals, weights, ids)
        )
        return reject_if(finish(carry), bad)
    moments = dataclasses.replace(of_tokens(values, weights), unit=unit, scale=scale)
    if binary and unit == "token":
        moments = dataclasses.replace(moments, square_mean=None, square_m2=None)
    return reject_if(moments, bad)


def of_tokens(values: Tree, weights: Array) -> Moments:
    """Moments of values ``[N, ...]``, each of them one observation, with weights ``[N]`` that are not negative."""
    mean, m2 = _weighted(values, weights)
    square_mean, square_m2 = _weighted(values, weights**2)
    return Moments(
        mean=mean, m2=m2, square_mean=square_mean, square_m2=square_m2, weight=weights.sum(),
        weight_sq=(weights**2).sum(), count=(weights > 0).sum().astype(weights.dtype), first=None, last=None,
        several=None, rejected=jnp.zeros((), jnp.int32), reasons=jnp.zeros((), jnp.int32),
    )  # fmt: skip


def union(a: Any, b: Any, by: Arithmetic = PLAIN) -> Any:
    """Finished observations of both moments, or states, by Chan's formula; all else is that of ``a``."""
    mean, m2 = by.chan(a.mean, a.m2, a.weight, b.mean, b.m2, b.weight)
    square_mean, square_m2 = a.square_mean, a.square_m2
    if square_mean is not None:
        b_mean, b_m2 = (b.mean, b.m2) if b.square_mean is None else (b.square_mean, b.square_m2)
        square_mean, square_m2 = by.chan(square_mean, square_m2, a.weight_sq, b_mean, b_m2, b.weight_sq)
    return dataclasses.replace(
        a, mean=mean, m2=m2, square_mean=square_mean, square_m2=square_m2, weight=by.add(a.weight, b.weight),
        weight_sq=by.add(a.weight_sq, b.weight_sq), count=by.add(a.count, b.count),
    )  # fmt: skip


def one(value: Tree, weight: Array, unit: str = "batch") -> Moments:
    """Moments of a single observation; of weight 0, its value is zero."""
    zeros = jax.tree.map(jnp.zeros_like, value)
    return Moments(
        mean=value, m2=zeros, square_mean=value, square_m2=zeros, weight=weight, weight_sq=weight**2,
        count=(weight > 0).astype(weight.dtype), first=None, last=None, several=None,
        rejected=jnp.zeros((), jnp.int32), reasons=jnp.zeros((), jnp.int32), unit=unit,
    )  # fmt: skip


def from_sums(sums: tuple[Tree | None, ...], weights: Array, scale: int = 0) -> Moments:
    """Token moments from ``sum w f``, ``sum w f**2`` and, if weights are fractional, the same with ``w**2``.

    An ``m2`` below the rounding of its two terms is zero, never negative.
    """
    first, second, square_first, square_second = sums
    mean, m2 = _centred(first, second, weights)
    square_mean, square_m2 = (None, None)
    if square_first is not None:
        square_mean, square_m2 = _centred(square_first, square_second, weights**2)
    return Moments(
        mean=mean, m2=m2, square_mean=square_mean, square_m2=square_m2, weight=weights.sum(),
        weight_sq=(weights**2).sum(), count=(weights > 0).sum().astype(weights.dtype), first=None, last=None,
        several=None, rejected=jnp.zeros((), jnp.int32), reasons=jnp.zeros((), jnp.int32), unit="token", scale=scale,
    )  # fmt: skip


def _centred(first: Tree, second: Tree, weights: Array) -> tuple[Tree, Tree]:
    total = weights.sum()
    safe = jnp.where(total > 0, total, 1)

    def m2(s1, s2):
        square = compensated.divide(s1, safe) * s1
        return jnp.where(s2 - square > 4 * jnp.finfo(s2.dtype).eps * square, s2 - square, 0)

    # In this order each result can take the memory of one sum; the other way XLA keeps a third array.
    squares, first = compensated.runtime((jax.tree.map(m2, first, second), first))
    return jax.tree.map(lambda x: compensated.divide(x, safe), first), squares


def _over(weights: Array, x: Array) -> Array:
    return weights.reshape(weights.shape + (1,) * (x.ndim - 1)).astype(x.dtype)


def _weighted(values: Tree, weights: Array) -> tuple[Tree, Tree]:
    total = weights.sum()
    safe = jnp.where(total > 0, total, 1)
    mean = jax.tree.map(lambda x: compensated.divide((_over(weights, x) * x).sum(0), safe), values)
    m2 = jax.tree.map(lambda x, mu: (_over(weights, x) * (x - mu[None]) ** 2).sum(0), values, mean)
    return mean, m2

"""Streaming weighted mean and variance in compensated float32, merging, and confidence intervals.

Every number that accumulates is a pair (value, correction), stacked on a leading axis of 2 and joined by TwoSum, so
that float32 keeps about 1e-10 over billions of tokens without float64. Where memory is short, `plain` keeps single
numbers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax import compensated
from fisher_jax.moments import Fragment, Moments, check_unit, observe, select

__all__ = [
    "Moments", "State", "add", "confidence_interval", "count", "init", "mean", "merge", "observe", "plain",
    "spread", "standard_error", "total_weight", "variance", "weight",
]  # fmt: skip

Tree = Any  # a pytree of arrays


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "mean", "m2", "square_mean", "square_m2", "weight", "weight_sq", "count", "open", "rejected", "reasons",
    ],
    meta_fields=["unit", "scale", "errors"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class State:
    """What is known of a stream of observations ``f_u`` with weights ``w_u``.

    Attributes:
        mean, m2: ``sum w f / W`` and ``sum w (f - mean)**2``: trees of pairs ``[2, ...]``, multiplied by ``2**scale``
            and ``2**(2 * scale)``.
        square_mean, square_m2: the same with weights ``w**2``, for the standard error; ``None`` where every weight
            is 0 or 1, since they are then equal to the first two.
        weight, weight_sq, count: ``W = sum w``, ``sum w**2`` and the number of observations of positive weight, as
            exact pairs ``[2]``.
        open: for the unit ``document``, the observation that is not finished (not yet in the fields above).
        rejected, reasons: int32, the number of batches left out, and why (`fisher_jax.check`).
        unit, scale: static, see `Moments`.
        errors: static, whether sums for the standard error are kept (`plain`).

    After `plain` the trees have a leading axis of 1 in place of 2.
    """

    mean: Tree
    m2: Tree
    square_mean: Tree | None
    square_m2: Tree | None
    weight: Array
    weight_sq: Array
    count: Array
    open: Tree  # Fragment | None
    rejected: Array
    reasons: Array
    unit: str = "token"
    scale: int = 0
    errors: bool = True


def init(like: Tree, *, unit: str = "token", scale: int = 0) -> State:
    """The state that has seen nothing.

    Args:
        like: `Moments` (or what ``jax.eval_shape`` says of them), whose unit, scale and shapes are taken over; or a
            tree of arrays or ShapeDtypeStructs shaped like the statistic.
        unit, scale: of the observations, where ``like`` does not say.

    Returns:
        A `State` of at least float32: 16 bytes for each entry where the unit is the token and weights are 0 or 1,
        else 32; `plain` makes less of it.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> state = fj.welford.init({"kernel": jnp.zeros((3, 2))})
        >>> state.mean["kernel"].shape
        (2, 3, 2)
    """
    if isinstance(like, Moments):
        unit, scale, tree, squares = like.unit, like.scale, like.mean, like.square_mean is not None
    else:
        check_unit(unit)
        tree, squares = like, True

    def zeros():
        # zeros_like, not zeros: on a mesh of explicit axes the state is laid out as the statistic is.
        tree_zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)), tree)
        return jax.tree.map(compensated.from_value, tree_zeros)

    def scalar():
        return jnp.zeros(2, jnp.promote_types(jax.tree.leaves(tree)[0].dtype, jnp.float32))

    return State(
        mean=zeros(), m2=zeros(), square_mean=zeros() if squares else None, square_m2=zeros() if squares else None,
        weight=scalar(), weight_sq=scalar(), count=scalar(),
        open=Fragment(zeros(), scalar(), jnp.zeros((), jnp.int32)) if unit == "document" else None,
        rejected=jnp.zeros((), jnp.int32), reasons=jnp.zeros((), jnp.int32), unit=unit, scale=scale,
    )  # fmt: skip


def plain(state: State, *, standard_errors: bool = True) -> State:
    """The state in plain float32, for models where there is no room for more: half of the memory.

    Sums are then rounded: after 9e8 heavy-tailed tokens in 2 million batches the mean was off by 8e-5 of itself and
    the variance by 8e-3, where pairs are off by 1e-10. Everything else works as before; states of the two forms do
    not merge.

    Args:
        standard_errors: ``False`` also drops the sums with weights ``w**2``: mean and variance remain, 8 bytes for
            each entry, and `standard_error` raises.

    Raises:
        ValueError: ``standard_errors=True`` of a state that has dropped them.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> fisher = fj.group_fisher(lambda params, x: x @ params["kernel"])
        >>> init = lambda params: fj.welford.plain(fisher.init(params), standard_errors=False)
        >>> lean = fisher._replace(init=jax.jit(init))  # jit: the other state never exists
        >>> state = lean.init({"kernel": jnp.zeros((2, 3))})
        >>> state.mean["kernel"].shape, state.m2["kernel"].shape, state.square_m2
        ((1, 2, 3), (1, 2, 3), None)
    """
    if standard_errors and not state.errors:
        raise ValueError("the state has dropped its sums for standard errors: pass standard_errors=False")

    def single(tree: Tree) -> Tree:
        return jax.tree.map(lambda pair: compensated.value(pair)[None], tree)

    return dataclasses.replace(
        state, mean=single(state.mean), m2=single(state.m2), errors=standard_errors,
        square_mean=single(state.square_mean) if standard_errors else None,
        square_m2=single(state.square_m2) if standard_errors else None,
    )  # fmt: skip


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


def _union(a: State, b: State) -> State:
    """Finished observations of both; open ones, counts of rejections and static fields are those of ``a``."""
    mean, m2 = _chan(a.mean, a.m2, a.weight, b.mean, b.m2, b.weight)
    square_mean, square_m2 = a.square_mean, a.square_m2
    if square_mean is not None:
        b_mean, b_m2 = (b.mean, b.m2) if b.square_mean is None else (b.square_mean, b.square_m2)
        square_mean, square_m2 = _chan(square_mean, square_m2, a.weight_sq, b_mean, b_m2, b.weight_sq)
    return dataclasses.replace(
        a, mean=mean, m2=m2, square_mean=square_mean, square_m2=square_m2,
        weight=compensated.add(a.weight, b.weight), weight_sq=compensated.add(a.weight_sq, b.weight_sq),
        count=compensated.add(a.count, b.count),
    )  # fmt: skip


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
    return _union(state, single)


def _join(a: Fragment, b: Fragment) -> Fragment:
    zeros = jax.tree.map(jnp.zeros_like, a.mean)
    mean, _ = _chan(a.mean, zeros, a.weight, b.mean, zeros, b.weight)
    return Fragment(mean, compensated.add(a.weight, b.weight), b.unit_id)


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
        current = select(same, _join(opened, first), first)
        new = _close(new, current, when=moments.several)
        current = select(moments.several, _fragment(moments.last), select(present, current, opened))
        new = dataclasses.replace(_union(new, _as_state(moments)), open=current)
    else:
        new = _union(state, _as_state(moments))
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
    only where ``b`` consists of one unfinished document with the id of ``a``'s unfinished one are the two joined.

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
        opened = select(same, _join(a.open, b.open), select(has_b, b.open, a.open))
        a = _close(a, a.open, when=has_b & ~same)
    return dataclasses.replace(_union(a, b), open=opened, rejected=rejected, reasons=reasons)


def _closed(x: Any) -> State:
    """A state in which every observation is finished, as the read-outs see it."""
    x = getattr(x, "fisher", x)  # an optax state that keeps a Fisher state (`fj.track_fisher`)
    if isinstance(x, Moments):
        state = _as_state(x)
        if x.first is not None:
            state = _close(_close(state, _fragment(x.first)), _fragment(x.last))
        return state
    if not isinstance(x, State):
        raise TypeError(f"expected a Welford state or moments, found {type(x).__name__}")
    return x if x.open is None else dataclasses.replace(_close(x, x.open), open=None)


def _unscaled(tree: Tree, exponent: int) -> Tree:
    return jax.tree.map(lambda x: x * jnp.asarray(2.0**-exponent, x.dtype), tree)


def mean(x: State | Moments) -> Tree:
    """``sum_u w_u f_u / sum_u w_u``, per weighted token: a tree of the statistic's shapes, at least float32.

    Zero where nothing was observed. An unfinished document counts with what it has.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> float(fj.welford.mean(fj.welford.observe(jnp.array([1.0, 5.0]), jnp.array([3.0, 1.0]))))
        2.0
    """
    state = _closed(x)
    return _unscaled(jax.tree.map(compensated.value, state.mean), state.scale)


def variance(x: State | Moments, kind: str | None = None) -> Tree:
    """Variance of one observation.

    ``kind="frequency"``: ``m2 / (W - 1)``, right only when the unit is the token.
    ``kind="reliability"``: ``m2 / (W - sum w**2 / W)``, for weighted units whose variance does not depend on their
    weight. ``None``: the first for tokens, the second for other units. NaN where it is not defined (one observation).
    This is a spread, not the error of the mean (`standard_error`).

    Raises:
        ValueError: another kind, or ``frequency`` for a unit that is not the token.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> float(fj.welford.variance(fj.welford.observe(jnp.array([1.0, 2.0, 6.0]))))
        7.0
    """
    state = _closed(x)
    kind = kind or ("frequency" if state.unit == "token" else "reliability")
    total = compensated.value(state.weight)
    if kind == "frequency":
        if state.unit != "token":
            raise ValueError(f"kind='frequency' counts tokens; the unit is {state.unit!r}: use kind='reliability'")
        freedom = total - 1
    elif kind == "reliability":
        freedom = total - compensated.value(state.weight_sq) / jnp.where(total > 0, total, 1)
    else:
        raise ValueError(f"kind is 'frequency' or 'reliability', found {kind!r}")
    freedom = jnp.where(freedom > 0, freedom, jnp.nan)
    # Divided before the scale is removed: the quotient is the larger number.
    scaled = jax.tree.map(lambda m2: jnp.maximum(compensated.value(m2), 0) / freedom.astype(m2.dtype), state.m2)
    return _unscaled(scaled, 2 * state.scale)


def standard_error(x: State | Moments) -> Tree:
    """Standard error of the mean for units of unequal weight.

    ``se**2 = n / (n - 1) * sum_u w_u**2 (f_u - mean)**2 / W**2`` over ``n`` observations (the linearised ratio
    estimator, Cochran, Sampling Techniques, 6.3). NaN for fewer than two.

    Raises:
        ValueError: a state that has dropped the sums for it (`plain`).

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([1.0, 3.0]), jnp.array([10.0, 10.0]), unit="sequence")
        >>> float(fj.welford.standard_error(moments))
        1.0
    """
    state = _closed(x)
    if not state.errors:
        raise ValueError(
            "this state keeps no sums for standard errors: it was made by fj.welford.plain(standard_errors=False)"
        )
    total, total_sq, n = (compensated.value(v) for v in (state.weight, state.weight_sq, state.count))
    factor = jnp.where(n > 1, n / jnp.where(n > 1, n - 1, 1), jnp.nan)
    safe = jnp.where(total > 0, total, 1)

    def leaf(mean, m2, square_mean, square_m2):
        shift = sum(compensated.two_difference(mean, square_mean))
        squares = compensated.value(square_m2) + total_sq.astype(mean.dtype) * shift * shift
        return jnp.sqrt(factor.astype(mean.dtype) * jnp.maximum(squares, 0)) / safe.astype(mean.dtype)

    squares = (state.mean, state.m2) if state.square_mean is None else (state.square_mean, state.square_m2)
    return _unscaled(jax.tree.map(leaf, state.mean, state.m2, *squares), state.scale)


def confidence_interval(x: State | Moments, level: float = 0.95) -> tuple[Tree, Tree]:
    """``mean -+ t * standard_error`` with Student's t quantile at ``n - 1`` degrees of freedom, on the host.

    Meant for a corpus, the unit is the document: tokens of a sequence, and sequences of a document, are correlated,
    and intervals from them are too narrow.

    Returns:
        ``(lower, upper)``: trees of float64 NumPy arrays. The lower end can be negative: it is not clipped.

    Raises:
        ValueError: a level outside (0, 1).

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> lower, upper = fj.welford.confidence_interval(fj.welford.observe(jnp.array([1.0, 2.0, 6.0])))
        >>> round(float(lower), 3), round(float(upper), 3)
        (-3.572, 9.572)
    """
    if not 0 < level < 1:
        raise ValueError(f"level is a probability between 0 and 1, found {level}")
    import scipy.stats  # slow to import, and wanted here only

    n = count(x)
    quantile = scipy.stats.t.ppf(0.5 + level / 2, n - 1) if n > 1 else np.nan
    centre = jax.tree.map(lambda v: np.asarray(v, np.float64), mean(x))
    half = jax.tree.map(lambda v: quantile * np.asarray(v, np.float64), standard_error(x))
    return jax.tree.map(np.subtract, centre, half), jax.tree.map(np.add, centre, half)


def spread(x: State | Moments, num_std: float = 1.96) -> tuple[Tree, Tree]:
    """``mean -+ num_std * std``: where single observations lie. Not a confidence interval of the mean.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> lower, upper = fj.welford.spread(fj.welford.observe(jnp.array([1.0, 3.0])), num_std=1.0)
        >>> round(float(lower), 3), round(float(upper), 3)
        (0.586, 3.414)
    """
    centre, std = mean(x), jax.tree.map(jnp.sqrt, variance(x))
    return (
        jax.tree.map(lambda c, s: c - num_std * s, centre, std),
        jax.tree.map(lambda c, s: c + num_std * s, centre, std),
    )


def count(x: State | Moments) -> int:
    """Number of observations with weight, exact, on the host.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> fj.welford.count(fj.welford.observe(jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 0.0, 2.5])))
        2
    """
    return round(float(np.asarray(_closed(x).count, np.float64).sum()))


def total_weight(x: State | Moments) -> Array:
    """``sum w`` as a scalar array, also inside ``jit``.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 0.0, 2.5]))
        >>> jax.jit(fj.welford.total_weight)(moments).item()
        3.5
    """
    return compensated.value(_closed(x).weight)


def weight(x: State | Moments) -> float:
    """``sum w``: the number of weighted tokens, exact up to 2**48, on the host.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> fj.welford.weight(fj.welford.observe(jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 0.0, 2.5])))
        3.5
    """
    return float(np.asarray(_closed(x).weight, np.float64).sum())

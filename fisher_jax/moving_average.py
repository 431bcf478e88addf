"""Exponential moving average with exact bias correction, where recency matters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax import welford
from fisher_jax._support.dtypes import wide_dtype
from fisher_jax._support.outline import outline
from fisher_jax.welford.estimator import FisherEstimator
from fisher_jax.welford.moments import Moments, select

__all__ = ["MovingAverage", "add", "ema", "init", "mean"]

Tree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["average", "weight", "rejected", "reasons"],
    meta_fields=["decay"],
)
@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """An exponential moving average of weighted batches.

    Attributes:
        average: ``N / D`` with ``N <- decay N + (1 - decay) w f`` and ``D <- decay D + (1 - decay) w``: already
            corrected for the start.
        weight: ``D``.
        rejected, reasons: as in a Welford state.
        decay: static, per update.
    """

    average: Tree
    weight: Array
    rejected: Array
    reasons: Array
    decay: float = 0.99

    def __repr__(self) -> str:
        return outline(self)


def init(like: Tree, decay: float) -> MovingAverage:
    """The average that has seen nothing; ``like`` as in ``fj.welford.init``.

    Raises:
        ValueError: a decay outside [0, 1).

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> fj.moving_average.init({"kernel": jnp.ones((3, 2))}, decay=0.9).average["kernel"].shape
        (3, 2)
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is the share of the past that stays, in [0, 1), found {decay}")
    tree = like.mean if isinstance(like, Moments) else like
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, wide_dtype(x.dtype)), tree)
    zero = jnp.zeros((), jax.tree.leaves(zeros)[0].dtype)
    # One array for both counters could not be donated: a buffer is given away once.
    return MovingAverage(zeros, zero, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), float(decay))


def add(state: MovingAverage, moments: Moments) -> MovingAverage:
    """One update. A batch without weight changes nothing; a rejected one is counted and changes nothing else.

    The average moves by ``(f - average) (1 - decay) w / D``, so a constant stream reads back that very constant from
    the first step on.

    Raises:
        ValueError: moments of another tree, shape or dtype than the state.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([0.1, 0.3]))
        >>> state = fj.moving_average.add(fj.moving_average.init(moments, decay=0.9), moments)
        >>> bool(fj.moving_average.mean(state) == fj.welford.mean(moments))
        True
    """
    _check_alike(state.average, moments.mean)
    batch_mean, batch_weight = welford.mean(moments), welford.total_weight(moments)
    weight = state.decay * state.weight + (1 - state.decay) * batch_weight
    rate = jnp.where(weight > 0, (1 - state.decay) * batch_weight / jnp.where(weight > 0, weight, 1), 0)
    # At the first step the quotient is 1 up to rounding; exactly 1 is what it means.
    rate = jnp.where(state.weight > 0, rate, 1)
    average = jax.tree.map(lambda a, f: a + (f - a) * rate.astype(a.dtype), state.average, batch_mean)
    use = (moments.rejected == 0) & (batch_weight > 0)
    average, weight = select(use, (average, weight), (state.average, state.weight))
    return dataclasses.replace(
        state, average=average, weight=weight, rejected=state.rejected + moments.rejected,
        reasons=state.reasons | moments.reasons,
    )  # fmt: skip


def _check_alike(average: Tree, other: Tree) -> None:
    if jax.tree.structure(average) != jax.tree.structure(other):  # type: ignore[operator]
        raise ValueError(
            f"the average and the moments have different trees: {jax.tree.structure(average)} and "
            f"{jax.tree.structure(other)}; start the average with fj.moving_average.init(moments, decay)"
        )
    found = [[(x.shape, x.dtype.name) for x in jax.tree.leaves(t)] for t in (average, other)]
    if found[0] != found[1]:
        raise ValueError(
            f"the average and the moments have different shapes or dtypes: {found[0]} and {found[1]}; start the "
            f"average with fj.moving_average.init(moments, decay)"
        )


def mean(state: MovingAverage) -> Tree:
    """The average per weighted token; zero where nothing was observed.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([[1.0, 2.0], [3.0, 2.0]]))
        >>> state = fj.moving_average.add(fj.moving_average.init(moments, decay=0.9), moments)
        >>> fj.moving_average.mean(state).tolist()
        [2.0, 2.0]
    """
    return state.average


def ema(estimator: FisherEstimator, decay: float) -> FisherEstimator:
    """The same estimator, exponentially averaged over updates instead of accumulated.

    Args:
        estimator: any `FisherEstimator`.
        decay: what is left of an update's weight after the next one; the last ``1 / (1 - decay)`` count most.

    Returns:
        A `FisherEstimator` with `MovingAverage` states and the same ``observe``.

    Raises:
        ValueError: a decay outside [0, 1).

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> params = {"embed": jnp.eye(3, 2), "head": jnp.ones((3, 2))}
        >>> estimator = fj.lm_head.estimator(lambda p, x: p["embed"][x], lambda p: p["head"])
        >>> recent = fj.ema(estimator, decay=0.9)
        >>> batch = fj.next_token_batch(jnp.array([[0, 1, 2]]))
        >>> state = recent.update(recent.init(params), params, batch)
        >>> fj.moving_average.mean(state).shape
        (3,)
    """
    init(jnp.zeros(()), decay)

    def start(params):
        pairs = estimator.init(params).mean
        return init(jax.tree.map(lambda pair: pair[0], pairs), decay)

    def update(state, params, batch, key=None, **given):
        return add(state, estimator.observe(params, batch, key, **given))

    return FisherEstimator(start, estimator.observe, update, add)

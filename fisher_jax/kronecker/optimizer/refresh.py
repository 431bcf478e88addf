"""The state of K-FAC, and when its statistics and factors are renewed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fisher_jax._support.outline import outline
from fisher_jax.kronecker.curvature.decomposition import BlockFactors
from fisher_jax.kronecker.options import Curvature, Refresh
from fisher_jax.kronecker.statistics.averaging import averaged
from fisher_jax.kronecker.statistics.observation import Observation

__all__ = ["KFACState", "check_together", "renewed"]


class KFACState(NamedTuple):
    """State of `scale_by_kfac`: a pytree of arrays.

    Attributes:
        blocks: `BlockFactors` of every block.
        step: int32, updates seen.
        age: int32, updates that these factors have served; -1 before there are any.
        rejected: int32, updates with a batch or gradients that cannot be used; read it with ``fj.check``.
        reasons: int32 bits, why.
        raw: sums that stay between refreshes, with ``statistics_period`` or ``factor_decay``; else ``None``.
        raw_age: int32, updates since the last statistics; -1 before there are any.
    """

    blocks: tuple[BlockFactors, ...]
    step: Array
    age: Array
    rejected: Array
    reasons: Array
    raw: Observation | None = None
    raw_age: Any = None

    def __repr__(self) -> str:
        return outline(self)


def check_together(curvature: Curvature, refresh: Refresh) -> None:
    """Raise where such a curvature cannot be refreshed in this way."""
    if refresh.factor_decay is not None and curvature.estimator == "exact_head":
        raise ValueError(
            "estimator='exact_head' has a closed form for one batch, not for an average: leave out factor_decay, or "
            "use estimator='sampled'"
        )
    if curvature.eigenvalue_correction and refresh.keeps_statistics:
        raise ValueError(
            "eigenvalue_correction projects the batch that the bases come from: leave out statistics_period and "
            "factor_decay"
        )


def renewed(build: Callable, state: KFACState, seen: Callable, how: Refresh) -> tuple[KFACState, Array]:
    """Fresh factors where they are due and the batch can be used, and why it cannot."""
    state = _due_early(state, how)
    state, bad = (_from_kept if how.keeps_statistics else _from_batch)(build, state, seen, how)
    return state._replace(step=optax.safe_increment(state.step)), bad


def _due_early(state: KFACState, how: Refresh) -> KFACState:
    """Ages as those of factors that are due, where they are older than the ramp allows."""
    if not isinstance(how.ramp, int):
        return state
    early = state.age > state.step // how.ramp
    age = jnp.where(early, jnp.maximum(state.age, how.period), state.age)
    if state.raw_age is None:
        return state._replace(age=age)
    raw_age = jnp.where(early, jnp.maximum(state.raw_age, how.statistics_period or how.period), state.raw_age)
    return state._replace(age=age, raw_age=raw_age)


def _from_batch(build: Callable, state: KFACState, seen: Callable, how: Refresh) -> tuple[KFACState, Array]:
    def fresh(old):
        found = seen()
        usable = (found.bad == 0) & (found.weight > 0)
        new = jax.lax.cond(usable, lambda: build(found), lambda: old)
        return new, usable, found.bad

    def stale(old):
        return old, jnp.zeros((), bool), jnp.zeros((), jnp.int32)

    blocks, ready, bad = jax.lax.cond(_due(state.age, how.period), fresh, stale, state.blocks)
    return state._replace(blocks=blocks, age=_older(state.age, ready)), bad


def _from_kept(build: Callable, state: KFACState, seen: Callable, how: Refresh) -> tuple[KFACState, Array]:
    """Statistics where they are due, and factors from them where those are; none from before a batch refused now."""

    def fresh(old):
        found = seen()
        usable = (found.bad == 0) & (found.weight > 0)
        decay = how.factor_decay
        new = found._replace(bad=jnp.zeros_like(found.bad)) if decay is None else averaged(old, found, decay)
        return jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, old), usable, found.bad

    def stale(old):
        return old, jnp.zeros((), bool), jnp.zeros((), jnp.int32)

    due = _due(state.age, how.period)
    wanted = due if how.statistics_period is None else _due(state.raw_age, how.statistics_period)
    raw, taken, bad = jax.lax.cond(wanted, fresh, stale, state.raw)
    ready = due & (taken | ~wanted)
    blocks = jax.lax.cond(ready, lambda raw, old: build(raw), lambda raw, old: old, raw, state.blocks)
    ages = _older(state.age, ready), _older(state.raw_age, taken)
    return state._replace(blocks=blocks, age=ages[0], raw=raw, raw_age=ages[1]), bad


def _due(age: Array, period: int) -> Array:
    return (age < 0) | (age >= period)


def _older(age: Array, renewed: Array) -> Array:
    return jnp.where(renewed, 1, jnp.where(age < 0, -1, optax.safe_increment(age)))

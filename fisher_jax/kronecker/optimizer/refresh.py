"""The state of K-FAC, and when its statistics and factors are renewed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fisher_jax.kronecker.curvature.decomposition import BlockFactors
from fisher_jax.kronecker.statistics.averaging import averaged
from fisher_jax.kronecker.statistics.observation import Observation

__all__ = ["KFACState", "check_periods", "refresh", "refresh_raw"]


class KFACState(NamedTuple):
    """State of `scale_by_kfac`: a pytree of arrays.

    Attributes:
        blocks: `BlockFactors` of every block.
        step: int32, updates seen.
        age: int32, updates that these factors have served; -1 before there are any.
        rejected: int32, updates with a batch or gradients that cannot be used; read it with ``fj.check``.
        reasons: int32 bits, why.
        raw: sums that stay between refreshes, with ``statistics_freq`` or ``factor_decay``; else ``None``.
        raw_age: int32, updates since the last statistics; -1 before there are any.
    """

    blocks: tuple[BlockFactors, ...]
    step: Array
    age: Array
    rejected: Array
    reasons: Array
    raw: Observation | None = None
    raw_age: Any = None


def check_periods(
    fisher: str, corrected: Any, update_freq: Any, statistics_freq: Any, decay: Any, rank: int | None
) -> bool:
    """Whether statistics stay in the state."""
    if statistics_freq is not None and not (isinstance(statistics_freq, int) and 1 <= statistics_freq <= update_freq):
        raise ValueError(
            f"statistics_freq is a whole number from 1 to update_freq={update_freq}, found {statistics_freq!r}"
        )
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"factor_decay is the share of the past that stays, in [0, 1), found {decay}")
    if rank is not None and (decay is None or rank < 1):
        raise ValueError(f"factor_rank is at least 1 and belongs to factor_decay=, found {rank}")
    if decay is not None and fisher == "exact_head":
        raise ValueError(
            "the true Fisher of a head has a closed form for one batch, not for an average: leave out factor_decay, "
            "or use estimator='sampled'"
        )
    keeps = statistics_freq is not None or decay is not None
    if corrected and keeps:
        raise ValueError(
            "eigenvalue_correction projects the batch that the bases come from: leave out statistics_freq and "
            "factor_decay"
        )
    return keeps


def refresh(build: Callable, state: KFACState, seen: Callable, update_freq: int) -> tuple[KFACState, Array]:
    """Fresh factors where they are due and the batch can be used, and why it cannot."""

    def fresh(old):
        found = seen()
        usable = (found.bad == 0) & (found.weight > 0)
        new = jax.lax.cond(usable, lambda: build(found), lambda: old)
        return new, usable, found.bad

    def stale(old):
        return old, jnp.zeros((), bool), jnp.zeros((), jnp.int32)

    due = _due(state.age, update_freq)
    blocks, renewed, bad = jax.lax.cond(due, fresh, stale, state.blocks)
    return state._replace(blocks=blocks, step=optax.safe_increment(state.step), age=_older(state.age, renewed)), bad


def refresh_raw(
    build: Callable, state: KFACState, seen: Callable, update_freq: int, statistics_freq: int | None, decay: Any
) -> tuple[KFACState, Array]:
    """Statistics where they are due, and factors from them where those are; none from before a batch refused now."""

    def fresh(old):
        found = seen()
        usable = (found.bad == 0) & (found.weight > 0)
        new = found._replace(bad=jnp.zeros_like(found.bad)) if decay is None else averaged(old, found, decay)
        return jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, old), usable, found.bad

    def stale(old):
        return old, jnp.zeros((), bool), jnp.zeros((), jnp.int32)

    due = _due(state.age, update_freq)
    wanted = due if statistics_freq is None else _due(state.raw_age, statistics_freq)
    raw, renewed, bad = jax.lax.cond(wanted, fresh, stale, state.raw)
    ready = due & (renewed | ~wanted)
    blocks = jax.lax.cond(ready, lambda raw, old: build(raw), lambda raw, old: old, raw, state.blocks)
    ages = _older(state.age, ready), _older(state.raw_age, renewed)
    step = optax.safe_increment(state.step)
    return state._replace(blocks=blocks, step=step, age=ages[0], raw=raw, raw_age=ages[1]), bad


def _due(age: Array, freq: int) -> Array:
    return (age < 0) | (age >= freq)


def _older(age: Array, renewed: Array) -> Array:
    return jnp.where(renewed, 1, jnp.where(age < 0, -1, optax.safe_increment(age)))

"""Measure while training: an optax transformation that passes updates through and keeps a Fisher state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisher_jax._support.masked import is_masked
from fisher_jax._support.outline import outline
from fisher_jax.batch import Batch
from fisher_jax.welford.estimator import FisherEstimator
from fisher_jax.welford.moments import Moments, map_values

__all__ = ["TrackFisherState", "track_fisher"]


class TrackFisherState(NamedTuple):
    """State of `track_fisher`.

    Attributes:
        fisher: the estimator's own state, to be read with ``fj.mean`` and the like.
        step: int32, updates seen.
    """

    fisher: Any
    step: jax.Array

    def __repr__(self) -> str:
        return outline(self)


def track_fisher(estimator: FisherEstimator, period: int = 1) -> optax.GradientTransformationExtraArgs:
    """Accumulate Group Fisher in ``opt_state`` while an optax chain trains.

    Updates pass through unchanged. ``update`` takes extra arguments: ``batch``, and ``key`` where the estimator draws
    random numbers. ``fj.group_fisher``'s ``head`` and ``sequence`` take ``taps`` that the training step has from
    ``fj.value_grad_and_taps`` (``taps_scale=batch.weights.sum()`` for a mean loss), and cost no second backward pass.
    Under ``optax.masked`` and ``multi_transform`` the transformation is given a part of the tree;
    pass the whole as ``model_params`` then, on which the model is run; the state holds the part.

    ``optax.MultiSteps`` keeps only the last micro-batch's inner state: put ``track_fisher`` outside of it, as in
    ``optax.chain(fj.track_fisher(estimator), optax.MultiSteps(optimizer, 4))``.

    Args:
        estimator: from ``fj.group_fisher``, ``fj.lm_head.estimator`` or ``fj.ema``.
        period: observe the first update and every ``period``-th after it.

    Returns:
        An optax transformation with state `TrackFisherState`.

    Raises:
        ValueError: ``period`` below 1, or an update without ``params`` or ``batch``.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp, optax
        >>> apply_fn = lambda params, x: x @ params["kernel"]
        >>> tx = optax.chain(fj.track_fisher(fj.group_fisher(apply_fn)), optax.adamw(1e-3))
        >>> params = {"kernel": jnp.zeros((2, 3))}
        >>> state = tx.init(params)
        >>> batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
        >>> grads = {"kernel": jnp.ones((2, 3))}
        >>> updates, state = tx.update(grads, state, params, batch=batch, key=jax.random.key(0))
        >>> fj.mean(state[0])["kernel"].shape
        (2, 3)
    """
    if period < 1:
        raise ValueError(f"period is at least 1, found {period}")

    def init(params: Any) -> TrackFisherState:
        return TrackFisherState(estimator.init(params), jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: TrackFisherState, params: Any = None, *, batch: Batch | None = None, key: Any = None,
        taps: Any = None, taps_scale: Any = 1.0, model_params: Any = None, **extra: Any,
    ):  # fmt: skip
        del extra
        given = updates if params is None else params
        whole = not any(map(is_masked, jax.tree.leaves(given, is_leaf=is_masked)))
        params = params if model_params is None else model_params
        if params is None or batch is None:
            missing = "params" if params is None else "batch="
            raise ValueError(f"track_fisher needs {missing}: call update(grads, state, params, batch=batch, key=key)")
        if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
            raise ValueError(
                "track_fisher was given a part of the parameters (under optax.masked or multi_transform); pass the "
                "whole tree as model_params="
            )

        given_taps = {} if taps is None else {"taps": taps, "taps_scale": taps_scale}

        def observe(fisher):
            if whole:
                return estimator.update(fisher, params, batch, key, **given_taps)
            if estimator.add is None:
                raise ValueError("an estimator without add= cannot measure a part of the parameters")
            return estimator.add(fisher, _restrict(estimator.observe(params, batch, key, **given_taps), given))

        fisher = jax.lax.cond(state.step % period == 0, observe, lambda fisher: fisher, state.fisher)
        return updates, TrackFisherState(fisher, optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)


def _restrict(moments: Moments, part: Any) -> Moments:
    """Moments of the leaves that are not masked in ``part``."""
    return map_values(moments, lambda tree: jax.tree.map(_unless_masked, part, tree, is_leaf=is_masked))


def _unless_masked(part: Any, x: Any) -> Any:
    return part if is_masked(part) else x

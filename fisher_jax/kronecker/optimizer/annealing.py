"""How far steps may go against the noise of batches: the slope along the last update, seen by the next batch."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

__all__ = ["RateScale", "renewed", "start"]

_WANTED = 0.4  # half is the balance; averages over 10 or 30 updates and a speed of 0.1 or 0.05 gave one curve
_AVERAGE = 0.9
_SPEED = 0.1


class RateScale(NamedTuple):
    """A share of the rate, and what moves it.

    Attributes:
        scale: float32 in (0, 1].
        slope, curvature: float32, running means of ``g . u`` and ``u . C u`` of the last update ``u`` on the batch
            after it, ``C`` the damped curvature.
    """

    scale: Array
    slope: Array
    curvature: Array


def start() -> RateScale:
    return RateScale(*(jnp.full((), x, jnp.float32) for x in (1.0, 0.0, 0.0)))


def renewed(state: RateScale, slope: Array, curvature: Array) -> RateScale:
    """Multiplied by ``exp(0.1 (0.4 - slope / curvature))``, at most 1.

    An update that went as far as the next batch wants leaves a slope of 0 there. Where updates have come to move
    about a minimum, noise and pull in balance, the slope is half of the curvature: the loss does not change in the
    mean, ``0 = g . u_next + u_next . C u_next / 2``, read one step later (Yaida 2019, fluctuation-dissipation
    relations). The scale falls when that balance is near, and rises again while there is progress.
    """
    slope = _AVERAGE * state.slope + (1 - _AVERAGE) * slope
    curvature = _AVERAGE * state.curvature + (1 - _AVERAGE) * curvature
    relation = jnp.where(curvature > 0, slope / jnp.where(curvature > 0, curvature, 1), 0)
    scale = state.scale * jnp.exp(_SPEED * jnp.clip(_WANTED - relation, -1, 1))
    return RateScale(jnp.minimum(scale, 1), slope, curvature)

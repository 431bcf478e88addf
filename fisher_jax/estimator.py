"""What every estimator of Fisher information looks like."""

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["FisherEstimator"]


class FisherEstimator(NamedTuple):
    """Three pure functions, like an optax transformation.

    Attributes:
        init: ``init(params) -> state``.
        observe: ``observe(params, batch, key=None) -> Moments``, of one batch.
        update: ``update(state, params, batch, key=None) -> state``.

    One observation can feed several states: ``observe`` once, then ``fj.welford.add`` and
    ``fj.moving_average.add``.
    """

    init: Callable[[Any], Any]
    observe: Callable[..., Any]
    update: Callable[..., Any]

"""What every estimator of Fisher information looks like."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fisher_jax._support.outline import outline


class FisherEstimator(NamedTuple):
    """Pure functions, in the manner of an optax transformation.

    Attributes:
        init: ``init(params) -> state``.
        observe: ``observe(params, batch, key=None) -> Moments``, of one batch. Some take ``taps=``, ``taps_scale=``.
        update: ``update(state, params, batch, key=None) -> state``: observe and add.
        add: ``add(state, moments) -> state``. One observation can feed several states: ``observe`` once, then
            ``fj.welford.add`` and ``fj.moving_average.add``. ``None`` where that cannot be.
        group_sizes: ``group_sizes(params) -> tree`` like the statistic: how many parameters each group has.
    """

    init: Callable[[Any], Any]
    observe: Callable[..., Any]
    update: Callable[..., Any]
    add: Callable[[Any, Any], Any] | None = None
    group_sizes: Callable[[Any], Any] | None = None

    def __repr__(self) -> str:
        return outline(self)

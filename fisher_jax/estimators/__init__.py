"""`group_fisher` and its ways to per-token squares, measured while training, kept on the host."""

from fisher_jax.estimators.group_fisher import group_fisher
from fisher_jax.estimators.host import on_device, on_host
from fisher_jax.estimators.track import TrackFisherState, track_fisher
from fisher_jax.welford.estimator import FisherEstimator

__all__ = ["FisherEstimator", "TrackFisherState", "group_fisher", "on_device", "on_host", "track_fisher"]

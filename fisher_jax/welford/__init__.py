"""Streaming weighted mean and variance in compensated float32, merging, and confidence intervals.

Every number that accumulates is a pair (value, correction), stacked on a leading axis of 2 and joined by TwoSum, so
that float32 keeps about 1e-10 over billions of tokens without float64. Where memory is short, `plain` keeps single
numbers.
"""

from fisher_jax.welford.accumulation import add, finish, merge
from fisher_jax.welford.estimates import (
    count,
    interval,
    mean,
    spread,
    standard_error,
    total_weight,
    variance,
    weight,
)
from fisher_jax.welford.moments import Moments, observe
from fisher_jax.welford.state import State, init, plain

__all__ = [
    "Moments",
    "State",
    "add",
    "count",
    "finish",
    "init",
    "interval",
    "mean",
    "merge",
    "observe",
    "plain",
    "spread",
    "standard_error",
    "total_weight",
    "variance",
    "weight",
]  # fmt: skip

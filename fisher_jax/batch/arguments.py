"""What every function of a model and a batch checks first: that its arguments stand in their order."""

from collections.abc import Callable
from typing import Any

from fisher_jax.batch.batch import Batch
from fisher_jax.likelihoods import Likelihood

__all__ = ["check_arguments", "check_batch"]


def check_arguments(apply_fn: Callable, likelihood: Likelihood, **batches: Any) -> None:
    """Raise a `TypeError` that names the argument which is something else; batches go by the names they have."""
    if not callable(apply_fn):
        raise TypeError(_sentence("apply_fn", "a function apply_fn(params, inputs)", apply_fn))
    if not isinstance(likelihood, Likelihood):
        raise TypeError(_sentence("likelihood", "a fj.Likelihood, such as fj.categorical", likelihood))
    for name, batch in batches.items():
        check_batch(batch, name)


def check_batch(batch: Any, name: str = "batch") -> None:
    if not isinstance(batch, Batch):
        raise TypeError(_sentence(name, "a fj.Batch", batch))


def _sentence(name: str, wanted: str, found: Any) -> str:
    return f"{name} is {wanted}, found {type(found).__name__}; the order is apply_fn, likelihood, params, batch"

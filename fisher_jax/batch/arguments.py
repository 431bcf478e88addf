"""What every function of a model and a batch checks first: that its arguments stand in their order."""

import functools
from collections.abc import Callable
from typing import Any

from fisher_jax.batch.batch import Batch
from fisher_jax.likelihoods import Likelihood

__all__ = ["check_arguments", "check_batch", "explained"]


def check_arguments(apply_fn: Callable, likelihood: Likelihood, **batches: Any) -> None:
    """Raise a `TypeError` that names the argument which is something else; batches go by the names they have."""
    if not callable(apply_fn):
        raise TypeError(_sentence("apply_fn", "a function apply_fn(params, inputs)", apply_fn))
    if not isinstance(likelihood, Likelihood):
        raise TypeError(_sentence("likelihood", "a fj.Likelihood, such as fj.categorical", likelihood))
    for name, batch in batches.items():
        check_batch(batch, name)


def explained(apply_fn: Callable) -> Callable:
    """The same function, whose attempt to change a module from outside of it says the way out."""

    @functools.wraps(apply_fn, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return apply_fn(*args, **kwargs)
        except Exception as error:
            # By name: the library does not need nnx.
            if type(error).__name__ != "TraceContextError":
                raise
            raise ValueError(
                "the model changes its batch statistics or dropout keys, which live outside of apply_fn: let it "
                f"change a copy, with nnx.merge(graph, params, rest, copy=True) in apply_fn ({error})"
            ) from error

    return run


def check_batch(batch: Any, name: str = "batch") -> None:
    if not isinstance(batch, Batch):
        raise TypeError(_sentence(name, "a fj.Batch", batch))


def _sentence(name: str, wanted: str, found: Any) -> str:
    return f"{name} is {wanted}, found {type(found).__name__}; the order is apply_fn, likelihood, params, batch"

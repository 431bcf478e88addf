"""Rates, dampings and shares: numbers, arrays or schedules, and what each of them may be."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._support import rejection
from fisher_jax._support.jax_internals import is_traced

__all__ = ["at", "check_numbers", "check_scalar", "outside"]

_FINITE = (lambda x: (x >= 0) & (x < math.inf), "at least 0")
# What each may be, and in words.
_RANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "learning_rate": _FINITE,
    "damping": _FINITE,
    "momentum": (lambda x: (x >= 0) & (x < 1), "in [0, 1)"),
    "weight_decay": _FINITE,
    "kl_clip": (lambda x: (x > 0) & (x < math.inf), "positive"),
    "rate_scale": _FINITE,
}


def at(value: Any, step: Array) -> Any:
    """The value of a schedule at this update; a number or an array as it is."""
    return value(step) if callable(value) else value


def check_numbers(**given: Any) -> None:
    """Raise for what is neither a number in its range, nor a scalar array, nor a schedule; ``None`` is not given.

    Values of JAX arrays are looked at in the step, by `outside`.

    Raises:
        ValueError: names the argument and what it takes.
    """
    for name, found in given.items():
        if found is None or callable(found):
            continue
        allowed, words = _RANGES[name]
        sentence = f"{name} is {words}: a number, an array of shape [] or a schedule of the updates so far"
        if isinstance(found, jax.Array | np.ndarray | np.generic):
            if found.shape != () or not jnp.issubdtype(found.dtype, jnp.number):
                raise ValueError(f"{sentence}; found shape {list(found.shape)} and dtype {found.dtype}")
            if isinstance(found, jax.Array):
                continue
        elif not isinstance(found, numbers.Real) or isinstance(found, bool):
            raise ValueError(f"{sentence}; found {found!r}")
        if not allowed(float(found)):
            raise ValueError(f"{sentence}; found {found!r}")


def check_scalar(name: str, found: Any, *, positive: bool) -> None:
    """Raise for what is not one finite number in its range; of traced numbers only the shape is seen."""
    words = "positive" if positive else "at least 0"
    sentence = f"{name} is one number, {words}"
    if isinstance(found, bool) or not isinstance(found, numbers.Real | jax.Array | np.ndarray):
        raise ValueError(f"{sentence}; found {type(found).__name__}")
    array: Any = found
    if jnp.shape(array) != () or not jnp.issubdtype(jnp.result_type(array), jnp.number):
        raise ValueError(f"{sentence}; found shape {list(jnp.shape(array))} and dtype {jnp.result_type(array)}")
    if is_traced(array):
        return
    value = float(array)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{sentence}; found {value:g}")


def outside(**given: Any) -> Array:
    """Reasons to reject an update whose numbers are not in their ranges, as only values show."""
    good = jnp.ones((), bool)
    for name, found in given.items():
        if found is not None:
            good &= _RANGES[name][0](jnp.asarray(found))
    return rejection.reason_mask(option_out_of_range=~good)

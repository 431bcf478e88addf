"""A check, its record, and the verdict on an error."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

RIGHT, WRONG, FAILED, NOT_RUN = "right", "WRONG", "FAILED", "not run"

Leaves = dict[str, Any]  # arrays of NumPy, and its numbers


class Check(NamedTuple):
    """One line of the examination.

    Attributes:
        name: what is looked at.
        measure: ``measure(subject)``: what the library gives here, by path. A test puts something else in its place.
        reference: ``reference(subject)``: what is right.
        slack: the error is expected to be at most ``slack * growth(subject)`` roundings.
        growth: by how much the problem multiplies rounding.
        in_statistics: rounding is that of statistics (float32), whatever the dtype of the parameters.
        quick: whether ``--quick`` keeps it.
        once: only in the first dtype: nothing in it depends on the dtype of the parameters.
    """

    name: str
    measure: Callable[[Any], Leaves]
    reference: Callable[[Any], Leaves]
    slack: float = 2.0
    growth: Callable[[Any], float] = lambda subject: subject.loops.log_size
    in_statistics: bool = False
    quick: bool = False
    once: bool = False


@dataclasses.dataclass(frozen=True)
class Record:
    """What one check found; ``error`` and ``expected`` are relative, of the worst leaf."""

    name: str
    dtype: str
    error: float
    expected: float
    verdict: str
    seconds: float
    worst: str = ""


def examine(check: Check, subject: Any, product_eps: float = 0.0, reduced: str = WRONG) -> Record:
    """Measure and compare. An error that products in ``product_eps`` explain has the verdict ``reduced``."""
    began = time.monotonic()
    try:
        wanted = check.reference(subject)
        error, worst = relative_error(check.measure(subject), wanted)
        scale = check.slack * check.growth(subject)
    except Exception as problem:  # a device may fail in any way, and the other lines are wanted all the more
        said = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        return Record(check.name, subject.dtype, np.nan, np.nan, FAILED, time.monotonic() - began, said[:300])
    expected = scale * rounding(subject, check.in_statistics)
    verdict = RIGHT if error <= expected else reduced if error <= scale * product_eps else WRONG
    return Record(check.name, subject.dtype, error, expected, verdict, time.monotonic() - began, worst)


def rounding(subject: Any, in_statistics: bool) -> float:
    """``eps`` of the parameters once, and of statistics four times, since they are summed over tokens.

    A decoder's norms and logits are in float32, whatever its parameters are.
    """
    sums = 4 * float(jnp.finfo(subject.statistics).eps)
    if in_statistics:
        return sums
    single = float(jnp.finfo(jnp.float32).eps)
    return max(float(jnp.finfo(subject.dtype).eps), single) + max(sums, 4 * single)


def relative_error(found: Leaves, wanted: Leaves) -> tuple[float, str]:
    """The largest ``|found - wanted| / |wanted|`` over the leaves, and its path; NaN where anything is NaN."""
    if found.keys() != wanted.keys():
        raise ValueError(f"results for {sorted(found)}, wanted for {sorted(wanted)}")
    errors = {}
    for path, right in wanted.items():
        if found[path].shape != right.shape:
            raise ValueError(f"{path} has shape {list(found[path].shape)}, wanted {list(right.shape)}")
        size = float(np.linalg.norm(right.ravel()))
        difference = float(np.linalg.norm((found[path] - right).ravel()))
        errors[path] = difference / size if size else difference
    worst = max(errors, key=lambda path: np.inf if np.isnan(errors[path]) else errors[path])
    return errors[worst], worst

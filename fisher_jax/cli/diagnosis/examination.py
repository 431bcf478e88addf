"""All checks in every dtype, one after the other, as long as there is time."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from fisher_jax.cli.diagnosis.arithmetic import PRODUCTS, REDUCED, precision_of_products
from fisher_jax.cli.diagnosis.records import NOT_RUN, WRONG, Check, Record, examine
from fisher_jax.cli.diagnosis.subject import make_subject

__all__ = ["examination"]


def examination(
    checks: Sequence[Check],
    dtypes: Sequence[str],
    seconds_left: Callable[[], float],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Record]:
    """Records of the checks as they are made.

    A check that would probably not end in time, judged by the longest so far, is not begun.
    """
    loops, longest, precision = None, 0.0, WRONG
    for dtype in dtypes:
        subject = make_subject(dtype, loops)
        loops = subject.loops
        for check in checks:
            if check.once and dtype != dtypes[0]:
                continue
            if seconds_left() < longest:
                yield Record(check.name, dtype, float("nan"), float("nan"), NOT_RUN, 0.0)
                continue
            began = clock()
            reduced = precision if dtype == "float32" else WRONG
            record = examine(check, subject, REDUCED.get(reduced, 0.0), reduced)
            if check.name == PRODUCTS and dtype == "float32":
                precision = precision_of_products(record)
                record = dataclasses.replace(record, verdict=precision)
            longest = max(longest, clock() - began)
            yield record

"""All checks in every dtype, one after the other, as long as there is time."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from fisher_jax.cli.diagnosis.arithmetic import PRODUCTS, REDUCED, precision_of_products
from fisher_jax.cli.diagnosis.records import NOT_RUN, WRONG, Check, Record, examine
from fisher_jax.cli.diagnosis.subject import make_subject

__all__ = ["THREAD", "examination", "in_time", "planned"]

THREAD = "checks of fisher-jax doctor"
_TICK = 0.1  # seconds between two looks at the clock, which Ctrl-C waits for as well
_NAN = float("nan")


def planned(checks: Sequence[Check], dtypes: Sequence[str]) -> list[tuple[Check, str]]:
    """Which check runs in which dtype: the quick ones first, then those of every dtype."""
    first = [(check, dtypes[0]) for check in sorted(checks, key=lambda check: (not check.quick, check.once))]
    return first + [(check, dtype) for dtype in dtypes[1:] for check in checks if not check.once]


def examination(plan: Sequence[tuple[Check, str]]) -> Iterator[Record]:
    """Records of the checks as they are made."""
    subject, precision = None, WRONG
    for check, dtype in plan:
        if subject is None or subject.dtype != dtype:
            subject = make_subject(dtype, None if subject is None else subject.loops)
        reduced = precision if dtype == "float32" else WRONG
        record = examine(check, subject, REDUCED.get(reduced, 0.0), reduced)
        if check.name == PRODUCTS and dtype == "float32":
            precision = precision_of_products(record)
            record = dataclasses.replace(record, verdict=precision)
        yield record


def in_time(
    plan: Sequence[tuple[Check, str]],
    records: Callable[[], Iterator[Record]],
    seconds_left: Callable[[], float],
) -> Iterator[Record]:
    """The records, and where time is up one that says so for each that is missing: a driver may hang as well.

    They are made in a thread, which is left behind when time is up.
    """
    found: queue.Queue = queue.Queue()

    def make() -> None:
        try:
            for record in records():
                found.put(record)
        except BaseException as problem:
            found.put(problem)

    threading.Thread(target=make, name=THREAD, daemon=True).start()
    for number, _ in enumerate(plan):
        record = None
        while record is None and seconds_left() > 0:
            try:
                record = found.get(timeout=_TICK)
            except queue.Empty:
                continue
        if record is None:
            yield from (Record(check.name, dtype, _NAN, _NAN, NOT_RUN, 0.0) for check, dtype in plan[number:])
            return
        if isinstance(record, BaseException):
            raise record
        yield record

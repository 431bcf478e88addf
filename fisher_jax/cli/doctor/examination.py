"""All checks in every dtype, as long as there is time."""

import dataclasses
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fisher_jax.cli.doctor import arithmetic, closed_form, curvature, estimators, storage
from fisher_jax.cli.doctor.arithmetic import PRODUCTS, REDUCED, precision_of_products
from fisher_jax.cli.doctor.records import NOT_RUN, WRONG, Check, Record, examine
from fisher_jax.cli.doctor.subject import Subject, make_subject

# In the order in which they run.
CHECKS = (*arithmetic.CHECKS, *estimators.CHECKS, *closed_form.CHECKS, *curvature.CHECKS, *storage.CHECKS)
THREAD = "checks of fisher-jax doctor"
_TICK = 0.1  # seconds between two looks at the clock, which Ctrl-C waits for as well
_NAN = float("nan")


def planned(checks: Sequence[Check], dtypes: Sequence[str]) -> list[tuple[Check, str]]:
    """Which check runs in which dtype: the quick ones first, then those of every dtype."""
    first = [(check, dtypes[0]) for check in sorted(checks, key=lambda check: (not check.quick, check.once))]
    return first + [(check, dtype) for dtype in dtypes[1:] for check in checks if not check.once]


def examination(plan: Sequence[tuple[Check, str]], at_once: int | None = None) -> Iterator[Record]:
    """Records of the checks in their order; ``at_once`` of them (by default 2, if there are two cores) are made.

    Nearly all of the time goes into compiling, which one core does for one program.
    """
    subjects = _subjects([dtype for _, dtype in plan])
    turn, condition, next_one = threading.Lock(), threading.Condition(), iter(range(len(plan)))
    found: dict[int, Record | BaseException] = {}
    precision = WRONG

    def make(number: int) -> Record:
        check, dtype = plan[number]
        reduced = precision if dtype == "float32" else WRONG
        record = examine(
            check._replace(reference=_one_at_a_time(check.reference, turn)), subjects[dtype],
            REDUCED.get(reduced, 0.0), reduced,
        )  # fmt: skip
        if (check.name, dtype) != (PRODUCTS, "float32"):
            return record
        return dataclasses.replace(record, verdict=precision_of_products(record))

    def work() -> None:
        while True:
            with condition:
                number = next((i for i in next_one if i not in found), None)
            if number is None:
                return
            try:
                record: Record | BaseException = make(number)
            except BaseException as problem:
                record = problem
            with condition:
                found[number] = record
                condition.notify_all()

    for number, (check, dtype) in enumerate(plan):
        if (check.name, dtype) == (PRODUCTS, "float32"):
            # First of all, since its verdict explains those of others.
            found[number] = first = make(number)
            precision = first.verdict
    for _ in range(at_once or min(2, os.cpu_count() or 1)):
        threading.Thread(target=work, name=THREAD, daemon=True).start()
    for number in range(len(plan)):
        with condition:
            while number not in found:
                condition.wait()
            record = found[number]
        if isinstance(record, BaseException):
            raise record
        yield record


def _subjects(dtypes: Sequence[str]) -> dict[str, Subject]:
    found: dict[str, Subject] = {}
    for dtype in dict.fromkeys(dtypes):
        first = next(iter(found.values()), None)
        found[dtype] = make_subject(dtype, None if first is None else first.loops)
    return found


def _one_at_a_time(reference: Callable, turn: threading.Lock) -> Callable:
    """What several checks are compared with is computed once."""

    def run(subject: Subject) -> Any:
        with turn:
            return reference(subject)

    return run


def in_time(
    plan: Sequence[tuple[Check, str]], records: Callable[[], Iterator[Record]], seconds_left: Callable[[], float]
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

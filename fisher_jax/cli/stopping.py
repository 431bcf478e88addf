"""A clean stop: the first Ctrl-C or termination signal is a request that a loop reads between steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["InterruptedRunError", "stop_requests"]


class InterruptedRunError(Exception):
    """The person asked to stop; everything up to here is saved."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or termination signal into a flag that the loop reads between steps."""
    requested = False

    def request(number, frame):
        nonlocal requested
        if requested:  # a second one: the person is in a hurry
            raise KeyboardInterrupt
        requested = True

    try:
        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: there is nobody to press Ctrl-C
        before = {}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Signals that end a run: Ctrl-C, SIGTERM and a closed terminal, from the first line of a command to its last.

While the command starts up, a signal ends the process at once: an exception out of an import is swallowed or turned
into another one. Later it is a `KeyboardInterrupt`; a loop that has something to save takes it as a request that it
reads between its steps. A thread watches over both: it ends the process where the exception was swallowed or some
compiled code does not return, and at a second signal. All writing is atomic, so that nothing is lost by that.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 130
_GRACE = 3.0  # seconds in which a run that was interrupted ends by itself
_TICK = 0.1
_STARTING, _WORKING, _SAVING, _ENDED = range(4)
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


class InterruptedRunError(Exception):
    """The person asked to stop; the sentence says what is kept."""


class StopSignals:
    """The handler of the signals that end a run."""

    def __init__(self) -> None:
        self.requested = False
        self.phase = _STARTING

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return  # the watching thread ends the process
        self.requested = True
        if self.phase == _STARTING:
            end_now("interrupted before anything was measured; nothing was written")
        if self.phase == _WORKING:
            raise KeyboardInterrupt

    def started(self) -> None:
        """From here on a signal is an exception."""
        self.phase = _WORKING

    def watch(self, pipe: int) -> None:
        """Ends the process at a second signal, or where the first one has no effect; returns when the pipe closes."""
        count, waited = 0, 0.0
        while True:
            # The handler itself runs between lines of Python, and so not while a program is compiled.
            ready, _, _ = select.select([pipe], [], [], _TICK if count else None)
            if ready:
                numbers = os.read(pipe, 64)
                if not numbers:
                    return
                count += sum(number in _numbers() for number in numbers)
                if count > 1:
                    end_now("stopped at once; what was saved before is kept")
            waited = waited + _TICK if count and not ready and self.phase in (_STARTING, _WORKING) else 0.0
            if waited >= _GRACE:
                end_now("interrupted; what was saved before is kept")


def end_now(sentence: str) -> None:
    """Ends the process without any clean-up."""
    if sys.stdout is not None and sys.stdout.isatty():
        os.write(1, _SHOW_CURSOR)
    os.write(2, f"fisher-jax: {sentence}\n".encode())
    os._exit(EXIT_CODE)


def _numbers() -> set[int]:
    return {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


@contextmanager
def stop_signals(*, last: bool = False) -> Iterator[StopSignals]:
    """Takes the signals over for the time of a command, in the main thread; elsewhere nobody presses Ctrl-C.

    Args:
        last: the process only ends afterwards, which takes Python and JAX a while and which no signal may spoil.
    """
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=signals.watch, args=(reader,), daemon=True).start()
    before: dict[int, Any] = {}
    for number in _numbers():
        if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            before[number] = signal.signal(number, signals)
    unraisable = sys.unraisablehook
    sys.unraisablehook = lambda found: None if _swallowed(found, signals) else unraisable(found)
    try:
        yield signals
    finally:
        signals.phase = _ENDED
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)


def _swallowed(found: Any, signals: StopSignals) -> bool:
    """Whether this is our exception, raised where Python can only print it (`__del__`, a callback)."""
    return signals.requested and isinstance(found.exc_value, KeyboardInterrupt)


def _handler() -> StopSignals:
    """The one in charge; one that is never asked where there is none."""
    found = signal.getsignal(signal.SIGINT)
    return found if isinstance(found, StopSignals) else StopSignals()


def stop_if_requested() -> None:
    """Raises KeyboardInterrupt where a signal came; for places where the first exception may have been swallowed."""
    if _handler().requested:
        raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether the person asked to stop, for a loop to ask after each step.

    From its first question on, a signal waits for the next one, so that the loop can save; before, there is nothing
    to save and a signal ends the run. A request that nobody asked for any more ends it when the loop is left.
    """
    signals = _handler()

    def requested() -> bool:
        if signals.phase == _WORKING:
            signals.phase = _SAVING
        return signals.requested

    try:
        yield requested
    finally:
        if signals.phase == _SAVING:
            signals.phase = _WORKING
    if signals.requested:
        raise KeyboardInterrupt

"""When a loop saves what it has: at a signal, when some time has passed, and at its end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fisher_jax.cli.run.stopping import stop_requests
from fisher_jax.cli.run.tools import Tools


class Checkpoints:
    """Asked after each step of a loop."""

    def __init__(self, every: float, stop_requested: Callable[[], bool], after_step: Callable[[], None]):
        self._every, self._stop_requested, self._after_step = every, stop_requested, after_step
        self._saved_at = time.monotonic()
        self._stopping = False

    def due(self, finished: bool = False) -> bool:
        """Whether to save now."""
        self._after_step()
        self._stopping = self._stop_requested()
        due = self._stopping or finished or time.monotonic() - self._saved_at >= self._every
        if due:
            self._saved_at = time.monotonic()
        return due

    def stop_if_asked(self) -> None:
        """
        Raises:
            KeyboardInterrupt: the last answer was due to a signal.
        """
        if self._stopping:
            raise KeyboardInterrupt


@contextmanager
def checkpoints(every: float, tools: Tools) -> Iterator[Checkpoints]:
    """Checkpoints at most ``every`` so many seconds apart; see `stop_requests`."""
    with stop_requests() as stop_requested:
        yield Checkpoints(every, stop_requested, tools.after_step)

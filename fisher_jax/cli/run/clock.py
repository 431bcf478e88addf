"""The stages of a command: said when they begin, and how long each took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from fisher_jax.cli.run.stopping import stop_if_requested
from fisher_jax.cli.run.terminal import headed

__all__ = ["Clock"]


class Clock:
    """Says what is done now and remembers how long it took."""

    def __init__(self, console: Console):
        self.console = console
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, sentence: str) -> Iterator[None]:
        stop_if_requested()
        self.console.print(headed(name, sentence))
        started = time.monotonic()
        yield
        stop_if_requested()
        self.seconds[name] = time.monotonic() - started

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

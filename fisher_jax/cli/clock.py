"""The stages of a command: said when they begin, and how long each took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

__all__ = ["Clock"]


class Clock:
    """Says what is done now and remembers how long it took."""

    def __init__(self, console: Console):
        self.console = console
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, sentence: str) -> Iterator[None]:
        self.console.print(f"[bold]{name}[/bold]: {sentence}", highlight=False, markup=True)
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

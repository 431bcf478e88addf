"""What a person sees while products run, and how long each of them took."""

import statistics
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fisher_jax.cli.progress import duration

__all__ = ["ProductProgress", "short_time"]

_SECONDS_BETWEEN_LINES = 15.0


def short_time(seconds: float) -> str:
    """`3.7 ms`, and from a tenth of a second on as `duration` has it."""
    return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else duration(seconds)


class ProductProgress:
    """Counts and times products: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, at_most: int, exact: bool = False):
        self._console = console
        self._total = f"of {at_most:,}" if exact else f"of at most {at_most:,}"
        self.seconds: list[float] = []
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("products"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[said]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=at_most, said="compiling")

    def __enter__(self) -> "ProductProgress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def counting(self, matvec: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The same products, each one counted when it is done."""

        def counted(v: Any) -> Any:
            started = time.monotonic()
            out = jax.block_until_ready(matvec(v))
            self._add(time.monotonic() - started)
            return out

        return counted

    @property
    def per_product(self) -> float:
        """Median seconds, without the first product, which compiles."""
        return statistics.median(self.seconds[1:] or self.seconds)

    def _add(self, seconds: float) -> None:
        self.seconds.append(seconds)
        said = f"{len(self.seconds):,} {self._total}, {short_time(self.per_product)} each"
        self._bar.update(self._task, advance=1, said=said)
        now = time.monotonic()
        told = len(self.seconds) > 1 and not self._console.is_terminal
        if told and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"  product {said}", highlight=False)

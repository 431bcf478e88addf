"""What a person sees while products run, and how long each of them took."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn

from fisher_jax.cli.run.progress import Live, Words, duration


def short_time(seconds: float) -> str:
    """`3.7 ms`, and from a tenth of a second on as `duration` has it."""
    return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else duration(seconds)


class ProductProgress(Live):
    """Counts and times products."""

    def __init__(self, console: Console, at_most: int, exact: bool = False):
        self._total = f"of {at_most:,}" if exact else f"of at most {at_most:,}"
        self.seconds: list[float] = []
        said = Words("{task.fields[said]}")
        super().__init__(
            console, at_most, Words("products"), BarColumn(bar_width=24), said, transient=True, said="compiling"
        )

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
        if len(self.seconds) > 1:
            self._tell(f"product {said}")

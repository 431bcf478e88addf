"""What a person sees while the tokens stream: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

_SECONDS_BETWEEN_LINES = 15.0


def duration(seconds: float) -> str:
    """`3 min 05 s`, `42 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        return Text(f"{duration(left)} left" if left is not None else "", style="cyan")


class Words(TextColumn):
    """A column of a progress bar, which is no markup."""

    def __init__(self, text_format: str):
        super().__init__(text_format, markup=False)


class Live:
    """A bar on a terminal; elsewhere a line every 15 seconds, and one at the end."""

    def __init__(
        self,
        console: Console,
        total: int,
        *columns: ProgressColumn,
        done: int = 0,
        transient: bool = False,
        **fields: Any,
    ):
        self._console = console
        self._last_line = time.monotonic()
        self._bar = Progress(*columns, console=console, transient=transient)
        self._task = self._bar.add_task("", total=total, completed=done, **fields)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def _tell(self, line: str, *, now: bool = False) -> None:
        """The line for where no bar is seen, if one is due."""
        time_now = time.monotonic()
        due = now or time_now - self._last_line > _SECONDS_BETWEEN_LINES
        if due and not self._console.is_terminal:
            self._last_line = time_now
            self._console.print(f"  {line}")


class StreamProgress(Live):
    """Tokens seen, tokens per second, time left and running loss.

    The rate is that of this process, from its first finished step on, which leaves compilation out.
    """

    def __init__(self, console: Console, total_tokens: int, done_tokens: int = 0):
        self._total = total_tokens
        self._first_tokens = done_tokens
        self._started: float | None = None
        super().__init__(
            console,
            total_tokens,
            Words("streaming"),
            BarColumn(bar_width=24),
            Words("{task.completed:,.0f} / {task.total:,.0f} tokens"),
            Words("{task.fields[rate]}"),
            Words("{task.fields[loss]}"),
            TimeLeft(),
            done=done_tokens,
            rate="compiling",
            loss="",
            left=None,
        )

    def update(self, tokens: int, loss: float) -> None:
        """`tokens` seen so far in all, and the mean loss over them."""
        now = time.monotonic()
        if self._started is None:
            self._started, self._first_tokens = now, tokens
        elapsed = now - self._started
        rate = (tokens - self._first_tokens) / elapsed if elapsed > 0 else 0.0
        left = (self._total - tokens) / rate if rate else None
        self._bar.update(
            self._task,
            completed=tokens,
            rate=f"{rate:,.0f} tokens/s" if rate else "",
            loss=f"loss {loss:.3f}",
            left=left,
        )
        finished = tokens >= self._total
        ending = f", {duration(left)} left" if left and not finished else ""
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        self._tell(f"{tokens:,} / {self._total:,} tokens{speed}, loss {loss:.3f}{ending}", now=finished)

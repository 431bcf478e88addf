"""What a person sees while a model trains."""

import time

from rich.console import Console
from rich.progress import BarColumn

from fisher_jax.cli.run.progress import Live, TimeLeft, Words, duration


class TrainDisplay(Live):
    """Steps, loss in training and held out, tokens per second, time left; all of this process."""

    def __init__(self, console: Console, steps: int, done: int, bits_per_nat: float):
        self._steps, self._first, self._bits_per_nat = steps, done, bits_per_nat
        self._started = time.monotonic()
        self._held_out = ""
        super().__init__(
            console, steps, Words("step {task.completed:,.0f} / {task.total:,.0f}"), BarColumn(bar_width=20),
            Words("{task.fields[said]}"), TimeLeft(), done=done, said="", left=None,
        )  # fmt: skip

    def evaluated(self, loss: float) -> None:
        """The held-out loss, in nats per token."""
        self._held_out = f", held out {loss:.3f} ({self._bits_per_nat * loss:.3f} bits per byte)"

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """After a step: its loss, and the rate of all steps so far."""
        spent = time.monotonic() - self._started
        left = (self._steps - step) * spent / (step - self._first)
        said = f"loss {loss:.3f}{self._held_out}, {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, said=said, left=left)
        finished = step >= self._steps
        ending = "" if finished else f", {duration(left)} left"
        self._tell(f"step {step:,} / {self._steps:,}: {said}{ending}", now=finished)

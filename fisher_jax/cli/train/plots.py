"""The picture of training: loss over steps and over time, a line for every run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fisher_jax.cli.page.style import Theme, panels, spread
from fisher_jax.cli.train.store import Point, TrainProgress

_TIMES_MEDIAN = 4.0
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))  # colours repeat from the sixth run on


def loss_figure(theme: Theme, curves: Sequence[tuple[str, TrainProgress]], bits_per_nat: float) -> Figure:
    """Held-out loss (thick) and training loss (thin) over steps, and over seconds of training."""
    figure, (by_step, by_time) = panels(6.6, 2, sharey=True)
    _panel(theme, by_step, curves, lambda point: point.step)
    _panel(theme, by_time, curves, lambda point: point.seconds)
    by_step.set(xlabel="step", title="Loss held out (thick), in training (thin)")
    by_time.set_xlabel("time in seconds, without compilation and evaluation")
    for axes in (by_step, by_time):
        axes.set_ylabel("loss (nats per token)")
        _bits_axis(axes, bits_per_nat)
    by_step.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure


def _panel(
    theme: Theme, axes: Axes, curves: Sequence[tuple[str, TrainProgress]], place: Callable[[Point], float]
) -> None:
    colours = (theme.blue, theme.orange, theme.green, theme.pink, theme.vermillion)
    end = max(place(point) for _, progress in curves for point in progress.points)
    low, high = _limits(curves)
    axes.set_ylim(low, high)
    first = max(progress.points[0].held_out_loss for _, progress in curves)
    if first > high:
        axes.text(
            0.97, 0.97, f"starts at {first:.2f}", transform=axes.transAxes, va="top", ha="right", color=theme.muted,
            fontsize=9, path_effects=[withStroke(linewidth=3, foreground=theme.background)],
        )  # fmt: skip
    longest = max(len(_short(name)) for name, _ in curves)
    axes.set_xlim(0, (end or 1) / (0.93 - 0.024 * longest))  # room for the names at the ends
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    heights = [progress.points[-1].held_out_loss for _, progress in curves]
    labels = spread(heights, 0.065 * (high - low), low + 0.03 * (high - low), high)
    for i, ((name, progress), label) in enumerate(zip(curves, labels, strict=True)):
        colour, dashes = colours[i % len(colours)], _DASHES[i // len(colours) % len(_DASHES)]
        # The mean of the steps since the point before belongs between the two.
        pairs = zip(progress.points, progress.points[1:], strict=False)
        seen = [((place(a) + place(b)) / 2, b.train_loss) for a, b in pairs if b.train_loss is not None]
        axes.plot(
            *zip(*seen, strict=True),
            color=colour, linewidth=0.8, alpha=0.7, linestyle=dashes,
        )  # fmt: skip
        x, y = [place(point) for point in progress.points], [point.held_out_loss for point in progress.points]
        axes.plot(x, y, color=colour, linewidth=2, linestyle=dashes)
        axes.plot(x[-1], y[-1], "o", color=colour, markersize=4)
        axes.annotate(
            _short(name), (x[-1], label), xytext=(6, 0), textcoords="offset points", color=colour, fontsize=9,
            fontweight="bold", va="center", path_effects=[withStroke(linewidth=3, foreground=theme.background)],
        )  # fmt: skip


def _short(name: str, longest: int = 18) -> str:
    return name if len(name) <= longest else f"{name[: longest - 8]}…{name[-7:]}"


def _limits(curves: Sequence[tuple[str, TrainProgress]]) -> tuple[float, float]:
    """Where the curves spend their time: the first fall, to what frequencies alone give, may lie above."""
    held_out = [point.held_out_loss for _, progress in curves for point in progress.points]
    train = [point.train_loss for _, progress in curves for point in progress.points if point.train_loss is not None]
    low, high = min([*held_out, *train]), max(progress.points[0].held_out_loss for _, progress in curves)
    high = min(high, low + _TIMES_MEDIAN * (float(np.median(held_out)) - low))
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _bits_axis(axes: Axes, bits_per_nat: float) -> None:
    """The same loss in bits per byte, on the right."""

    def scaled(factor: float) -> Any:
        return lambda y: np.asarray(y) * factor

    right = axes.secondary_yaxis("right", functions=(scaled(bits_per_nat), scaled(1 / bits_per_nat)))
    right.set_ylabel("bits per byte")
    right.yaxis.set_major_locator(MaxNLocator(6))
    right.spines["right"].set_visible(True)

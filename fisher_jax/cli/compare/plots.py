"""Pictures of a comparison: every row in A against B, the largest changes with intervals, and layers."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from fisher_jax.cli.compare.shift import Change, LayerShift, RowShift
from fisher_jax.cli.page.style import Theme, drawable, log_axis, panels
from fisher_jax.cli.report import layer_plots
from fisher_jax.cli.report.plots import UNIT, floor_of, label_points

_LABELS = 6  # largest gains, surest gains, and as many losses of both


def rows_figure(theme: Theme, found: RowShift, names: tuple[str, str], tokens: list[str], rate: float) -> Figure:
    """Importance in B against importance in A, one point for each row, discoveries coloured."""
    figure, (axes,) = panels(5.4)
    both = np.concatenate([found.before.mean, found.after.mean])
    low, high = floor_of(both), float(both.max()) * 3
    log_axis(axes, "x", low, high)
    log_axis(axes, "y", low, high)
    x, y = np.clip(found.before.mean, low, None), np.clip(found.after.mean, low, None)
    axes.plot([low, high], [low, high], color=theme.muted, linewidth=1, linestyle=(0, (3, 3)))
    gained, lost = found.gained(rate), found.lost(rate)
    tested = found.reason == ""
    same = tested & ~(found.shift.q < rate)
    axes.scatter(x[~tested], y[~tested], s=3, color=theme.muted, alpha=0.08, linewidths=0, rasterized=True)
    axes.scatter(x[same], y[same], s=4, color=theme.blue, alpha=0.25, linewidths=0, rasterized=True)
    named = _outstanding(found, gained, lost)
    for rows, colour in ((gained, theme.vermillion), (lost, theme.green)):
        size, alpha = (12, 0.85) if len(rows) < 500 else (5, 0.5)
        axes.scatter(x[rows], y[rows], s=size, color=colour, alpha=alpha, linewidths=0, zorder=3)
        rows = np.intersect1d(rows, named)  # seen in any cloud
        axes.scatter(x[rows], y[rows], s=24, color=colour, edgecolors=theme.background, linewidths=0.8, zorder=3)
    _legend(theme, axes, names[1], len(gained), len(lost), int(same.sum()), int((~tested).sum()))
    label_points(figure, axes, x[named], y[named], [drawable(tokens[r]) for r in named])
    for text in axes.texts:
        text.set_path_effects([withStroke(linewidth=2.5, foreground=theme.background)])
    axes.set(
        xlabel=f"importance in {drawable(names[0])} ({UNIT})",
        ylabel=f"importance in {drawable(names[1])} ({UNIT})",
        title=f"Rows of the head, discoveries at q < {rate:g}",
    )
    return figure


def _outstanding(found: RowShift, *groups: np.ndarray) -> np.ndarray:
    """Of each group the largest differences and the surest ones."""
    chosen: list[int] = []
    for rows in groups:
        sure = rows[np.argsort(-np.abs(found.shift.z[rows]), kind="stable")]
        chosen += [*rows[:_LABELS], *sure[:_LABELS]]
    return np.array(list(dict.fromkeys(chosen)), int)


def _legend(theme: Theme, axes: Axes, name: str, gained: int, lost: int, same: int, untested: int) -> None:
    """What the colours mean, in words of the colour, in the corner that importance in both leaves empty."""
    lines = [
        (f"{gained:,} more important in {drawable(name)}", theme.vermillion),
        (f"{lost:,} less important", theme.green),
        (f"{same:,} tested, no difference shown", theme.blue),
        (f"{untested:,} not testable", theme.muted),
    ]
    for i, (line, colour) in enumerate(lines):
        axes.text(
            0.03, 0.97 - 0.05 * i, line, color=colour, transform=axes.transAxes, va="top", fontsize=9,
            fontweight="bold", zorder=5,
        )  # fmt: skip


def changes_figure(theme: Theme, found: RowShift, names: tuple[str, str], tokens: list[str], rate: float) -> Figure:
    """The largest gains and losses, each with its importance in A and in B and their 95% intervals."""
    shown = [
        (f"More important in {drawable(names[1])}", found.gained(rate)[:12]),
        (f"Less important in {drawable(names[1])}", found.lost(rate)[:12]),
    ]
    shown = [(title, rows) for title, rows in shown if len(rows)]
    sizes = [len(rows) + 1 for _, rows in shown]
    figure, all_axes = panels(0.9 * len(shown) + 0.27 * sum(sizes), len(shown), height_ratios=sizes)
    for axes, (title, rows) in zip(all_axes, shown, strict=True):
        _pairs(theme, axes, found, rows, names)
        axes.set_yticks(np.arange(len(rows)), [drawable(tokens[r]) for r in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.4, -1.1)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title)
    all_axes[-1].set_xlabel(f"importance ({UNIT}), with 95% interval\n◂ far below the axis")
    return figure


def _pairs(theme: Theme, axes: Axes, found: RowShift, rows: np.ndarray, names: tuple[str, str]) -> None:
    sides = [(found.before, theme.blue, -0.14), (found.after, theme.orange, 0.14)]
    means = np.stack([side.mean[rows] for side, _, _ in sides])
    low = max(float(means[means > 0].min()), float(means.max(0).min()) / 3) / 3
    high = max(float(side.upper[rows].max()) for side, _, _ in sides) * 1.4
    log_axis(axes, "x", low, high)
    for (side, colour, up), name in zip(sides, names, strict=True):
        places = np.arange(len(rows)) + up
        lower, mean, upper = (np.clip(x[rows], low, None) for x in (side.lower, side.mean, side.upper))
        axes.hlines(places, lower, upper, color=colour, alpha=0.5, linewidth=3)
        for marker, shown in (("o", side.mean[rows] >= low), ("<", side.mean[rows] < low)):
            if shown.any():  # an empty line outside of the axes would have no place in the layout
                axes.plot(mean[shown], places[shown], marker, color=colour, markersize=4.5, clip_on=False)
        other = next(s for s, c, _ in sides if c != colour)
        left = side.mean[rows[0]] < other.mean[rows[0]]
        axes.annotate(
            drawable(name), (mean[0], places[0]), xytext=(-2 if left else 2, 8), textcoords="offset points",
            color=colour, fontsize=9, fontweight="bold", ha="right" if left and mean[0] > 20 * low else "left",
        )  # fmt: skip


def layers_figure(theme: Theme, found: LayerShift, columns: list[str], names: tuple[str, str], rate: float) -> Figure:
    """Every part of every layer, B over A; a dot where the difference is a discovery."""
    figure = layer_plots.ratio_figure(theme, found.after, found.before, columns, names[1], names[0])
    axes = figure.axes[0]
    q = np.stack([_of_part(found, node).q for node in columns], axis=1)
    layers, parts = np.nonzero(q < rate)
    axes.plot(parts, layers, "o", color="black", markersize=3.5, markeredgecolor="white", markeredgewidth=0.7)
    axes.set_xlabel(f"a dot: a difference at q < {rate:g}")
    return figure


def _of_part(found: LayerShift, node: str) -> Change:
    """Of a part with several tensors its own, else that of its only tensor."""
    return found.parts[node] if node in found.parts else next(
        change for path, change in found.tensors.items() if path.startswith(f"{node}/")
    )  # fmt: skip

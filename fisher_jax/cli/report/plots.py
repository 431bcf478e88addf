# ruff: noqa: RUF001 -- a times sign is what it looks like
"""Pictures of importance: by rank, against frequency, of single tokens, by column, and between tasks."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from fisher_jax.cli.page.style import Theme, drawable, log_axis, panels
from fisher_jax.cli.report.importance import Comparison, Importance, outliers

UNIT = "Fisher information per token"


def floor_of(values: np.ndarray) -> float:
    """Where a logarithmic axis ends: below nearly all positive values."""
    positive = values[np.isfinite(values) & (values > 0)]
    return float(np.quantile(positive, 0.002) / 2) if positive.size else 1e-12


def rank_figure(
    theme: Theme, main: Importance, other: Importance, tokens: list[str], kind: str, level: float
) -> Figure:
    """Importance by rank on log axes, the interval as a band, the other kind of Fisher as a thin line."""
    figure, (axes,) = panels(4.4)
    order, ranks = main.order, np.arange(1, len(main.mean) + 1)
    floor = floor_of(main.mean)
    log_axis(axes, "x", 0.8, len(ranks) * 2.2, compact=True)
    log_axis(axes, "y", floor, float(main.mean.max()) * 8)
    if main.has_intervals:
        places, lower, upper = _smooth_band(main.lower[order], main.upper[order])
        lower, upper = (np.clip(x, floor / 10, None) for x in (lower, upper))
        axes.fill_between(places, lower, upper, color=theme.blue, alpha=0.22, linewidth=0)
    axes.plot(ranks, np.sort(other.mean)[::-1], color=theme.orange, linewidth=1.3)
    axes.plot(ranks, main.mean[order], color=theme.blue, linewidth=2)
    axes.set_xlabel("rank of the vocabulary row (1 = most important)")
    axes.set_ylabel(UNIT)
    axes.set_title("Rows sorted by importance")
    for rank in (1, 4, 20, 100, 500, 2500, 10_000, 30_000):
        if rank > len(ranks) or main.mean[order[rank - 1]] <= floor:
            continue
        row = order[rank - 1]
        axes.plot(rank, main.mean[row], "o", color=theme.blue, markersize=4)
        axes.annotate(
            drawable(tokens[row], longest=14), (rank, main.mean[row]), xytext=(5, 6), textcoords="offset points",
            fontsize=9,
        )  # fmt: skip
    names = {"empirical": "empirical", "true": "exact true"}
    band = f", band: {100 * level:g}% interval" if main.has_intervals else ", no interval: one unit only"
    axes.text(0.03, 0.16, names[kind] + band, color=theme.blue, transform=axes.transAxes, fontweight="bold")
    axes.text(
        0.03, 0.08, names["true" if kind == "empirical" else "empirical"] + " (ranked by itself)",
        color=theme.orange, transform=axes.transAxes, fontweight="bold",
    )  # fmt: skip
    return figure


def _smooth_band(lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ranks, lower, upper): medians of the limits over ranks within 4%; single rows are in the table of all."""
    ranks = np.unique(np.geomspace(1, len(lower), 300).round().astype(int))
    windows = [slice(int(0.96 * (rank - 1)), int(1.04 * rank)) for rank in ranks]
    low, high = (np.array([np.median(limit[window]) for window in windows]) for limit in (lower, upper))
    return ranks, low, high


def frequency_figure(theme: Theme, main: Importance, tokens: list[str]) -> Figure:
    """Importance against how often the token occurs in the text, outlying tokens labelled."""
    figure, (axes,) = panels(5.0)
    floor = floor_of(main.mean)
    mean = np.clip(main.mean, floor, None)
    log_axis(axes, "x", 0.17, max(float(main.counts.max()), 10.0) * 2.2, compact=True)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick >= 1])
    log_axis(axes, "y", floor, float(mean.max()) * 4)
    never = main.counts == 0
    jitter = np.random.default_rng(0)
    never_x = 0.28 * 1.35 ** jitter.uniform(-1, 1, never.sum())
    axes.scatter(never_x, mean[never], s=3, color=theme.muted, alpha=0.10, linewidths=0)
    seen_x = main.counts[~never] * 1.10 ** jitter.uniform(-1, 1, (~never).sum())
    axes.scatter(seen_x, mean[~never], s=5, color=theme.blue, alpha=0.30, linewidths=0)
    axes.set(xlabel="occurrences as next token in the text", ylabel=UNIT, title="Importance against occurrences")
    axes.axvline(0.55, color=theme.muted, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.text(0.60, floor * 1.5, f"← never: {never.sum():,} rows", va="bottom", fontsize=9)
    rows = outliers(main)
    axes.scatter(main.counts[rows], mean[rows], s=14, color=theme.vermillion, linewidths=0, zorder=3)
    label_points(figure, axes, main.counts[rows], mean[rows], [drawable(tokens[r]) for r in rows])
    return figure


def dots_figure(
    theme: Theme, shown: Sequence[tuple[str, np.ndarray]], main: Importance, tokens: list[str], level: float
) -> Figure:
    """Single tokens with their intervals; each panel is ``shown`` by a title and its rows from the top."""
    sizes = [len(rows) for _, rows in shown]
    figure, all_axes = panels(1.1 * len(shown) + 0.235 * sum(sizes), len(shown), height_ratios=sizes)
    for axes, (title, rows) in zip(all_axes, shown, strict=True):
        places = np.arange(len(rows))
        mean = main.mean[rows]
        floor = floor_of(mean) / 3
        clipped = np.clip(mean, floor, None)
        high = float(clipped.max())
        if main.has_intervals:
            lower, upper = (np.clip(x[rows], floor, None) for x in (main.lower, main.upper))
            floor, high = max(floor, float(lower.min()) / 1.3), float(upper.max())
            axes.hlines(places, lower, upper, color=theme.blue, alpha=0.45, linewidth=3.5)
        axes.plot(clipped, places, "o", color=theme.blue, markersize=5)
        log_axis(axes, "x", floor, high * 1.3)
        axes.set_yticks(places, [f"{drawable(tokens[r])}  {main.counts[r]:,}×" for r in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title)
    interval = f", with {100 * level:g}% interval" if main.has_intervals else ""
    all_axes[-1].set_xlabel(f"{UNIT}{interval}")
    return figure


def columns_figure(theme: Theme, by_column: np.ndarray) -> Figure:
    """With single entries kept: importance of each column of the head, summed over the vocabulary."""
    figure, (axes,) = panels(3.8)
    floor = floor_of(by_column) / 2
    log_axis(axes, "y", floor, float(by_column.max()) * 3)
    axes.vlines(np.arange(len(by_column)), floor, np.clip(by_column, floor, None), color=theme.blue, linewidth=0.8)
    axes.set(
        xlim=(-len(by_column) * 0.01, len(by_column) * 1.01),
        xlabel="column of the head (hidden dimension)", ylabel=UNIT,
        title="Importance of hidden dimensions",
    )  # fmt: skip
    top = np.argsort(-by_column)[:6]
    label_points(figure, axes, top, by_column[top], [str(column) for column in top])
    return figure


def comparison_figure(
    theme: Theme, result: Comparison, here: Importance, there: Importance, tokens: list[str]
) -> Figure:
    """Importance in one task against importance in another, the rows that stand out labelled."""
    figure, (axes,) = panels(5.0)
    both = np.concatenate([here.mean, there.mean])
    low, high = floor_of(both), float(both.max()) * 2.5
    log_axis(axes, "x", low, high)
    log_axis(axes, "y", low, high)
    x, y = np.clip(there.mean, low, None), np.clip(here.mean, low, None)
    axes.plot([low, high], [low, high], color=theme.muted, linewidth=1, linestyle=(0, (3, 3)))
    axes.scatter(x, y, s=4, color=theme.blue, alpha=0.15, linewidths=0)
    for rows, colour in ((result.gainers, theme.vermillion), (result.losers, theme.green)):
        axes.scatter(x[rows], y[rows], s=14, color=colour, linewidths=0, zorder=3)
    rows = np.concatenate([result.gainers, result.losers])
    label_points(figure, axes, x[rows], y[rows], [drawable(tokens[r]) for r in rows])
    axes.set(
        xlabel=f"importance in {result.other}",
        ylabel=f"importance in {result.task}",
        title=f"Two tasks: rank correlation {result.rank_correlation:.2f}",
    )  # fmt: skip
    return figure


def label_points(figure: Figure, axes: Axes, xs, ys, labels: Sequence[str]) -> None:
    """Labels beside their points where they fit without overlapping; a label that fits nowhere is left out."""
    figure.draw_without_rendering()
    points = axes.transData.transform(np.column_stack([xs, ys]).astype(float))
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 2 * scale, y - 2 * scale, 4 * scale, 4 * scale) for x, y in points]
    for (x, y), label in zip(points, labels, strict=True):
        text = axes.text(0, 0, label, fontsize=8.5)
        size = text.get_window_extent()
        text.remove()
        for right, up in _offsets():
            dx, dy = right * scale, up * scale
            left = x + dx if right >= 0 else x + dx - size.width
            bottom = y + dy - size.height / 2
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                place = tuple(axes.transData.inverted().transform((x, y)))
                axes.annotate(
                    label, place, xytext=((left - x) / scale, (bottom - y) / scale), textcoords="offset points",
                    fontsize=8.5, va="bottom", zorder=4, annotation_clip=False,
                    arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "gray"} if abs(up) > 8 else None,
                )  # fmt: skip
                break


def _offsets() -> list[tuple[float, float]]:
    """Places to try around a point, in typographic points, the nearest first."""
    near = [(5, 0), (-5, 0), (4, 7), (-4, 7), (4, -7), (-4, -7)]
    far = [(side * 8, up * distance) for distance in (14, 22, 32, 44) for up in (1, -1) for side in (1, -1)]
    return [*near, *far]

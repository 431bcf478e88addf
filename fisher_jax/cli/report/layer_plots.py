"""Pictures of all parameters: heat maps of layers by part and by attention head, and totals of layers."""

from operator import attrgetter

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from fisher_jax.cli.page.style import Theme, colour_bar, drawable, log_axis, log_ticks, panels
from fisher_jax.cli.report.layers import EXPERTS, Layers, Measured, part_name

TOTAL = "Fisher information per token"
AVERAGE = "Fisher information\nper token and parameter"


def model_figure(theme: Theme, found: Layers, columns: list[str], above: list[str], below: list[str]) -> Figure:
    """Layers x parts: information of each tensor on the left, per parameter on the right.

    Tensors outside of the layers, `above` and `below` them, are bars over the whole width.
    """
    parts = [found.parts[node] for node in columns]
    outside = {path: found.tensors[path] for path in (*above, *below)}
    num_layers = len(parts[0].mean)
    figure, both = panels(_height(num_layers + len(outside)), 1, 2, sharey=True)
    readings = (("Total", "Fisher information\nper token", False), ("Per parameter", AVERAGE, True))
    for axes, (title, unit, by_parameter) in zip(both, readings, strict=True):
        read = attrgetter("average" if by_parameter else "mean")
        grid = np.stack([read(part) for part in parts], axis=1)
        bars = {path: float(read(tensor)) for path, tensor in outside.items()}
        # Norms have so much per parameter that the matrices would look alike; they keep the scale of the totals.
        scaled = [not by_parameter or "norm" not in node for node in columns]
        bar_values = [value for path, value in bars.items() if not by_parameter or "norm" not in path]
        everything = np.concatenate([grid.ravel(), list(bars.values())])
        shown = _Scale(theme, np.concatenate([grid[:, scaled].ravel(), bar_values]), everything)
        shown.grid(axes, grid)
        places = [-len(above) + i for i in range(len(above))] + [num_layers + i for i in range(len(below))]
        for place, value in zip(places, bars.values(), strict=True):
            bar = np.full((1, 1), value)
            shown.grid(axes, bar, (-0.5, len(columns) - 0.5), (place - 0.42, place + 0.42))
        _ticks(axes, num_layers, dict(zip(places, map(part_name, outside), strict=True)))
        axes.set_xticks(range(len(columns)), [part_name(node) for node in columns], rotation=90, fontsize=9)
        axes.set_title(title, fontsize=11)
        shown.bar(figure, axes, unit)
    both[0].set_ylabel("layer, from the input downwards")
    return figure


def heads_figure(theme: Theme, found: Layers) -> Figure:
    """Layers x attention heads for the query, key, value and output kernels, on one scale."""
    names = {"q": "query", "k": "key", "v": "value", "o": "output"}
    return _of_units(
        theme, "head", {told: found.heads[f"layers/attention/{name}/kernel"] for name, told in names.items()}
    )


def experts_figure(theme: Theme, found: Layers) -> Figure:
    """Layers x experts for the three kernels, on one scale."""
    return _of_units(
        theme, "expert", {name: found.experts[f"{EXPERTS}/{name}/kernel"] for name in ("gate", "up", "down")}
    )


def _of_units(theme: Theme, unit: str, shown_parts: dict[str, Measured]) -> Figure:
    parts = list(shown_parts.values())
    num_layers = len(parts[0].mean)
    ratios = [max(2, part.mean.shape[1]) for part in parts]
    figure, panes = panels(_height(num_layers), 1, len(parts), sharey=True, width_ratios=ratios)
    shown = _Scale(theme, np.concatenate([part.mean.ravel() for part in parts]))
    for axes, part, name in zip(panes, parts, shown_parts, strict=True):
        shown.grid(axes, part.mean)
        _ticks(axes, num_layers, {})
        number = part.mean.shape[1]
        axes.set_xticks(range(0, number, max(1, -(-number // 9))))
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel(unit, fontsize=9)
        axes.set_title(name, fontsize=10.5, loc="center")
    panes[0].set_ylabel("layer, from the input downwards")
    shown.bar(figure, panes, f"{TOTAL}, summed over one {unit}")
    return figure


def totals_figure(theme: Theme, found: Layers, level: float) -> Figure:
    """Total and average of every layer, its attention and its MLP, with intervals."""
    figure, both = panels(6.4, 2, sharex=True)
    series = (
        ("layers", "whole layer", theme.ink, "o-"),
        ("layers/attention", "attention", theme.blue, "s-"),
        ("layers/mlp", "MLP", theme.orange, "^-"),
    )
    for axes, (title, unit, by_parameter) in zip(
        both, (("Total", TOTAL, False), ("Per parameter", AVERAGE, True)), strict=True
    ):
        lowest, highest = np.inf, 0.0
        for path, name, colour, line in series:
            part = found.parts[path]
            mean, lower, upper = (x / (part.parameters if by_parameter else 1) for x in part[:3])
            places = np.arange(len(mean))
            shown = mean > 0
            floor = np.maximum(lower, mean / 10)
            axes.fill_between(places, floor, upper, color=colour, alpha=0.16, linewidth=0)
            axes.plot(places[shown], mean[shown], line, color=colour, linewidth=1.5, markersize=4, label=name)
            reached = np.concatenate([mean[shown], floor[np.isfinite(floor) & shown], upper[np.isfinite(upper)]])
            if reached.size:
                lowest, highest = min(lowest, float(reached.min())), max(highest, float(reached.max()))
        if np.isfinite(lowest) and highest > 0:
            log_axis(axes, "y", lowest / 1.25, highest * 1.25)
        axes.set_ylabel(unit)
        axes.set_title(title)
    both[0].legend(loc="best", fontsize=9, frameon=False)
    interval = f"; band: {100 * level:g}% interval" if found.units >= 2 else ""
    both[1].set_xlabel(f"layer{interval}")
    return figure


def ratio_figure(
    theme: Theme, here: Layers, there: Layers, columns: list[str], task: str, other: str
) -> Figure:  # fmt: skip
    """Layers x parts: information in one task over that in another."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.stack([here.parts[node].mean / there.parts[node].mean for node in columns], axis=1)
        logs = np.log2(ratios)
    limit = max(1.0, float(np.max(np.abs(logs[np.isfinite(logs)]), initial=0)))
    figure, (axes,) = panels(_height(len(ratios)))
    shown = _Scale(theme, logs, norm=Normalize(-limit, limit), colours="PuOr")
    shown.grid(axes, logs)
    _ticks(axes, len(ratios), {})
    axes.set_xticks(range(len(columns)), [part_name(node) for node in columns], rotation=90)
    axes.set_ylabel("layer, from the input downwards")
    axes.set_title(f"{drawable(task)} over {drawable(other)}")
    ticks = np.arange(-int(limit), int(limit) + 1)
    ticks = ticks[:: max(1, len(ticks) // 7)]
    shown.bar(figure, axes, f"ratio of Fisher information, {drawable(task)} / {drawable(other)}",
              {float(t): f"{2.0**t:g}" if t >= 0 else f"1/{2**-t}" for t in ticks})  # fmt: skip
    return figure


class _Scale:
    """One colour scale, logarithmic over the positive `values` but the smallest 2%, or as `norm` says.

    `everything` is what will be drawn with it, if that is more: what lies beyond the scale has the colour of its end.
    """

    def __init__(
        self,
        theme: Theme,
        values: np.ndarray,
        everything: np.ndarray | None = None,
        *,
        norm: Normalize | None = None,
        colours: str = "viridis",
    ):
        self.theme = theme
        positive = values[np.isfinite(values) & (values > 0)]
        low, high = (float(np.quantile(positive, 0.02)), float(positive.max())) if positive.size else (1e-12, 1.0)
        self.norm = norm or LogNorm(low / 1.02, high * 1.02)
        self.colours = colormaps[colours]
        drawn = values if everything is None else everything
        below = norm is None and bool(np.any((drawn > 0) & (drawn < low / 1.02)))
        above = norm is None and bool(np.any(drawn > high * 1.02))
        self.extend = "both" if below and above else "min" if below else "max" if above else "neither"

    def grid(
        self,
        axes: Axes,
        values: np.ndarray,
        across: tuple[float, float] | None = None,
        down: tuple[float, float] | None = None,
    ) -> None:
        """Cells centred on whole numbers, or filling the given ranges."""
        rows, columns = values.shape
        shown = np.ma.masked_invalid(values)
        if isinstance(self.norm, LogNorm):
            shown = np.ma.masked_less_equal(shown, 0)
        (left, right), (top, bottom) = across or (-0.5, columns - 0.5), down or (-0.5, rows - 0.5)
        x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
        axes.set_facecolor(self.theme.grid)
        axes.pcolormesh(
            x, y, shown, norm=self.norm, cmap=self.colours, edgecolors=self.theme.background, linewidth=0.5
        )
        axes.grid(visible=False)

    def bar(self, figure: Figure, axes: Axes | list[Axes], label: str, ticks: dict[float, str] | None = None) -> None:
        low, high = float(self.norm.vmin or 0), float(self.norm.vmax or 1)
        ticks = log_ticks(low, high, most=6) if ticks is None else ticks
        aspect = 48 if isinstance(axes, list) else 22
        scale = ScalarMappable(self.norm, self.colours)
        colour_bar(figure, axes, scale, label, ticks, extend=self.extend, aspect=aspect)


def _height(rows: int) -> float:
    return float(np.clip(1.9 + 0.19 * rows, 3.4, 9.0))


def _ticks(axes: Axes, num_layers: int, named: dict[int, str]) -> None:
    """Layers from the top, every second or fifth of many, and the names of the other rows."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 10**9) if num_layers <= 20 * step)
    labels = {**{layer: str(layer) for layer in range(0, num_layers, every)}, **named}
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8.5)
    axes.set_ylim(max([num_layers - 1, *named]) + 0.6, min([0, *named]) - 0.6)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)

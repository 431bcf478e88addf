# ruff: noqa: RUF001 -- a minus sign is what it looks like
"""Pictures of curvature: eigenvalues with their bounds, the density, spectra of blocks, capacity of layers."""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from fisher_jax.cli.page.style import Theme, colour_bar, log_axis, log_ticks, panels

UNIT = "nats per token"


def short(name: str) -> str:
    """`attention q` from `layers/attention/q/kernel`."""
    return name.removeprefix("layers/").removesuffix("/kernel").removesuffix("/scale").replace("/", " ").replace(
        "_", " "
    )  # fmt: skip


def eigenvalues_figure(theme: Theme, found: Any, name: str) -> Figure:
    """Sizes of the eigenvalues by rank on a log axis, the bounds of their errors as bars, their signs as marks."""
    figure, (axes,) = panels(3.7)
    there = np.isfinite(found.eigenvalues) & (found.eigenvalues != 0)
    values, bounds = found.eigenvalues[there], found.residuals[there]
    if not values.size:
        axes.text(0.5, 0.5, "no eigenvalue differs from zero", transform=axes.transAxes, ha="center")
        return figure
    sizes = np.abs(values)
    signs = [(values > 0, "o", theme.blue, "positive"), (values < 0, "D", theme.vermillion, "negative")]
    low, high = float(sizes.min()) / 1.6, float((sizes + bounds).max()) * 1.6
    log_axis(axes, "y", low, high)
    for chosen, mark, colour, label in signs:
        rank = np.arange(1, int(chosen.sum()) + 1)
        lower = np.clip(sizes[chosen] - bounds[chosen], low, None)
        axes.vlines(rank, lower, sizes[chosen] + bounds[chosen], color=colour, linewidth=3, alpha=0.45)
        axes.plot(rank, sizes[chosen], mark, color=colour, markersize=6, label=label)
    if np.any(values < 0):
        axes.legend(frameon=False, loc="upper right")
    axes.text(0.03, 0.05, "bars: bound of the error", transform=axes.transAxes, color=theme.muted, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="rank from its end of the spectrum" if np.any(values < 0) else "rank (1 = largest)",
        ylabel=f"size of the eigenvalue ({UNIT})" if np.any(values < 0) else f"eigenvalue ({UNIT})",
        title=f"Eigenvalues of the {name}",
    )
    return figure


def density_curves(density: Any, floor: float) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """``(log10 |eigenvalue|, {sign: share per decade [probes, cells]}, share below the floor [probes])``."""
    # A node without weight at the largest size gives all probes the same cells.
    top = np.array([[np.abs(density.nodes).max()]])
    probes = [
        density._replace(
            nodes=np.concatenate([nodes[None], top], axis=1), weights=np.pad(weights[None], ((0, 0), (0, 1)))
        ).on_log_axis(floor, width=0.15)
        for nodes, weights in zip(density.nodes, density.weights, strict=True)
    ]
    curves = {sign: np.stack([getattr(probe, sign) for probe in probes]) for sign in ("positive", "negative")}
    return probes[0].grid, curves, np.array([probe.zero for probe in probes])


def density_figure(theme: Theme, density: Any, floor: float, name: str) -> Figure:
    """Share of the eigenvalues per decade of their size; negative ones in a panel of their own."""
    grid, curves, zero = density_curves(density, floor)
    lowest = min(0.3 / density.dimension, 1e-3)
    shown = [sign for sign in ("negative", "positive") if curves[sign].max() > lowest]
    shown = shown or ["positive"]
    figure, all_axes = panels(3.9, 1, len(shown), sharey=True)
    colours = {"positive": theme.blue, "negative": theme.vermillion}
    means = {sign: curves[sign].mean(0) for sign in shown}
    # Both panels show the sizes where there is something to see.
    seen = np.flatnonzero(np.any([mean > lowest for mean in means.values()], axis=0))
    sizes = 10.0**grid
    low, high = (float(sizes[seen[0]]) / 2, float(sizes[seen[-1]]) * 2) if seen.size else (sizes[0], sizes[-1])
    highest = 4 * max(float(mean.max()) for mean in means.values())
    for axes, sign in zip(all_axes, shown, strict=True):
        mean, error = means[sign], curves[sign].std(0, ddof=1) / np.sqrt(len(zero))
        log_axis(axes, "y", lowest, max(highest, 10 * lowest))
        lower, upper = (np.clip(x, lowest, None) for x in (mean - error, mean + error))
        axes.fill_between(sizes, lower, upper, color=colours[sign], alpha=0.28, linewidth=0)
        axes.plot(sizes, np.where(mean > lowest, mean, np.nan), color=colours[sign], linewidth=1.8)
        _size_axis(axes, low, high, sign == "negative", 8 // len(shown))
        if len(shown) > 1:
            axes.set_title(sign.capitalize(), color=colours[sign], fontsize=11)
        else:
            axes.set_title(f"All eigenvalues of the {name}")
    _say_unresolved(all_axes[-1], density, floor, means.get("positive"), sizes)
    all_axes[0].set_ylabel("share of all eigenvalues, per decade")
    label = f"eigenvalue ({UNIT}), band: standard error over {len(zero)} probes"
    figure.supxlabel(label, fontsize=10.5)
    if zero.mean() > 0:
        said = f"{100 * zero.mean():.3g}% of all below {floor:.1g}"
        all_axes[-1].text(0.97, 0.95, said, transform=all_axes[-1].transAxes, fontsize=9, va="top", ha="right")
    return figure


def _say_unresolved(axes: Axes, density: Any, floor: float, mean: np.ndarray | None, sizes: np.ndarray) -> None:
    """The node next to zero stands for all that are about as small or smaller: say so where it holds most of them."""
    there = np.where(density.weights > 0, np.abs(density.nodes), np.inf)
    smallest = np.argmin(there, axis=1)[:, None]
    share = float(np.take_along_axis(density.weights, smallest, axis=1).mean())
    size = float(np.exp(np.log(np.maximum(np.take_along_axis(there, smallest, axis=1), floor)).mean()))
    if mean is None or share < 0.3 or size <= floor:
        return
    peak = float(np.interp(size, sizes, mean))
    said = f"{100 * share:.3g}% of all are\nabout this small,\nor smaller"
    axes.annotate(said, (size, peak), xytext=(16, -4), textcoords="offset points", fontsize=9, va="top")


def _size_axis(axes: Axes, low: float, high: float, negative: bool, most: int) -> None:
    axes.set_xscale("log")
    axes.set_xlim((high, low) if negative else (low, high))
    ticks = log_ticks(low, high, most=most)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FixedFormatter([f"−{text}" if negative else text for text in ticks.values()]))
    axes.xaxis.set_minor_locator(NullLocator())


def blocks_figure(theme: Theme, spectra: dict[str, dict[int | None, Any]]) -> Figure:
    """Small multiples: a panel per tensor, a line per layer, coloured by depth."""
    columns = 2 if len(spectra) > 1 else 1
    rows = -(-len(spectra) // columns)
    figure, all_axes = panels(1.2 + 1.45 * rows, rows, columns, sharex=True, sharey=True)
    everything = np.concatenate([s.eigenvalues for group in spectra.values() for s in group.values()])
    high = float(everything.max(initial=0)) or 1.0
    low = max(float(np.quantile(everything[everything > 0], 0.02)) if np.any(everything > 0) else 0, high * 1e-7)
    longest = max(len(s.eigenvalues) for group in spectra.values() for s in group.values())
    layers = max((layer or 0) for group in spectra.values() for layer in group) + 1
    colours = _colours(theme)
    for axes, (name, group) in zip(all_axes, spectra.items(), strict=False):
        log_axis(axes, "y", low / 2, high * 3)
        for layer, spectrum in group.items():
            values = spectrum.eigenvalues
            colour = theme.vermillion if layer is None else colours(layer / max(layers - 1, 1))
            rank = np.arange(1, len(values) + 1)
            axes.plot(rank, np.where(values >= low / 2, values, np.nan), color=colour, linewidth=1.1,
                      marker="o" if len(values) < 8 else None, markersize=3)  # fmt: skip
        axes.set_title(short(name), fontsize=10, pad=4)
        axes.set_xlim(0, longest + 1)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in all_axes[len(spectra) :]:
        axes.set_visible(False)
    for axes in all_axes[len(spectra) - columns : len(spectra)]:  # also above an empty place
        axes.tick_params(labelbottom=True)
    figure.supylabel(f"eigenvalue ({UNIT})", fontsize=10.5)
    figure.supxlabel("rank of the eigenvalue within its block", fontsize=10.5)
    if layers > 1:
        _layer_bar(figure, all_axes, colours, layers)
    return figure


def _layer_bar(figure: Figure, all_axes: list[Axes], colours: Colormap, layers: int) -> None:
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, layers - 1), colours), ax=all_axes, location="top", aspect=40, fraction=0.04
    )
    bar.ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar.set_label("layer, from input to output", fontsize=9.5)
    bar.outline.set_linewidth(0)  # type: ignore[operator]


def capacity_figure(theme: Theme, spectra: dict[str, dict[int | None, Any]]) -> Figure:
    """Layers x tensors: the trace on the left, the participation ratio on the right."""
    stacked = {name: group for name, group in spectra.items() if None not in group}
    layers = max(layer or 0 for group in stacked.values() for layer in group) + 1
    readings = (("Trace", UNIT, "trace"), ("Participation ratio", "directions", "participation_ratio"))
    figure, both = panels(float(np.clip(2.3 + 0.19 * layers, 3.2, 9.0)), 1, 2, sharey=True)
    colours = _colours(theme)
    for axes, (title, unit, field) in zip(both, readings, strict=True):
        grid = np.array(
            [
                [getattr(group[layer].capacity, field) if layer in group else np.nan for group in stacked.values()]
                for layer in range(layers)
            ]
        )
        norm = _norm(grid, logarithmic=field == "trace")
        axes.set_facecolor(theme.grid)
        x, y = np.arange(len(stacked) + 1) - 0.5, np.arange(layers + 1) - 0.5
        axes.pcolormesh(
            x, y, np.ma.masked_invalid(grid), norm=norm, cmap=colours, edgecolors=theme.background, linewidth=0.5
        )
        axes.grid(visible=False)
        axes.set_xticks(range(len(stacked)), [short(name) for name in stacked], rotation=90, fontsize=9)
        axes.set_ylim(layers - 0.5, -0.5)
        axes.yaxis.set_major_locator(MaxNLocator(min(layers, 15), integer=True))
        axes.tick_params(length=0)
        axes.set_title(title, fontsize=11)
        _bar(figure, axes, norm, colours, unit)
    both[0].set_ylabel("layer, from the input downwards" if layers > 8 else "layer")
    return figure


def _bar(figure: Figure, axes: Axes, norm: Normalize, colours: Colormap, unit: str) -> None:
    low, high = float(norm.vmin or 0), float(norm.vmax or 1)
    ticks = np.geomspace(low, high, 4) if isinstance(norm, LogNorm) else np.linspace(low, high, 4)
    scale, texts = ScalarMappable(norm, colours), {float(tick): _plain(tick) for tick in ticks}
    first, *_, last = colour_bar(figure, axes, scale, unit, texts, aspect=22).get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def _plain(value: float) -> str:
    return f"{value:.0f}" if 10 <= value < 10_000 else f"{value:.2g}"


def _norm(values: np.ndarray, logarithmic: bool) -> Normalize:
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return Normalize(0, 1)
    low, high = float(positive.min()), float(positive.max()) * 1.0001
    return LogNorm(low, high) if logarithmic else Normalize(low, high)


def _colours(theme: Theme) -> Colormap:
    """viridis without what would vanish on the background."""
    low, high = (0.0, 0.88) if theme.name == "light" else (0.18, 1.0)
    return ListedColormap(colormaps["viridis"](np.linspace(low, high, 256)))

# ruff: noqa: RUF001 -- a minus is what it looks like
"""Pictures of the pruning curves."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisher_jax.cli.page.style import Theme, log_axis, panels, percent_axis, spread
from fisher_jax.cli.report.pruning import Curve, PruningResult

# Short name, colour, width and dash of every ordering; the dash tells them apart without colour.
_LOOKS = {
    "Group Fisher, empirical": ("Fisher, empirical", "blue", 2.4, "-"),
    "Group Fisher, exact true": ("Fisher, exact true", "orange", 2.0, "-"),
    "saliency ½·F·w²": ("saliency ½·F·w²", "green", 1.8, (0, (5, 1.5))),
    "weight magnitude": ("weight size", "pink", 1.6, (0, (4, 1, 1, 1))),
    "corpus frequency": ("frequency", "vermillion", 1.6, (0, (1, 1))),
    "random": ("random", "muted", 1.6, "-"),
}


def _strokes(theme: Theme, name: str) -> dict:
    """The same in every picture."""
    _, colour, width, dash = _LOOKS[name]
    return {"color": getattr(theme, colour), "linewidth": width, "linestyle": dash}


def zeroed_figure(theme: Theme, result: PruningResult) -> Figure:
    """Held-out loss when the logits of pruned rows become 0, and its increase on a logarithmic axis."""
    figure, (loss, increase) = panels(7.6, 2)
    highest = max(float(np.nanmax(curve.zeroed)) for curve in result.curves)
    lowest = min(float(np.nanmin(curve.zeroed)) for curve in result.curves)
    for curve in result.curves:
        _line(loss, theme, result.shares, curve, curve.zeroed, curve.zeroed_error)
    loss.axhline(result.loss, color=theme.muted, linewidth=1, linestyle=(0, (2, 3)))
    loss.set_ylim(lowest - 0.12 * (highest - lowest), highest + 0.05 * (highest - lowest))
    below = result.loss - 0.01 * (highest - lowest)
    loss.text(0.02, below, f"nothing pruned: {result.loss:.2f}", va="top", fontsize=9, color=theme.muted)
    loss.set_ylabel("held-out loss, nats per token")
    loss.set_title("Pruned rows set to zero (logit = 0)")
    _labels(loss, theme, result.shares, [(c.name, c.zeroed) for c in result.curves])

    floor = 0.01  # a change below this, or for the better, lies on the axis
    log_axis(increase, "y", floor, max(2 * (highest - result.loss), 10 * floor), compact=True)
    for curve in result.curves:
        change, error = curve.zeroed[1:] - result.loss, curve.zeroed_error[1:]
        _line(increase, theme, result.shares[1:], curve, np.clip(change, floor, None), error)
    increase.set_ylabel("increase, nats per token (log)")
    increase.set_title("The same as increase, small ones magnified")
    for axes in (loss, increase):
        _share_axis(axes)
    return figure


def removed_figure(theme: Theme, result: PruningResult) -> Figure:
    """Loss on kept targets when pruned tokens are impossible, above the share of targets that are kept."""
    figure, (loss, kept) = panels(7.2, 2)
    for curve in result.curves:
        _line(loss, theme, result.shares, curve, curve.removed, curve.removed_error)
        kept.plot(result.shares, curve.kept, **_strokes(theme, curve.name))
    loss.set_ylim(0, result.loss * 1.3)
    loss.set_ylabel("loss on kept targets, nats per token")
    loss.set_title("Pruned rows removed (logit = −∞)")
    kept.set_title("Targets that can still be said")
    kept.set_ylim(0, 1.03)
    percent_axis(kept, "y", [0, 0.25, 0.5, 0.75, 1.0])
    kept.set_ylabel("held-out targets kept")
    for axes in (loss, kept):
        _share_axis(axes)
    _labels(loss, theme, result.shares, [(c.name, c.removed) for c in result.curves])
    _labels(kept, theme, result.shares, [(c.name, c.kept) for c in result.curves])
    return figure


def _line(axes: Axes, theme: Theme, shares: np.ndarray, curve: Curve, values: np.ndarray, error: np.ndarray) -> None:
    strokes = _strokes(theme, curve.name)
    if np.isfinite(error).any():
        spread_by = 1.96 * np.nan_to_num(error)
        axes.fill_between(
            shares, values - spread_by, values + spread_by, color=strokes["color"], alpha=0.16, linewidth=0
        )
    axes.plot(shares, values, **strokes)


def _share_axis(axes: Axes) -> None:
    axes.set_xlim(0, 1.0)
    percent_axis(axes, "x", [0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_xlabel("vocabulary rows pruned, least important first")


def _labels(axes: Axes, theme: Theme, shares: np.ndarray, lines: list[tuple[str, np.ndarray]]) -> None:
    """Names beside the right ends of the lines, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    finite = [(name, np.flatnonzero(np.isfinite(values)), values) for name, values in lines]
    ends = [(name, shares[at[-1]], np.clip(values[at[-1]], bottom, top)) for name, at, values in finite if len(at)]
    places = spread([value for _, _, value in ends], 0.058 * (top - bottom), bottom, top)
    for (name, share, value), place in zip(ends, places, strict=True):
        colour = _strokes(theme, name)["color"]
        axes.annotate(
            _LOOKS[name][0], (share, value), xytext=(1.04, place), textcoords=("axes fraction", "data"),
            color=colour, fontsize=9, va="center", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5),
            },
        )  # fmt: skip

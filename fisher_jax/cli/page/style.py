"""How the pictures look: light and dark, large enough for a phone, colour-blind safe, labelled directly."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from fisher_jax.cli.page.blocks import Block, Drawing, Picture, Sketch
from fisher_jax.cli.run.tools import Tools


class Theme(NamedTuple):
    """Colours of one background; the hues are those of Okabe and Ito."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    blue: str
    orange: str
    green: str
    pink: str
    vermillion: str


LIGHT = Theme(
    "light", "#ffffff", "#1b1f24", "#667080", "#e3e7ec",
    "#0072b2", "#c77800", "#00845f", "#b0528a", "#d55e00",
)  # fmt: skip
DARK = Theme(
    "dark", "#14181d", "#e8ecf1", "#97a3b3", "#2b323b",
    "#4ba3e3", "#e69f00", "#1fbf8f", "#d98bbb", "#f0803c",
)  # fmt: skip

WIDTH = 4.9  # inches: on a phone the text is as large as the page's
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@contextmanager
def theme_context(theme: Theme) -> Iterator[None]:
    """Matplotlib's settings for the pictures, for the duration of a block."""
    options: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "text.parse_math": False,  # a token may hold dollar signs
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": theme.muted,
        "axes.linewidth": 0.8,
        "axes.facecolor": theme.background,
        "axes.labelcolor": theme.ink,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "figure.facecolor": theme.background,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "lines.solid_capstyle": "round",
    }
    with mpl.rc_context(options):
        yield


def picture(name: str, alt: str, draw: Callable[..., Figure], *shown: Any) -> Drawing:
    """The picture ``draw(theme, *shown)``."""
    return Drawing(name, alt, lambda theme: draw(theme, *shown))


def drawn(blocks: Sequence[Sketch], tools: Tools) -> list[Block]:
    """The blocks with their pictures, each drawn once for a light and once for a dark background."""

    def made(drawing: Drawing, theme: Theme) -> bytes:
        return tools.picture(lambda: png(drawing.figure, theme))

    return [Picture(x.name, x.alt, made(x, LIGHT), made(x, DARK)) if isinstance(x, Drawing) else x for x in blocks]


def png(draw: Callable[[Theme], Figure], theme: Theme, *, dpi: int = 200) -> bytes:
    """The picture as PNG."""
    stream = io.BytesIO()
    with theme_context(theme):  # some settings are read while saving
        figure = draw(theme)
        FigureCanvasAgg(figure)
        figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def panels(
    height: float, rows: int = 1, columns: int = 1, *, width: float = WIDTH, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A new figure and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).ravel())


@cache
def _glyphs() -> FT2Font:
    return FT2Font(font_manager.findfont("DejaVu Sans"))


def drawable(token: str, *, longest: int = 18) -> str:
    """A readable token with escapes for what the font cannot draw, shortened in the middle."""
    shown = "".join(
        c if _glyphs().get_char_index(ord(c)) and not _is_right_to_left(c) else f"\\u{ord(c):04x}" for c in token
    )
    return shown if len(shown) <= longest else f"{shown[: longest - 6]}…{shown[-5:]}"


def _is_right_to_left(character: str) -> bool:
    # Drawn one letter at a time they would stand in the wrong order.
    return "\u0590" <= character <= "\u08ff" or "\ufb1d" <= character <= "\ufefc"


def log_axis(axes: Axes, which: str, low: float, high: float, *, compact: bool = False) -> None:
    """A logarithmic axis from `low` to `high` with ticks as plain text: 10⁻³, or 1, 10, 100, 1k when `compact`."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    _fix_ticks(axis, log_ticks(low, high, compact=compact))


def log_ticks(low: float, high: float, *, compact: bool = False, most: int = 8) -> dict[float, str]:
    """Values for ticks between `low` and `high`, about `most` of them, and their texts."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    narrow = math.log10(high / low) < 2.2
    every = max(1, round(len(decades) / most))
    factors = (1,) if not narrow else (1, 3) if most < 6 else (1, 2, 5)
    ticks = {
        factor * 10.0**d: _tick_text(factor, d, compact or narrow) for d in decades[::every] for factor in factors
    }
    return {value: text for value, text in ticks.items() if low <= value <= high}


def _tick_text(factor: int, exponent: int, plain: bool) -> str:
    if plain and -3 <= exponent < 3:
        return f"{factor * 10.0**exponent:g}"
    if plain and 3 <= exponent < 9:
        return f"{factor * 10 ** (exponent % 3)}{'kM'[exponent // 3 - 1]}"
    power = "10" + str(exponent).translate(_SUPERSCRIPTS)
    return power if factor == 1 else f"{factor}·{power}"


def colour_bar(
    figure: Figure, axes: Axes | list[Axes], scale: ScalarMappable, label: str, ticks: dict[float, str],
    **options: Any,
) -> Axes:  # fmt: skip
    """A bar below the axes that tells what the colours stand for; its own axes."""
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", pad=0.02, **options)
    _fix_ticks(bar.ax.xaxis, ticks)
    bar.ax.tick_params(labelsize=8.5)
    bar.set_label(label, fontsize=9.5)
    bar.outline.set_linewidth(0)  # type: ignore[operator]
    return bar.ax


def _fix_ticks(axis: Any, ticks: dict[float, str]) -> None:
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FixedFormatter(list(ticks.values())))
    axis.set_minor_locator(NullLocator())


def percent_axis(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    """Ticks in per cent of values between 0 and 1."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))


def spread(positions: Sequence[float], gap: float, lowest: float, highest: float) -> np.ndarray:
    """Positions moved as little as they must so that neighbours are `gap` apart, within the bounds."""
    wanted = np.asarray(positions, float)
    order = np.argsort(wanted, kind="stable")
    placed = np.clip(wanted[order], lowest, highest)
    for _ in range(200):
        overlap = gap - np.diff(placed)
        if np.all(overlap <= 1e-9 * gap):
            break
        push = np.where(overlap > 0, overlap / 2, 0.0)
        placed[:-1] -= push
        placed[1:] += push
        placed = np.clip(placed, lowest, highest)
    result = np.empty_like(placed)
    result[order] = placed
    return result

"""What the report says of two tasks side by side."""

from typing import NamedTuple

from fisher_jax.cli.page.blocks import Heading, Paragraph, Sketch, Table
from fisher_jax.cli.page.style import picture
from fisher_jax.cli.report import layer_plots, plots
from fisher_jax.cli.report.importance import Comparison, Importance
from fisher_jax.cli.report.layers import Layers


class Pair(NamedTuple):
    """A task beside one that was measured before it."""

    comparison: Comparison
    here: Importance
    there: Importance
    vocabulary: list[str]
    layers: tuple[Layers, Layers] | None  # of both, where both have them
    columns: list[str]


def pair_title(pair: Pair) -> str:
    return f"{pair.comparison.task} beside {pair.comparison.other}"


def pair_line(pair: Pair) -> str:
    c = pair.comparison
    return f"Importance in {c.task} and {c.other}: rank correlation {c.rank_correlation:.2f}."


def pair_blocks(pair: Pair) -> list[Sketch]:
    """The rows that differ most, all rows against each other, and the layers."""
    comparison, task, other = pair.comparison, pair.comparison.task, pair.comparison.other
    more, less = (
        ", ".join(pair.vocabulary[row] for row in chosen[:8]) or "none"
        for chosen in (comparison.gainers, comparison.losers)
    )
    blocks: list[Sketch] = [
        Heading(pair_title(pair)),
        Table(
            "",
            [],
            [
                [f"more in {task}", more],
                [f"more in {other}", less],
                ["rank correlation", f"{comparison.rank_correlation:.3f}"],
            ],
            left=2,
        ),
        picture(
            "importance", f"Importance in {task} against importance in {other}",
            plots.comparison_figure, comparison, pair.here, pair.there, pair.vocabulary,
        ),
    ]  # fmt: skip
    if pair.layers is not None:
        here, there = pair.layers
        blocks += [
            Paragraph(
                f"The same for the layers: violet where a part of a layer has more information in {task}, orange "
                "where it has less."
            ),
            picture(
                "layers", f"Heat map of the Fisher information in {task} over that in {other}",
                layer_plots.ratio_figure, here, there, pair.columns, task, other,
            ),
        ]  # fmt: skip
    return blocks

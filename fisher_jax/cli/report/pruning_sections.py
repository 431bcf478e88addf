"""What the report says of pruning."""

import numpy as np

from fisher_jax.cli.page.blocks import Heading, Paragraph, Sketch, Table
from fisher_jax.cli.page.style import picture
from fisher_jax.cli.report import pruning_plots
from fisher_jax.cli.report.findings import Findings
from fisher_jax.cli.report.pruning import PruningResult

_TABLE_SHARES = (0.2, 0.5, 0.8, 0.95)


def pruning_blocks(found: Findings) -> list[Sketch]:
    """Both curves in pictures and tables, or a sentence saying that they were not measured."""
    result = found.pruning
    if result is None:
        return [Heading("Pruning"), Paragraph("Not measured: no tokens were held out.")]
    return [
        Heading("What pruning costs"),
        Paragraph(_how(found, result)),
        picture(
            "pruning-zeroed", "Held-out loss against the share of vocabulary rows set to zero",
            pruning_plots.zeroed_figure, result,
        ),
        Paragraph(
            "A row set to zero is what a pruning mask gives: its logit becomes 0, which is not the same as "
            "impossible. Where the other logits lie far from 0 it gives the pruned tokens too much or too little "
            "probability, whatever their order."
        ),
        _loss_table(result),
        picture(
            "pruning-removed", "Loss on kept targets, and share of targets kept, against the share of rows removed",
            pruning_plots.removed_figure, result,
        ),
        Paragraph(
            "With the logit at minus infinity the vocabulary is really smaller. The loss is then over the targets "
            "that are kept, and falls, because fewer tokens compete and the rare, hard ones are gone; read it "
            "together with the share of targets that can still be said. A good order keeps the targets."
        ),
        _kept_table(result),
    ]  # fmt: skip


def _how(found: Findings, result: PruningResult) -> str:
    saliency = (
        "Saliency is ½ Σ F·w² over the entries of the row."
        if found.by_column is not None
        else "Saliency is ½·F·|w|²/D for a row of D columns, which takes its information as spread evenly over "
        "them; the command measures it entry by entry with --groups param."
    )
    bands = (
        "Bands are ±1.96 standard errors of the change in loss, over documents; for random, over repetitions."
        if result.num_documents > 1
        else "There is one held-out document, hence no band but that of random, which is over repetitions."
    )
    return (
        "Rows of the head are pruned in the head's use only, least important first, and the loss is measured on "
        f"{found.held_out}. {saliency} Equal scores (such as a frequency of 0) are put in random order, seed "
        f"{found.settings.seed}. {bands}"
    )


def _shares(result: PruningResult) -> list[int]:
    return [int(np.argmin(np.abs(result.shares - share))) for share in _TABLE_SHARES]


def _loss_table(result: PruningResult) -> Table:
    columns = _shares(result)
    return Table(
        f"Change of the held-out loss of {result.loss:.3f} nats per token at a share of rows set to zero, and the "
        "area under that curve",
        ["chosen by", *(f"{100 * result.shares[c]:.0f}%" for c in columns), "area"],
        [
            [curve.name, *(f"{curve.zeroed[c] - result.loss:+.2f}" for c in columns), f"{curve.area:.2f}"]
            for curve in sorted(result.curves, key=lambda curve: curve.area)
        ],
    )


def _kept_table(result: PruningResult) -> Table:
    columns = _shares(result)
    return Table(
        "Share of held-out targets that are kept at a share of rows removed",
        ["chosen by", *(f"{100 * result.shares[c]:.0f}%" for c in columns)],
        [
            [curve.name, *(f"{100 * curve.kept[c]:.1f}%" for c in columns)]
            for curve in sorted(result.curves, key=lambda curve: -float(np.sum(curve.kept)))
        ],
    )

"""What the report says, in plain words: the same blocks for HTML and Markdown."""

from dataclasses import dataclass, field

import numpy as np

from fisher_jax.cli import plots, pruning_plots
from fisher_jax.cli.blocks import Block, Heading, Paragraph, Picture, Table
from fisher_jax.cli.corpora import describe_sources
from fisher_jax.cli.importance import Comparison, Importance
from fisher_jax.cli.packing import Packed
from fisher_jax.cli.progress import duration
from fisher_jax.cli.pruning import Curve, PruningResult
from fisher_jax.cli.settings import Settings
from fisher_jax.cli.style import DARK, LIGHT, png, theme_context

__all__ = ["Findings", "blocks", "lead", "title", "verdict"]

KIND_NAMES = {"empirical": "empirical Fisher", "true": "exact true Fisher"}
FREQUENT = 20


@dataclass
class Findings:
    """Everything one run found out, ready to be written down."""

    settings: Settings
    model_name: str
    tied: bool
    vocabulary: list[str]  # readable tokens by id
    packed: Packed
    main: Importance
    other: Importance
    loss: float
    pruning: PruningResult | None
    by_column: np.ndarray | None = None
    comparisons: list[tuple[Comparison, Importance]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0  # streamed tokens per second


def title(found: Findings) -> str:
    """The headline."""
    return f"Which vocabulary tokens of {found.model_name} matter on {found.settings.task}"


def lead(found: Findings) -> str:
    """The answer in three sentences."""
    share = np.sort(found.main.mean)[::-1].cumsum() / found.main.mean.sum()
    half = int(np.searchsorted(share, 0.5)) + 1
    top = ", ".join(found.vocabulary[row] for row in found.main.order[:5])
    text = (
        f"Half of the Fisher information of the head lies in {half:,} of {len(found.main.mean):,} "
        f"vocabulary rows; the five that matter most are {top}."
    )
    return f"{text} {verdict(found.pruning)}" if found.pruning else text


def verdict(pruning: PruningResult, share: float = 0.5) -> str:
    """Pruning in one sentence: the loss each way of choosing costs at one share."""
    index = int(np.argmin(np.abs(pruning.shares - share)))

    def cost(curve: Curve) -> float:
        return float(curve.zeroed[index] - pruning.loss)

    ranked = sorted(pruning.curves, key=cost)
    best, curves = ranked[0], {curve.name: curve for curve in pruning.curves}
    fisher = curves["Group Fisher, empirical"]
    said = [f"{cost(fisher):+.2f} nats per token when chosen by empirical Fisher"]
    if best is not fisher:
        said.append(f"{cost(best):+.2f} by {_in_sentence(best.name)}, the cheapest")
    said.append(f"{cost(curves['random']):+.2f} at random")
    return (
        f"Setting {100 * pruning.shares[index]:.0f}% of the rows to zero changes the held-out loss of "
        f"{pruning.loss:.2f} by {', '.join(said)}."
    )


def _in_sentence(name: str) -> str:
    return name if name.startswith("Group") else name[0].lower() + name[1:]


def blocks(found: Findings) -> list[Block]:
    """The whole report after its headline."""
    return [
        *_ranks(found),
        *_frequency(found),
        *_single_tokens(found),
        *_columns(found),
        *_pruning(found),
        *_tasks(found),
        *_method(found),
        *_reading(found),
    ]


def _picture(name: str, alt: str, draw) -> Picture:
    rendered = []
    for theme in (LIGHT, DARK):
        figure = draw(theme)
        with theme_context(theme):
            rendered.append(png(figure))
    return Picture(name, alt, *rendered)


def _ranks(found: Findings) -> list[Block]:
    s = found.settings
    return [
        Heading("Importance by rank"),
        Paragraph(
            "The importance of a vocabulary row is the Fisher information of its weights: how strongly, "
            "on average over the tokens of the text, the log-probability of the next token reacts to "
            "them. It is summed over the row and divided by the number of scored tokens. Shown is the "
            f"{KIND_NAMES[s.kind]}; beside it the other kind. The empirical one takes the next token that "
            "the text has; the exact true one takes the mean over all tokens, weighted as the model "
            "predicts them, with no sampling."
        ),
        _picture(
            "importance-by-rank",
            "Importance of every vocabulary row, sorted, on logarithmic axes with its interval",
            lambda theme: plots.rank_figure(
                theme, found.main, found.other, found.vocabulary, s.kind, s.level
            ),
        ),
    ]


def _frequency(found: Findings) -> list[Block]:
    never = int(np.sum(found.main.counts == 0))
    share = float(found.main.mean[found.main.counts == 0].sum() / found.main.mean.sum())
    return [
        Heading("Importance against frequency"),
        Paragraph(
            f"{never:,} of {len(found.main.counts):,} rows are never the next token in this text; together "
            f"they hold {100 * share:.1f}% of the information. Labelled are tokens that matter far more or "
            "far less than others which are equally frequent: below, tokens that the model sees coming; "
            "above, tokens that it often expects in vain or fails to expect."
        ),
        _picture(
            "importance-by-frequency",
            "Importance of every vocabulary row against its number of occurrences",
            lambda theme: plots.frequency_figure(theme, found.main, found.vocabulary),
        ),
    ]


def _single_tokens(found: Findings) -> list[Block]:
    main, level = found.main, found.settings.level
    order = main.order
    frequent = order[main.counts[order] >= FREQUENT][::-1]
    most = [("Most important tokens", order[:20])]
    least = [("Least important of all rows", order[::-1][:12])]
    if len(frequent):
        least.insert(0, (f"Least important of those that occur {FREQUENT} times or more", frequent[:12]))
    return [
        Heading("Single tokens"),
        Paragraph(
            "␣ stands for a space and \\n for a line break; × is how often the token is the next one in "
            "the text. All rows are in importance.csv."
        ),
        _picture(
            "most-important",
            "The twenty most important tokens with their intervals",
            lambda theme: plots.dots_figure(theme, most, main, found.vocabulary, level),
        ),
        _picture(
            "least-important",
            "The least important tokens with their intervals",
            lambda theme: plots.dots_figure(theme, least, main, found.vocabulary, level),
        ),
    ]


def _columns(found: Findings) -> list[Block]:
    if found.by_column is None:
        return []
    return [
        Heading("Importance by hidden dimension"),
        Paragraph(
            "With --groups param every entry of the head has its own state; here they are summed over the "
            "vocabulary. The importance of a row, above and in importance.csv, is the sum over its "
            "columns."
        ),
        _picture(
            "importance-by-column",
            "Importance of every column of the head",
            lambda theme: plots.columns_figure(theme, found.by_column),
        ),
    ]


def _pruning(found: Findings) -> list[Block]:
    result = found.pruning
    if result is None:
        return [Heading("Pruning"), Paragraph("Not measured: no tokens were held out (--held-out-tokens 0).")]
    whose = (
        f"{result.num_tokens:,} tokens of {result.num_documents} documents that were not used above"
        if found.packed.whole_documents_held_out
        else f"the last {result.num_tokens:,} tokens, which were not used above but stand next to them"
    )
    saliency = (
        "saliency is ½ Σ F·w² over the entries of the row"
        if found.by_column is not None
        else "saliency is ½·F·|w|²/D, which takes the information of a row as spread evenly over its D columns"
    )
    errors = (
        "Bands are ±1.96 standard errors over documents of the change in loss; for random they are over "
        "repetitions."
        if result.num_documents > 1
        else "There is one held-out document, so there is no band but that of random, over repetitions."
    )
    return [
        Heading("What pruning costs"),
        Paragraph(
            "Rows of the head are pruned in the head's use only, least important first, and the loss is "
            f"measured on {whose}. {saliency[0].upper()}{saliency[1:]}. Equal scores (such as a frequency "
            f"of 0) are in random order, seed {found.settings.seed}. {errors}"
        ),
        _picture(
            "pruning-zeroed",
            "Held-out loss against the share of vocabulary rows set to zero",
            lambda theme: pruning_plots.zeroed_figure(theme, result, found.settings.level),
        ),
        Paragraph(
            "A row set to zero is what a pruning mask gives: its logit becomes 0, which is not the same "
            "as never: where the other logits lie far from 0 it distorts the prediction."
        ),
        _loss_table(result),
        _picture(
            "pruning-removed",
            "Loss on kept targets, and share of targets kept, against the share of rows removed",
            lambda theme: pruning_plots.removed_figure(theme, result, found.settings.level),
        ),
        Paragraph(
            "With the logit at minus infinity the vocabulary is really smaller. The loss is then over the "
            "targets that are kept, and falls, because fewer tokens compete; read it together with the "
            "share of targets that can still be said. An ordering is good if it keeps the targets."
        ),
        _kept_table(result),
    ]


_TABLE_SHARES = (0.2, 0.5, 0.8, 0.9, 0.95)


def _columns_of(result: PruningResult) -> list[int]:
    return [int(np.argmin(np.abs(result.shares - share))) for share in _TABLE_SHARES]


def _loss_table(result: PruningResult) -> Table:
    columns = _columns_of(result)
    header = ["chosen by", *(f"{100 * result.shares[c]:.0f}%" for c in columns), "area"]
    rows = [
        [curve.name, *(f"{curve.zeroed[c] - result.loss:+.3f}" for c in columns), f"{curve.area:.3f}"]
        for curve in sorted(result.curves, key=lambda curve: curve.area)
    ]
    return Table([f"change in loss, nats per token; {header[0]}", *header[1:]], rows)


def _kept_table(result: PruningResult) -> Table:
    columns = _columns_of(result)
    rows = [
        [curve.name, *(f"{100 * curve.kept[c]:.1f}%" for c in columns)]
        for curve in sorted(result.curves, key=lambda curve: -float(np.sum(curve.kept)))
    ]
    return Table(["targets kept; chosen by", *(f"{100 * result.shares[c]:.0f}%" for c in columns)], rows)


def _tasks(found: Findings) -> list[Block]:
    if not found.comparisons:
        return []
    parts: list[Block] = [
        Heading("Tasks side by side"),
        Paragraph(
            "Rank correlation (Spearman) of the importance of all rows, and the tokens whose importance "
            "differs most, by difference over its standard error, among those that occur five times or "
            "more in one of the tasks."
        ),
    ]
    rows = []
    for comparison, _ in found.comparisons:
        tokens = [
            ", ".join(found.vocabulary[row] for row in chosen[:8]) or "none"
            for chosen in (comparison.gainers, comparison.losers)
        ]
        rows.append([comparison.other, *tokens, f"{comparison.rank_correlation:.3f}"])
    task = found.settings.task
    parts.append(Table(["task", f"more in {task}", f"less in {task}", "correlation"], rows, left=3))
    for number, (comparison, there) in enumerate(found.comparisons, start=1):
        parts.append(
            _picture(
                f"tasks-{number}",
                f"Importance in {comparison.task} against importance in {comparison.other}",
                lambda theme, c=comparison, t=there: plots.comparison_figure(
                    theme, c, found.main, t, found.vocabulary
                ),
            )
        )
    return parts


def _method(found: Findings) -> list[Block]:
    s = found.settings
    rows = [
        ["model", f"{found.model_name}, {s.dtype}"],
        ["text", f"{describe_sources(s.text)}; task {s.task}"],
        ["streamed", f"{found.packed.choice}"],
        ["rows", f"{s.seq_len} tokens each, {s.batch_size} in a batch; a row sees nothing before it"],
        ["loss", f"{found.loss:.3f} nats per token, perplexity {np.exp(found.loss):.1f}"],
        ["observations", f"{found.main.units:,.0f}, unit: {s.unit}"],
        ["kind, groups", f"{KIND_NAMES[s.kind]}, {s.groups}"],
        *([name, duration(seconds)] for name, seconds in found.timings.items()),
        ["rate", f"{found.rate:,.0f} tokens per second, forward pass and statistics"],
    ]
    return [Heading("How it was measured"), Table(["", ""], rows, left=2)]


def _reading(found: Findings) -> list[Block]:
    s = found.settings
    units = {
        "document": "Intervals take whole documents as independent: tokens of one document repeat its subject, and "
        "intervals that treat them as independent are far too narrow. They answer: how different could "
        "this number be, had other documents of the same kind been read?",
        "sequence": "Intervals take rows of text as independent. Rows of one document are not, so these intervals are "
        "too narrow for conclusions about other documents; --unit document is the honest choice.",
        "token": "Intervals take single tokens as independent. They are not, so these intervals are far too narrow for "
        "conclusions about other documents; --unit document is the honest choice.",
        "batch": "Intervals take batches as independent. Neighbouring batches share documents, so these intervals are "
        "too narrow for conclusions about other documents; --unit document is the honest choice.",
    }
    parts: list[Block] = [Heading("How to read it"), Paragraph(units[s.unit])]
    if not found.main.has_intervals:
        parts.append(
            Paragraph(
                f"There is only one {s.unit} here, so there are no intervals. Give more documents, or "
                "--split-documents blank-line, or --unit sequence."
            )
        )
    parts.append(
        Paragraph(
            "A token that never occurs as a label still has an importance, from the probability that the "
            "model gives it at every position (p² |h|²). Its interval describes how that varies between "
            "documents; it cannot know of the first time the label occurs, which would add (1 − p)² |h|² "
            "at once. The exact true Fisher does not depend on labels and has no such surprise."
        )
    )
    if found.tied:
        parts.append(
            Paragraph(
                "This model uses one matrix as input embedding and as head. What is measured, and pruned, "
                "is its use as head; the importance of the tied matrix as a whole is another number."
            )
        )
    return parts

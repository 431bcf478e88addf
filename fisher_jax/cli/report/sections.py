# ruff: noqa: RUF001 -- a minus, a times sign and a dash are what they look like
"""What the report says, in plain words: the same blocks for HTML and Markdown."""

import math

from fisher_jax.cli.page.blocks import Heading, Paragraph, Sketch, Table
from fisher_jax.cli.page.style import picture
from fisher_jax.cli.report import plots
from fisher_jax.cli.report.findings import Findings
from fisher_jax.cli.report.layer_sections import layer_blocks
from fisher_jax.cli.report.pruning_sections import pruning_blocks
from fisher_jax.cli.run.progress import duration

KIND_NAMES = {"empirical": "empirical Fisher", "true": "exact true Fisher"}
FREQUENT = 20

_UNITS = {
    "document": "Intervals take whole documents as independent: tokens of one document repeat its subject, and "
    "intervals that treat them as independent are far too narrow. They answer: how different could this number "
    "be, had other documents of the same kind been read?",
    "sequence": "Intervals take rows of text as independent. Rows of one document are not, so these intervals "
    "are too narrow for conclusions about other documents; whole documents as units are the honest choice.",
    "token": "Intervals take single tokens as independent. They are not, so these intervals are far too narrow "
    "for conclusions about other documents; whole documents as units are the honest choice.",
    "batch": "Intervals take batches as independent. Neighbouring batches share documents, so these intervals "
    "are too narrow for conclusions about other documents; whole documents as units are the honest choice.",
}


def blocks(found: Findings) -> list[Sketch]:
    """The whole report after its headline."""
    return [
        *layer_blocks(found),
        *_ranks(found),
        *_frequency(found),
        *_single_tokens(found),
        *_columns(found),
        *pruning_blocks(found),
        *_method(found),
        *_reading(found),
    ]


def _ranks(found: Findings) -> list[Sketch]:
    s = found.settings

    return [
        Heading("Importance by rank"),
        Paragraph(
            "The importance of a vocabulary row is the Fisher information of its weights: how strongly the "
            "log-probability of the next token reacts to them, squared, averaged over the tokens of the text and "
            f"summed over the row. Shown is the {KIND_NAMES[s.kind]}, beside it the other kind. The empirical "
            "one takes the next token that the text has; the exact true one takes the mean over all next "
            "tokens, as probable as the model finds them, with no sampling."
        ),
        picture(
            "importance-by-rank", "Importance of every vocabulary row, sorted, on logarithmic axes with its interval",
            plots.rank_figure, found.main, found.other, found.vocabulary, s.kind, s.level,
        ),
    ]  # fmt: skip


def _frequency(found: Findings) -> list[Sketch]:
    unseen = found.main.counts == 0
    total = float(found.main.mean.sum())
    share = float(found.main.mean[unseen].sum()) / total if total > 0 else 0.0
    return [
        Heading("Importance against frequency"),
        Paragraph(
            f"{unseen.sum():,} of {unseen.size:,} rows are never the next token in this text; together they hold "
            f"{100 * share:.2g}% of the information. Labelled are tokens that matter far more or far less than "
            "others which are equally frequent: low are tokens that the model sees coming, high are tokens that "
            "surprise it, or that it expects in vain."
        ),
        picture(
            "importance-by-frequency", "Importance of every vocabulary row against its number of occurrences",
            plots.frequency_figure, found.main, found.vocabulary,
        ),
    ]  # fmt: skip


def _single_tokens(found: Findings) -> list[Sketch]:
    main, level = found.main, found.settings.level
    order = main.order
    frequent = order[main.counts[order] >= FREQUENT][::-1]
    most = [("Most important tokens", order[:20])]
    least = [("Least important rows of all", order[::-1][:12])]
    if len(frequent):
        least.insert(0, (f"Least important, seen {FREQUENT} times or more", frequent[:12]))
    return [
        Heading("Single tokens"),
        Paragraph(
            "␣ stands for a space and \\n for a line break; 12× says that the token is the next one twelve times "
            "in the text. All rows are in importance.csv."
        ),
        picture(
            "most-important", "The twenty most important tokens with their intervals",
            plots.dots_figure, most, main, found.vocabulary, level,
        ),
        picture(
            "least-important", "The least important tokens with their intervals",
            plots.dots_figure, least, main, found.vocabulary, level,
        ),
    ]  # fmt: skip


def _columns(found: Findings) -> list[Sketch]:
    by_column = found.by_column
    if by_column is None:
        return []
    return [
        Heading("Importance by hidden dimension"),
        Paragraph(
            "With --groups param every entry of the head has its own state; here they are summed over the "
            "vocabulary. The importance of a row, above and in importance.csv, is the sum over its columns."
        ),
        picture("importance-by-column", "Importance of every column of the head", plots.columns_figure, by_column),
    ]


def _method(found: Findings) -> list[Sketch]:
    s = found.settings
    passes = "forward pass" if found.layers is None else "two forward passes, one backward pass"
    rows = [
        ["model", f"{found.model_name}, {found.dtype}"],
        ["text", f"{found.text}; task {s.task}"],
        ["tokens", found.choice],
        ["rows", f"{s.row_length} tokens each, {s.batch_size} in a batch; a row sees nothing before it"],
        ["loss", f"{found.loss:.3f} nats per token, perplexity {_perplexity(found.loss)}"],
        ["observations", found.units],
        ["kind", KIND_NAMES[s.kind]],
        ["parameters", "all" if s.parameters == "all" else "the head"],
        ["groups of the head", s.groups],
        *([f"time: {name}", duration(seconds)] for name, seconds in found.timings.items()),
        ["rate", f"{found.rate:,.0f} tokens per second, {passes} and statistics"],
    ]
    return [Heading("How it was measured"), Table("", [], rows, left=2)]


def _reading(found: Findings) -> list[Sketch]:
    s = found.settings
    parts: list[Sketch] = [Heading("How to read it"), Paragraph(_UNITS[s.unit])]
    if not found.main.has_intervals:
        parts.append(
            Paragraph(
                f"There is only one {s.unit} here, so there are no intervals. Give more documents (the command's "
                "--split-documents blank-line makes them of paragraphs), or take sequences as units."
            )
        )
    parts.append(
        Paragraph(
            "A token that never occurs as a label still has an importance, from the probability that the model "
            "gives it at every position (p² |h|²). Its interval describes how that varies between documents; it "
            "cannot know of the first time the label occurs, which would add (1 − p)² |h|² at once. The exact "
            "true Fisher does not depend on labels and has no such surprise."
        )
    )
    if found.tied:
        parts.append(
            Paragraph(
                "This model uses one matrix as input embedding and as head. What is measured, and pruned, is its "
                "use as head; the importance of the tied matrix as a whole is another number."
            )
        )
    return parts


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700.0))
    return f"{value:,.1f}" if value < 1e6 else f"{value:.1e}"

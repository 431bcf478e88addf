"""What the page of a training run says, in plain words, and its curve as CSV."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from fisher_jax.cli.page.blocks import Heading, Paragraph, Sketch, Table
from fisher_jax.cli.page.csv_text import csv_text
from fisher_jax.cli.page.style import picture
from fisher_jax.cli.run.progress import duration
from fisher_jax.cli.train.data import Text
from fisher_jax.cli.train.model import Start
from fisher_jax.cli.train.plots import loss_figure
from fisher_jax.cli.train.settings import TrainSettings
from fisher_jax.cli.train.store import TrainProgress
from fisher_jax.text.corpora import describe_sources


class Curve(NamedTuple):
    """One run: what it is called, its folder, and how it went."""

    name: str
    folder: str
    progress: TrainProgress


@dataclass(frozen=True)
class TrainFindings:
    """All that the page is written from; the runs of this call come first among the curves."""

    settings: TrainSettings
    start: Start
    text: Text
    curves: list[Curve]
    seconds: dict[str, float]

    @property
    def bits_per_nat(self) -> float:
        """Bits per byte for one nat per token, on the held-out text."""
        return 1 / (math.log(2) * self.text.bytes_per_token)


def text_words(text: Text) -> str:
    packed = text.packed
    held = f"{packed.held_out.num_targets:,} tokens of {len(packed.held_out.names):,}"
    which = f"{held} other documents are held out" if packed.whole_documents_held_out else f"{held} ends are held out"
    return (
        f"{packed.stream.num_targets:,} tokens of {len(packed.stream.names):,} documents in rows; {which}, "
        f"{text.bytes_per_token:.2f} bytes per token"
    )


def title(found: TrainFindings) -> str:
    names = " and ".join(curve.name for curve in found.curves) if len(found.curves) < 4 else "optimizers compared"
    which = (
        f"{found.start.model.split(' (')[0]} trained further"
        if found.start.model
        else "A small language model trained"
    )
    return f"{which} with {names}"


def lead(found: TrainFindings) -> str:
    ours = found.curves[: len(found.settings.runs())]
    told = [
        f"{curve.name} brings the loss on held-out text from {curve.progress.points[0].held_out_loss:.2f} to "
        f"{_last(curve):.2f} nats per token ({found.bits_per_nat * _last(curve):.2f} bits per byte) in "
        f"{curve.progress.step:,} steps"
        for curve in ours
    ]
    return " ".join([f"{'; '.join(told)}.", *comparisons(found)])


def _last(curve: Curve) -> float:
    return curve.progress.points[-1].held_out_loss


def comparisons(found: TrainFindings) -> list[str]:
    """How much sooner the best run reaches the final loss of each other one, a sentence for each."""
    if len(found.curves) < 2:
        return []
    best = min(found.curves, key=_last)
    lines = []
    for other in found.curves:
        if other is best:
            continue
        step, seconds = _reaches(best, _last(other))
        then = other.progress.points[-1]
        lines.append(
            f"{best.name} reaches the last loss of {other.name}, {_last(other):.3f}, after {step:,} steps and "
            f"{duration(seconds)}; {other.name} took {then.step:,} steps and {duration(then.seconds)}."
        )
    return lines


def _reaches(curve: Curve, loss: float) -> tuple[int, float]:
    """The first step, and seconds, at which the held-out loss is at most this one."""
    point = next(point for point in curve.progress.points if point.held_out_loss <= loss)
    return point.step, point.seconds


HEADER = ["optimizer", "nats/token", "bits/byte", "steps", "time", "ms/step", "tokens/s"]


def rows(found: TrainFindings) -> list[list[str]]:
    """One line for every run: its last losses and what they took."""
    return [
        [
            curve.name,
            f"{_last(curve):.3f}",
            f"{found.bits_per_nat * _last(curve):.3f}",
            f"{curve.progress.step:,}",
            duration(curve.progress.seconds),
            f"{1000 * curve.progress.seconds / max(curve.progress.step, 1):.0f}",
            f"{curve.progress.tokens / max(curve.progress.seconds, 1e-9):,.0f}",
        ]
        for curve in found.curves
    ]


def blocks(found: TrainFindings) -> list[Sketch]:
    """The page after its headline."""
    curves = [(curve.name, curve.progress) for curve in found.curves]
    return [
        Heading("Loss"),
        Paragraph(
            "The loss is the negative log-probability of the next token, in nats, averaged over tokens. Held out are "
            f"{'whole documents' if found.text.packed.whole_documents_held_out else 'the ends of the documents'} "
            "that no step sees; the thin line is the loss of the batches themselves, before each step, averaged "
            "between two points. Time is that of the steps of this machine, compilation and evaluation left out."
        ),
        picture(
            "train-loss", "Held-out and training loss over steps and over time",
            loss_figure, curves, found.bits_per_nat,
        ),
        Table("At the end, on held-out text", HEADER, rows(found)),
        *[Paragraph(line) for line in comparisons(found)],
        *_method(found),
    ]  # fmt: skip


def _method(found: TrainFindings) -> list[Sketch]:
    s, config = found.settings, found.start.config
    epochs = s.steps * s.batch_size / len(found.text.packed.stream.lengths)
    table = [
        ["model", f"{config.num_layers} layers, width {config.width}, {config.num_heads} heads, MLP "
                  f"{config.mlp_size}, head {'tied to the embedding' if config.tied else 'of its own'}"],
        ["first weights", found.start.model or f"random, seed {s.seed}"],
        ["parameters", f"{found.curves[0].progress.parameters:,}"],
        ["tokens", f"{'of that model' if s.init else s.tokenizer}, vocabulary {config.vocab_size:,}"],
        ["text", f"{describe_sources(s.text)}: {text_words(found.text)}"],
        ["a step", f"{s.batch_size} rows of {s.row_length} tokens; {epochs:.2g} epochs in all"],
        *([curve.name, curve.progress.description] for curve in found.curves),
        *([f"compilation: {curve.name}", duration(curve.progress.compile_seconds)] for curve in found.curves),
        *([f"time: {name}", duration(seconds)] for name, seconds in found.seconds.items()),
    ]  # fmt: skip
    return [
        Heading("How it was trained"),
        Table("", [], table, left=2),
        Paragraph(
            f"The trained model is a Hugging Face folder: {', '.join(str(each.out / 'model') for each in s.runs())}. "
            "Every command opens it with --model, and so does transformers. Weights and optimizer state are in "
            "state; curve.csv has the numbers of the picture."
        ),
    ]


def curve_csv(found: TrainFindings) -> str:
    header = [
        "run",
        "optimizer",
        "step",
        "tokens",
        "seconds",
        "train_loss",
        "held_out_loss",
        "held_out_bits_per_byte",
    ]
    rows: list[list[object]] = []
    for curve in found.curves:
        for point in curve.progress.points:
            train = "" if point.train_loss is None else repr(point.train_loss)
            losses = [train, repr(point.held_out_loss), repr(found.bits_per_nat * point.held_out_loss)]
            rows.append(
                [curve.folder, curve.progress.optimizer, point.step, point.tokens, f"{point.seconds:.3f}", *losses]
            )
    return csv_text(header, rows)

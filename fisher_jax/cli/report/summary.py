"""The last thing on the terminal: a short table a person wants to read."""

from pathlib import Path

import numpy as np

from fisher_jax.cli.report.findings import Findings, verdict, where
from fisher_jax.cli.report.parts import Part
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.run.terminal import Terminal, table


def summary(console: Terminal, found: Findings) -> None:
    """Top tokens, loss, pruning, time, and where the report is."""
    main, settings = found.main, found.settings
    header = ["token", "count", "importance", *([f"{100 * settings.level:g}% interval"] * main.has_intervals)]
    rows = []
    for row in main.order[:10]:
        interval = [f"{main.lower[row]:.3g} to {main.upper[row]:.3g}"] * main.has_intervals
        rows.append([found.vocabulary[row], f"{main.counts[row]:,}", f"{main.mean[row]:.3g}", *interval])
    lines = [f"loss {found.loss:.3f} nats per token (perplexity {np.exp(found.loss):.1f}) over {main.tokens:,.0f} "
             f"tokens, {found.units}"]  # fmt: skip
    if found.layers is not None:
        lines.append(where(found, found.layers))
    if found.pruning:
        lines.append(verdict(found.pruning))
    lines += [*found.comparisons, f"{console.took}, streaming at {found.rate:,.0f} tokens per second"]
    title = f"{found.model_name} on {settings.task}: what matters most"
    console.summary(title, lines, _page(settings), table(header, rows))


def told_again(console: Terminal, settings: ReportSettings, part: Part) -> None:
    """For a task that was finished before."""
    again = (
        f"the task {settings.task} was finished before: nothing had to be computed (--overwrite measures it again)"
    )
    console.summary(part.title, [part.lead, again], _page(settings))


def _page(settings: ReportSettings) -> tuple[str, Path]:
    return "report", settings.out / "report.html"

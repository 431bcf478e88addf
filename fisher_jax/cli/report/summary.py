"""The last thing on the terminal: a short table a person wants to read."""

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fisher_jax._support.printable import printable
from fisher_jax.cli.report.findings import Findings, verdict, where
from fisher_jax.cli.report.parts import Part
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.run.progress import duration
from fisher_jax.cli.run.terminal import bold

__all__ = ["summary", "told_again"]


def summary(console: Console, found: Findings, seconds: float) -> None:
    """Top tokens, loss, pruning, time, and where the report is."""
    main = found.main
    table = Table(box=None, padding=(0, 2), header_style="bold", title_justify="left")
    table.add_column("token")
    table.add_column("count", justify="right")
    table.add_column("importance", justify="right")
    if main.has_intervals:
        table.add_column(f"{100 * found.settings.level:g}% interval", justify="right")
    for row in main.order[:10]:
        cells: list[Text | str] = [Text(found.vocabulary[row]), f"{main.counts[row]:,}", f"{main.mean[row]:.3g}"]
        if main.has_intervals:
            cells.append(f"{main.lower[row]:.3g} to {main.upper[row]:.3g}")
        table.add_row(*cells)
    console.print()
    console.print(bold(f"{found.model_name} on {found.settings.task}: what matters most"))
    console.print(table)
    console.print()
    plural = "" if main.units == 1 else "es" if found.settings.unit == "batch" else "s"
    units = f"{main.units:,.0f} {found.settings.unit}{plural}"
    lines = [f"loss {found.loss:.3f} nats per token (perplexity {np.exp(found.loss):.1f}) over {main.tokens:,.0f} "
             f"tokens, {units}"]  # fmt: skip
    if found.layers is not None:
        lines.append(where(found, found.layers))
    if found.pruning:
        lines.append(verdict(found.pruning))
    lines += found.comparisons
    lines.append(f"took {duration(seconds)}, streaming at {found.rate:,.0f} tokens per second")
    for line in lines:
        console.print(line)
    _where(console, found.settings)


def told_again(console: Console, settings: ReportSettings, part: Part) -> None:
    """For a task that was finished before."""
    console.print()
    console.print(bold(part.title))
    console.print(part.lead)
    console.print(
        f"the task {settings.task} was finished before: nothing had to be computed (--overwrite measures it again)"
    )
    _where(console, settings)


def _where(console: Console, settings: ReportSettings) -> None:
    path = (settings.out / "report.html").resolve()
    console.print(Text.assemble("report: ", (printable(str(path)), "bold")))

# ruff: noqa: RUF001 -- signs of mathematics are what they look like
"""What the page of a spectrum says, in plain words, and its tables as CSV."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fisher_jax.cli.page.blocks import Heading, Paragraph, Sketch, Table
from fisher_jax.cli.page.csv_text import csv_text
from fisher_jax.cli.page.style import picture
from fisher_jax.cli.run.progress import duration
from fisher_jax.cli.spectrum import plots
from fisher_jax.cli.spectrum.measure import Measured, Passes
from fisher_jax.cli.spectrum.progress import short_time
from fisher_jax.cli.spectrum.settings import SpectrumSettings
from fisher_jax.text.corpora import describe_sources

NAMES = {
    "ggn": "generalised Gauss-Newton matrix",
    "fisher": "true Fisher matrix",
    "empirical-fisher": "empirical Fisher matrix",
    "hessian": "Hessian",
}
SHORT_NAMES = {"ggn": "GGN", "fisher": "true Fisher", "empirical-fisher": "empirical Fisher", "hessian": "Hessian"}
_FORMULAS = {
    "ggn": "the mean over tokens of JᵀHJ, with the Jacobian J of a token's logits in the parameters and the Hessian "
    "H of its loss in the logits. For a softmax it equals the true Fisher matrix. No eigenvalue is negative",
    "fisher": "the mean over tokens of ssᵀ, with the score s of a token, in expectation over next tokens as probable "
    "as the model finds them; exact, without sampling. No eigenvalue is negative",
    "empirical-fisher": "the mean over tokens of ssᵀ, with the score s of the next token that the text has. No "
    "eigenvalue is negative",
    "hessian": "the second derivative of the mean loss per token. Directions in which the loss curves downwards have "
    "negative eigenvalues",
}


@dataclass(frozen=True)
class SpectrumFindings:
    """All that a run has measured."""

    settings: SpectrumSettings
    model_name: str
    parameters: dict[str, int]  # that move, and their sizes
    tokens: int
    rows: int
    documents: int
    passes: Passes
    spectrum: Measured
    basis: int
    density: Measured | None
    blocks: dict[str, dict[int | None, Any]]
    seconds: dict[str, float]

    @property
    def dimension(self) -> int:
        return sum(self.parameters.values())


def title(found: SpectrumFindings) -> str:
    return f"Curvature of {found.model_name}: {NAMES[found.settings.operator]}"


def lead(found: SpectrumFindings) -> str:
    s = found.spectrum.found
    values, converged = s.eigenvalues, int(s.converged.sum())
    there = int(np.isfinite(values).sum())
    largest = f"The largest eigenvalue is {values[0]:.4g} nats per token"
    if found.settings.which == "both":
        largest += f", the smallest {values[found.settings.k]:.4g}"
    elif math.isfinite(s.spectral_gap) and values[0] > 0:
        largest += f", {s.spectral_gap:.3g} above the second"
    return (
        f"{largest}; {converged} of {there} eigenvalues have converged to {100 * found.settings.tol:g}%. Measured "
        f"over {found.dimension:,} parameters on {found.tokens:,} tokens of text."
    )


def blocks(found: SpectrumFindings) -> list[Sketch]:
    """The page after its headline."""
    return [*_eigenvalues(found), *_density(found), *_blocks(found), *_method(found)]


def eigenvalue_rows(found: SpectrumFindings) -> list[list[str]]:
    """Rank, eigenvalue, bound, bound relative to it, and whether it converged."""
    s, k = found.spectrum.found, found.settings.k
    rows = []
    for i, (value, bound, good) in enumerate(zip(s.eigenvalues, s.residuals, s.converged, strict=True)):
        end = ("largest" if i < k else "smallest") + " "
        name = f"{end if found.settings.which == 'both' else ''}{i % k + 1}"
        if not math.isfinite(value):
            rows.append([name, "missing", "", "", "no"])
            continue
        relative = f"{100 * bound / abs(value):.2g}%" if value else "–"
        rows.append([name, f"{value:.6g}", f"{bound:.2g}", relative, "yes" if good else "no"])
    return rows


EIGENVALUE_HEADER = ["rank", "eigenvalue", "error at most", "relative", "converged"]


def facts(found: SpectrumFindings) -> list[list[str]]:
    """Condition, gap, ranks and prices, a line each."""
    s, passes = found.spectrum.found, found.passes
    at_least = "" if s.complete else "at least "
    rows = [
        ["condition number", f"{'at least ' if s.condition_is_lower_bound else ''}{s.condition_number:.4g}"],
        ["… taken over", s.condition_over],
        ["spectral gap", f"{s.spectral_gap:.4g}, first minus second"],
        ["effective rank", f"{at_least}{s.effective_rank:,} eigenvalues that differ from zero by their bounds"],
    ]
    if found.settings.which == "both":
        bound = "" if s.complete else "at most "
        rows.append(
            ["negative eigenvalues", f"{at_least}{s.negative_count:,}, their sum {bound}{s.negative_sum:.4g}"]
        )
    if found.density is not None:
        d, n = found.density.found, found.dimension
        rows.append(["trace", f"{_with_error(n * d.mean, n * d.mean_error)} (standard error over probes)"])
    if s.statement:
        rows.append(["what is missing" if s.num_missing else "beyond these", s.statement])
    price, both, forward = found.spectrum.per_product, passes.forward_and_backward, passes.forward
    relative = f"{price / both:.2f} times a forward and a backward pass ({short_time(both)})"
    one = f"{found.basis} vectors of {memory(4 * found.dimension)} in memory"
    at_most = found.settings.max_products
    products = f"{s.num_valid_steps} of at most {at_most}, and {s.num_products - s.num_valid_steps} to verify"
    if s.num_restarts == 0 and not s.complete and s.num_valid_steps < at_most:
        rows.append(
            ["repeated eigenvalues", "may have further copies, as it stopped when all of these had converged "
             "(--check-every 0 goes on)"]
        )  # fmt: skip
    rows += [
        ["one product", f"{short_time(price)}: {relative}, {price / forward:.2f} times a forward pass"],
        ["products", f"{products}, {s.num_restarts} restarts, {one}"],
    ]
    return rows


def _with_error(value: float, error: float) -> str:
    """As many decimals as the error leaves two digits of."""
    if not 1e-6 < error < 1e6:
        return f"{value:.4g} ± {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def memory(size: int) -> str:
    for unit, step in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= step:
            return f"{size / step:.3g} {unit}"
    return f"{size / 2**10:.3g} KiB"


def _eigenvalues(found: SpectrumFindings) -> list[Sketch]:
    s, name = found.spectrum.found, NAMES[found.settings.operator]
    return [
        Heading("Eigenvalues"),
        Paragraph(
            f"The {name} is {_FORMULAS[found.settings.operator]}. An eigenvalue says how strongly the loss per token "
            "bends along its direction, for a step of length one in the parameters. The error bound holds for each "
            "of them: at least one eigenvalue lies that close, rounding included."
        ),
        picture(
            "spectrum-eigenvalues", f"Eigenvalues of the {name} with bounds of their errors",
            plots.eigenvalues_figure, s, SHORT_NAMES[found.settings.operator],
        ),
        Table("Eigenvalues in nats per token", EIGENVALUE_HEADER, eigenvalue_rows(found)),
        Table("What they say together", [], facts(found), left=2),
    ]  # fmt: skip


def _floor(found: SpectrumFindings) -> float:
    """Below it eigenvalues are not told from rounding."""
    largest = float(np.abs(found.density.found.nodes).max()) if found.density else 1.0
    return max(largest * 1e-6, 1e-30)


def _density(found: SpectrumFindings) -> list[Sketch]:
    if found.density is None:
        return []
    d, s = found.density.found, found.settings
    return [
        Heading("Density of all eigenvalues"),
        Paragraph(
            f"How the {found.dimension:,} eigenvalues are distributed over sizes, estimated by stochastic Lanczos "
            f"quadrature with {s.probes} random vectors and {s.density_steps} products each. Bumps are broadened by "
            "0.15 decades; the area under the curve over one decade is the share of the eigenvalues in it. Single "
            "large eigenvalues are beyond the reach of a few probes: the table above has them. The smallest ones are "
            "resolved only as far as the products reach: more --density-steps would move them further down."
        ),
        picture(
            "spectrum-density", "Share of the eigenvalues per decade of their size, on logarithmic axes",
            plots.density_figure, d, _floor(found), SHORT_NAMES[s.operator],
        ),
    ]  # fmt: skip


def _blocks(found: SpectrumFindings) -> list[Sketch]:
    if not found.blocks:
        return []
    some = next(iter(next(iter(found.blocks.values())).values()))
    kind = (
        "empirical Fisher matrix"
        if found.settings.operator == "empirical-fisher"
        else "true Fisher matrix, with one label drawn from the model per token"
    )
    parts: list[Sketch] = [
        Heading("Layer by layer"),
        Paragraph(
            f"Spectra of the blocks of the {kind}: one block per tensor and layer, from the scores of "
            f"{some.num_scores} tokens spread over the text. A block cannot show more eigenvalues than there are "
            "tokens, so compare blocks with each other rather than with the table above."
        ),
        picture(
            "spectrum-blocks", "Eigenvalues of every block by rank, a panel per tensor and a line per layer",
            plots.blocks_figure, found.blocks,
        ),
    ]  # fmt: skip
    if any(None not in group for group in found.blocks.values()):
        parts += [
            Paragraph(
                "Capacity of every layer: the trace is the mean squared length of a score; the participation ratio, "
                "(sum of eigenvalues)² / sum of squares, says how many directions share it."
            ),
            picture(
                "spectrum-capacity", "Trace and participation ratio of every layer and tensor as two heat maps",
                plots.capacity_figure, found.blocks,
            ),
        ]  # fmt: skip
    return [*parts, _capacity_table(found)]


def _capacity_table(found: SpectrumFindings) -> Table:
    rows = []
    for name, group in found.blocks.items():
        capacities = [spectrum.capacity for spectrum in group.values()]
        rows.append(
            [plots.short(name), f"{len(capacities)}"]
            + [
                _range([getattr(c, field) for c in capacities])
                for field in ("trace", "participation_ratio", "entropy_rank")
            ]
        )
    header = ["tensor", "blocks", "trace", "participation ratio", "entropy rank"]
    return Table("Smallest and largest over the layers; blocks.csv has each", header, rows)


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} – {high}"


def _method(found: SpectrumFindings) -> list[Sketch]:
    s = found.settings
    chosen = f"{len(found.parameters)} tensors, {found.dimension:,} entries"
    rows = [
        ["model", f"{found.model_name}, {s.dtype}"],
        ["parameters", f"all: {chosen}" if s.parameters is None else f"{s.parameters} matches {chosen}"],
        ["text", f"{describe_sources(s.text)}: {found.tokens:,} tokens of {found.documents:,} documents"],
        ["rows", f"{found.rows} of at most {s.row_length} tokens, {s.batch_size} at a time"],
        ["loss", f"{found.passes.loss:.3f} nats per token"],
        ["normalisation", "mean over tokens, not sum"],
        ["seed", f"{s.seed}"],
        *([f"time: {name}", duration(seconds)] for name, seconds in found.seconds.items()),
    ]
    return [Heading("How it was measured"), Table("", [], rows, left=2)]


def eigenvalues_csv(found: SpectrumFindings) -> str:
    s, k = found.spectrum.found, found.settings.k
    ends = ["largest" if i < k else "smallest" for i in range(len(s.eigenvalues))]
    rows = zip(ends, range(len(ends)), s.eigenvalues, s.residuals, s.converged, strict=True)
    return csv_text(
        ["end", "rank", "eigenvalue", "error_bound", "converged"],
        ([end, i % k + 1, repr(float(x)), repr(float(bound)), int(good)] for end, i, x, bound, good in rows),
    )


def density_csv(found: SpectrumFindings) -> str:
    assert found.density is not None
    grid, curves, _ = plots.density_curves(found.density.found, _floor(found))
    columns = [grid]
    for sign in ("positive", "negative"):
        columns += [curves[sign].mean(0), curves[sign].std(0, ddof=1) / math.sqrt(len(curves[sign]))]
    header = ["log10_size", "positive_per_decade", "positive_error", "negative_per_decade", "negative_error"]
    return csv_text(header, ([repr(float(x)) for x in row] for row in zip(*columns, strict=True)))


def blocks_csv(found: SpectrumFindings) -> str:
    fields = (
        "trace",
        "participation_ratio",
        "entropy_rank",
        "rank",
        "condition_number",
        "log_determinant",
        "damping",
    )
    rows = []
    for name, group in found.blocks.items():
        for layer, x in group.items():
            values = " ".join(f"{value:.6g}" for value in x.eigenvalues)
            capacity = [getattr(x.capacity, field) for field in fields]
            rows.append([name, "" if layer is None else layer, x.num_parameters, x.num_scores, *capacity, values])
    return csv_text(["tensor", "layer", "parameters", "scores", *fields, "eigenvalues"], rows)

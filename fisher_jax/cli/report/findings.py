"""Everything one run found out, and its answer in a few sentences."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fisher_jax._support.printable import readable
from fisher_jax.cli.report.importance import Importance
from fisher_jax.cli.report.layers import MODEL, Layers
from fisher_jax.cli.report.pruning import Curve, PruningResult
from fisher_jax.cli.report.settings import ReportSettings


@dataclass
class Findings:
    """What the report, the table and the summary are written from."""

    settings: ReportSettings
    model_name: str
    tied: bool
    tokens: list[str]  # by id, as they are in the text
    dtype: str
    text: str  # where it comes from
    choice: str  # of the tokens, in a sentence
    held_out: str  # what pruning was measured on
    main: Importance
    other: Importance
    loss: float
    pruning: PruningResult | None
    by_column: np.ndarray | None = None
    comparisons: list[str] = field(default_factory=list)  # with each of the other tasks, a sentence
    layers: Layers | None = None  # all parameters
    columns: list[str] = field(default_factory=list)  # parts of a layer in the order of the data
    timings: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0  # streamed tokens per second

    @property
    def units(self) -> str:
        """How many observations there are, and of what."""
        plural = "" if self.main.units == 1 else "es" if self.settings.unit == "batch" else "s"
        return f"{self.main.units:,.0f} {self.settings.unit}{plural}"

    @cached_property
    def vocabulary(self) -> list[str]:
        """Readable tokens by id."""
        return [readable(token) for token in self.tokens]


def title(found: Findings) -> str:
    """The headline."""
    what = "vocabulary tokens" if found.layers is None else "layers and vocabulary tokens"
    return f"Which {what} of {found.model_name} matter on {found.settings.task}"


def lead(found: Findings) -> str:
    """The answer in a few sentences."""
    total = found.main.mean.sum()
    share = np.sort(found.main.mean)[::-1].cumsum() / total if total > 0 else np.ones_like(found.main.mean)
    half = int(np.searchsorted(share, 0.5)) + 1
    top = ", ".join(f"“{found.vocabulary[row]}”" for row in found.main.order[:5])
    text = (
        f"Half of the Fisher information of the head lies in {half:,} of {len(found.main.mean):,} vocabulary "
        f"rows; the five that matter most are {top}."
    )
    if found.layers is not None:
        text = f"{where(found, found.layers)} {text}"
    return f"{text} {verdict(found.pruning)}" if found.pruning else text


def where(found: Findings, layers: Layers) -> str:
    """Where the information of all parameters lies, in one sentence."""
    total = float(layers.wholes[MODEL].mean)
    uses = " (tied to the head, both uses)" if found.tied else ""
    shares = [
        (f"the embedding{uses}", layers.tensors["embedding"]),
        *([] if found.tied else [("the head", layers.tensors["head"])]),
        ("attention", layers.wholes["layers/attention"]),
        ("MLPs", layers.wholes["layers/mlp"]),
    ]
    told = ", ".join(f"{100 * float(part.mean) / max(total, 1e-300):.2g}% in {name}" for name, part in shares)
    others = "norms and positions" if "positions" in layers.tensors else "norms"
    per_layer = layers.parts["layers"].mean
    return (
        f"Of the Fisher information of all {int(layers.wholes[MODEL].parameters):,} parameters lie {told} and the "
        f"rest in {others}; the layer with the most is {int(np.argmax(per_layer))} of 0 to {len(per_layer) - 1}."
    )


def verdict(pruning: PruningResult, share: float = 0.5) -> str:
    """Pruning in one sentence: the loss each way of choosing costs at one share."""
    index = int(np.argmin(np.abs(pruning.shares - share)))

    def cost(curve: Curve) -> float:
        return float(curve.zeroed[index] - pruning.loss)

    curves = {curve.name: curve for curve in pruning.curves}
    named = {name: curve for name, curve in curves.items() if name != "random"}
    fisher, best = curves["Group Fisher, empirical"], min(named.values(), key=cost)
    said = [f"{cost(fisher):+.2f} nats per token when they are the least important by empirical Fisher"]
    if best is not fisher:
        said.append(f"{cost(best):+.2f} by {best.name}")
    said.append(f"{cost(curves['random']):+.2f} when chosen at random")
    return (
        f"Setting {100 * pruning.shares[index]:.0f}% of the rows to zero changes the held-out loss of "
        f"{pruning.loss:.2f} by {', '.join(said)}."
    )

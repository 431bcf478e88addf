"""What the report says of all parameters."""

import numpy as np

from fisher_jax.cli.page.blocks import Heading, Paragraph, Sketch, Table
from fisher_jax.cli.page.style import picture
from fisher_jax.cli.report import layer_plots
from fisher_jax.cli.report.findings import Findings
from fisher_jax.cli.report.layers import EXPERTS, MODEL, Layers, Measured, part_name

_FIRST = ("embedding", "positions")


def layer_blocks(found: Findings) -> list[Sketch]:
    """The whole model, its layers and its attention heads; nothing where only the head was measured."""
    layers = found.layers
    if layers is None:
        return []
    level, above, below = found.settings.level, _outside(layers, True), _outside(layers, False)
    return [
        Heading("The whole model"),
        Paragraph(_what(found)),
        picture(
            "layers-model",
            "Heat maps of the Fisher information of every part of every layer, in total and per parameter",
            layer_plots.model_figure, layers, found.columns, above, below,
        ),
        Paragraph(_how(found, layers)),
        _table(found, layers, above, below),
        Heading("Layer by layer"),
        Paragraph(
            "Above, the sums over all parameters of a layer, of its attention (query, key, value and output) and of "
            "its MLP; below, the same per parameter."
        ),
        picture(
            "layers-totals", "Fisher information of every layer, its attention and its MLP, with intervals",
            layer_plots.totals_figure, layers, level,
        ),
        Heading("Attention heads"),
        Paragraph(_heads(layers)),
        picture(
            "layers-heads", "Heat maps of the Fisher information of every attention head of every layer",
            layer_plots.heads_figure, layers,
        ),
        *_expert_blocks(layers),
        Paragraph("All numbers with their intervals are in layers.csv."),
    ]  # fmt: skip


def _expert_blocks(layers: Layers) -> list[Sketch]:
    if not layers.experts:
        return []
    part = layers.experts[EXPERTS]
    share = part.mean / np.maximum(part.mean.sum(1, keepdims=True), np.finfo(float).tiny)
    layer, expert = np.unravel_index(int(np.argmax(share)), share.shape)
    text = (
        "The kernels of every expert. A token adds to those that its router gave it to; an expert that few tokens "
        f"reach has a small number. The largest share of a layer is {100 * share.max():.0f}%, of expert {expert} in "
        f"layer {layer}; an even one would be {100 / share.shape[1]:.0f}%."
    )
    told = "Heat maps of the Fisher information of every expert of every layer"
    return [
        Heading("Experts"), Paragraph(text), picture("layers-experts", told, layer_plots.experts_figure, layers)
    ]  # fmt: skip


def _outside(layers: Layers, first: bool) -> list[str]:
    """Tensors before or behind the layers, in the order of the data."""
    paths = [path for path in layers.tensors if not path.startswith("layers/") and (path in _FIRST) == first]
    return sorted(paths, key=lambda path: (path == "head", path))


def _what(found: Findings) -> str:
    text = (
        "The Fisher information of every parameter: the derivative of the next token's log-probability with respect "
        "to it, squared for each token, averaged over the tokens. On the left summed over all parameters of a "
        "tensor, on the right the average of one of its parameters. Each row is a layer, the input at the top; bars "
        "across are the tensors outside of the layers. Norms have few parameters that act on everything: on the "
        "right they lie beyond the colours, which are scaled to the matrices."
    )
    if found.tied:
        text += (
            " The embedding is tied to the head: its number is that of the matrix in both uses at once, which is not "
            "the sum of the rows in the sections below, where it is measured as head alone."
        )
    return text


def _how(found: Findings, layers: Layers) -> str:
    drawn = {
        "empirical": "Each token's log-probability is multiplied by a random sign before one backward pass",
        "true": "Next tokens are drawn from the model itself before one backward pass",
    }[found.settings.kind]
    text = (
        f"{drawn}; the squares of the gradient are then estimates of the summed squares of single tokens, right on "
        "average (not the square of a mean gradient)."
    )
    if layers.units < 2:
        return text
    tensor, head = (
        100 * np.nanmedian(np.concatenate([_relative(part) for part in parts.values()]))
        for parts in (layers.tensors, layers.heads)
    )
    return (
        f"{text} The noise of that draw is part of the {100 * found.settings.level:g}% intervals, which are "
        f"±{tensor:.0f}% for a tensor of a layer and ±{head:.0f}% for an attention head (medians)."
    )


def _relative(part: Measured) -> np.ndarray:
    """Half the width of the intervals over the estimate."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.ravel((part.upper - part.lower) / (2 * part.mean))


def _table(found: Findings, layers: Layers, above: list[str], below: list[str]) -> Table:
    total = float(layers.wholes[MODEL].mean)
    single = [(part_name(path), layers.tensors[path]) for path in above]
    single += [(part_name(node), layers.wholes[node]) for node in found.columns]
    single += [(part_name(path), layers.tensors[path]) for path in below]
    sums = [
        ("all attention", "layers/attention"),
        ("all MLPs", "layers/mlp"),
        ("all layers", "layers"),
        ("model", MODEL),
    ]
    rows = [
        _row(name, part, total) for name, part in (*single, *((name, layers.wholes[node]) for name, node in sums))
    ]
    interval = f" ({100 * found.settings.level:g}% interval)" if layers.units >= 2 else ""
    return Table(
        "Parts of the model, summed over the layers",
        ["part", "parameters", f"Fisher information per token{interval}", "share", "per parameter"],
        rows,
    )


def _row(name: str, part: Measured, total: float) -> list[str]:
    interval = f" ({float(part.lower):.3g} to {float(part.upper):.3g})" if np.isfinite(part.lower) else ""
    share = f"{100 * float(part.mean) / total:.1f}%" if total > 0 else ""
    return [
        name,
        f"{int(part.parameters):,}",
        f"{float(part.mean):.3g}{interval}",
        share,
        f"{float(part.average):.2g}",
    ]


def _heads(layers: Layers) -> str:
    kernels = {path: part for path, part in layers.heads.items() if path.endswith("kernel")}
    best = max(kernels, key=lambda path: float(kernels[path].mean.max()))
    layer, head = np.unravel_index(int(np.argmax(kernels[best].mean)), kernels[best].mean.shape)
    sizes = {int(part.parameters.flat[0]) for part in kernels.values()}
    size = f"Every head has {sizes.pop():,} parameters in each kernel." if len(sizes) == 1 else ""
    shared = len(kernels["layers/attention/q/kernel"].mean.T) != len(kernels["layers/attention/k/kernel"].mean.T)
    several = "Several query heads share a key and a value head. " if shared else ""
    return (
        "A head has its rows of the query, key and value kernels and its columns of the output kernel. "
        f"{several}{size} The largest number is that of head {head} of the {part_name(best)} kernel in layer {layer}."
    ).replace("  ", " ")

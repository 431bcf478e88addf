"""Every layer: squared scores of all parameters from one backward pass, summed over the parts of the model."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax.cli.page.csv_text import csv_text
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.models import DecoderConfig, LanguageModel
from fisher_jax.models.functions import abstract_params
from fisher_jax.models.weight_names import flatten
from fisher_jax.welford.estimator import FisherEstimator

ESTIMATORS = {"empirical": "signs", "true": "sampled"}
EXPERTS = "layers/mlp/experts"
FAMILIES = ("tensors", "heads", "experts", "parts", "wholes")
PLACE = ["layer", "part", "head", "expert"]  # columns that say where a number belongs
MODEL = "model"  # the name of the sum over all parameters
_LEAVES = ("kernel", "scale", "bias")


class Measured(NamedTuple):
    """Summed squared scores per token with their interval, arrays of one shape: ``[]``, ``[L]``, or ``[L, n]`` of
    heads or experts."""

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    parameters: np.ndarray  # that each sum is over

    @property
    def average(self) -> np.ndarray | np.floating:
        """Per parameter."""
        return self.mean / self.parameters


class Layers(NamedTuple):
    """What the report knows of all parameters, by path in the tree of parameters."""

    tensors: dict[str, Measured]  # a leaf: [L] where layers are stacked, else []
    heads: dict[str, Measured]  # a leaf of attention: [L, heads]
    parts: dict[str, Measured]  # a node of every layer, such as layers/attention: [L]
    wholes: dict[str, Measured]  # such a node in all layers, and the model: []
    units: float
    tokens: float
    experts: Mapping[str, Measured] = MappingProxyType({})  # a leaf of experts, and their node: [L, experts]


_COLUMNS = (
    *(f"attention/{name}" for name in "qkvo"), "mlp/gate", "mlp/up", "mlp/down", "mlp/router", "mlp/experts/gate",
    "mlp/experts/up", "mlp/experts/down", "attention/q_norm", "attention/k_norm", "attention_norm",
    "attention_post_norm", "mlp_norm", "mlp_post_norm",
)  # fmt: skip


def layer_estimator(model: LanguageModel, settings: ReportSettings) -> FisherEstimator:
    """Sums of squared scores over tensors, attention heads and parts of layers, all from one backward pass.

    Random signs (empirical) or sampled labels (true): unbiased estimates of the sums of per-token squares. Sums over
    several tensors are taken of every observation, so that they have intervals of their own.
    """
    row = jax.ShapeDtypeStruct((1, settings.row_length - 1), jnp.int32)
    config = model.config
    return fj.group_fisher(
        model.apply,
        example=fj.Batch(row, row),
        groups={
            "tensor": fj.groups.tensor,
            "heads": fj.groups.head(config.num_heads, config.num_kv_heads, config.head_size),
        },
        combine=_vector,
        estimator=ESTIMATORS[settings.kind],
        unit=settings.unit,
    )


def _vector(sums: Any) -> jax.Array:
    """All totals in one array: a state of a hundred small ones would take a minute to compile."""
    return jnp.concatenate([total.ravel() for total in jax.tree.leaves(_totals(sums))])


def _totals(sums: Any) -> dict[str, dict[str, Any]]:
    """From two sums of every leaf to those of leaves, heads and nodes of the tree; linear."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(sums, is_leaf=lambda x: set(x) == {"tensor", "heads"})
    }
    by_expert = {path: leaf["tensor"] for path, leaf in leaves.items() if leaf["tensor"].ndim == 2}
    tensors = {path: by_expert[path].sum(1) if path in by_expert else leaf["tensor"] for path, leaf in leaves.items()}
    parts: dict[str, Any] = {}
    for path, total in tensors.items():
        if total.ndim:
            for node in _nodes(path):
                parts[node] = parts[node] + total if node in parts else total
    wholes = {node: total.sum() for node, total in parts.items()}
    return {
        "tensors": tensors,
        "heads": {
            path: leaf["heads"] for path, leaf in leaves.items() if leaf["heads"].ndim == 2 and path not in by_expert
        },
        "experts": {**by_expert, **({EXPERTS: sum(by_expert.values())} if by_expert else {})},
        "parts": parts,
        "wholes": {**wholes, MODEL: sum(x.sum() for x in tensors.values())},
    }


def _nodes(path: str) -> list[str]:
    """Every node above a leaf."""
    names = path.split("/")
    return ["/".join(names[:depth]) for depth in range(1, len(names))]


def read_layers(state: Any, model: LanguageModel, settings: ReportSettings) -> Layers:
    """Host arrays of the Welford state that `layer_estimator` fills."""
    sizes = part_sizes(model, settings)
    limits = fj.welford.interval(state, level=settings.level)
    measured = jax.tree.map(Measured, *(on_parts(x, sizes) for x in (fj.welford.mean(state), *limits)), sizes)
    return Layers(**measured, units=float(fj.welford.count(state)), tokens=float(fj.welford.weight(state)))


def part_sizes(model: LanguageModel, settings: ReportSettings) -> dict[str, dict[str, np.ndarray]]:
    """Numbers of parameters, by the fields of `Layers` and by path."""
    sizes_of = layer_estimator(model, settings).group_sizes
    assert sizes_of is not None
    # Summed in float64: whole numbers stay exact.
    return _totals(jax.tree.map(lambda x: np.asarray(x, np.float64), sizes_of(model.params)))


def on_parts(vector: Any, sizes: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """The numbers of a state of `layer_estimator`, or of the same shape, by the fields of `Layers` and by path."""
    like, treedef = jax.tree.flatten(sizes)
    parts = np.split(np.asarray(vector, np.float64), np.cumsum([x.size for x in like])[:-1])
    return jax.tree.unflatten(treedef, [x.reshape(size.shape) for x, size in zip(parts, like, strict=True)])


def part_name(path: str) -> str:
    """What people call a leaf or a node: `q`, `mlp norm`, `embedding`, `layer`."""
    names = path.split("/")
    name = names[-2] if len(names) > 1 and names[-1] in _LEAVES else names[-1]
    return {"layers": "layer", "mlp": "MLP"}.get(name, name.replace("_", " ").replace("mlp", "MLP"))


def columns(config: DecoderConfig) -> list[str]:
    """Nodes of a layer that the decoder has: matrices in the order in which data meets them, then norms."""
    there = {path.rsplit("/", 1)[0] for path in flatten(abstract_params(config))}
    return [node for node in (f"layers/{name}" for name in _COLUMNS) if node in there]


def several(found: Layers) -> list[str]:
    """Parts of a layer that hold several tensors, and so numbers of their own."""
    return [node for node in found.parts if sum(path.startswith(f"{node}/") for path in found.tensors) > 1]


def layers_csv(tasks: Mapping[str, Layers]) -> str:
    """One line per task and tensor, attention head and part of a layer, then the totals over layers and the model.

    `statistic` is the sum over the `parameters` of the tensor (or of its part) of squared scores per token.
    """
    rows: list[list[object]] = []
    for task, found in tasks.items():
        sums = [(node, found.parts[node]) for node in several(found)]
        parts = [*found.tensors.items(), *found.heads.items(), *sums, *found.wholes.items()]
        told = [(path, x, "") for path, x in parts] + [(path, x, "experts") for path, x in found.experts.items()]
        for path, values, family in told:
            for index in np.ndindex(values.mean.shape):
                numbers = (f"{x[index]:.9g}" for x in values[:3])
                rows.append([task, path, *place(path, index, family), *numbers, int(values.parameters[index])])
    return csv_text(["task", "path", *PLACE, "statistic", "lower", "upper", "parameters"], rows)


def place(path: str, index: tuple[int, ...], family: str) -> list[object]:
    """The cells of `PLACE`."""
    layer, other = (*index, "", "")[:2]
    return [layer, part_name(path), *(("", other) if family == "experts" else (other, ""))]

"""From the tensors of a weight file to the decoder's parameters: names, orientations, completeness."""

import math
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Protocol

import jax
import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.functions import abstract_params

__all__ = ["TensorFile", "assemble", "check_entries", "flatten", "unflatten"]


class TensorFile(Protocol):
    """One or several weight files: what is in them, and each tensor as a NumPy array."""

    label: str
    names: frozenset[str]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


def assemble(
    file: TensorFile,
    config: DecoderConfig,
    names: Mapping[str, str],
    dtype,
    orient: Callable[[str, np.ndarray], np.ndarray],
    ignored: Iterable[str] = (),
):
    """The decoder's parameters as a nested dict of NumPy arrays, layers stacked, cast once to ``dtype``.

    ``names`` maps a parameter path to a tensor name with one ``{}`` for each stacked axis; ``orient(path, tensor)``
    turns a file's tensor into the parameter of one layer. Raises ``InputError`` where tensors are
    missing, left over, of another shape than the configuration says, or not finite.
    """
    shapes = flatten(abstract_params(config, dtype))
    sources = {
        path: {index: names[path].format(*index) for index in np.ndindex(leaf.shape[: names[path].count("{}")])}
        for path, leaf in shapes.items()
    }
    wanted = {name for group in sources.values() for name in group.values()}
    if missing := wanted - file.names:
        raise InputError(f"{file.label} lacks {listed(missing)}, which its configuration asks for")
    if unused := file.names - wanted - set(ignored):
        raise InputError(f"{file.label} holds {listed(unused)}, for which its configuration has no use")

    params = {}
    for path, leaf in shapes.items():
        shape, out = leaf.shape[names[path].count("{}") :], None
        for index, name in sources[path].items():
            tensor = file.read(name)
            # Of another rank it cannot even be turned.
            tensor = orient(path, tensor) if tensor.ndim == len(shape) else tensor
            if tensor.shape != shape:
                raise InputError(
                    f"{name} in {file.label} gives {path} the shape {list(tensor.shape)}, "
                    f"but the configuration wants {list(shape)}"
                )
            # Allocated when one tensor has the right shape, for as many as there are names.
            out = np.empty(leaf.shape, leaf.dtype) if out is None else out
            target = out[index]
            with np.errstate(over="ignore"):  # what becomes infinite is refused below
                target[...] = tensor
            check_finite(file, name, target)
        params[path] = out
    return unflatten(params)


def check_entries(file: TensorFile, config: DecoderConfig) -> None:
    """Raises InputError where the files cannot hold such a model, before a list of its tensors is made."""
    there = sum(map(math.prod, file.shapes.values()))
    if config.num_layers > len(file.names):
        raise InputError(
            f"{file.label} asks in its configuration for {config.num_layers:,} layers, but its files hold "
            f"{len(file.names):,} tensors in all"
        )
    if (wanted := config.vocab_size * config.width) > there:
        raise InputError(
            f"{file.label} asks in its configuration for {config.vocab_size:,} rows of {config.width:,}, which are "
            f"{wanted:,} numbers, but its files hold {there:,} in all"
        )

    experts = (config.num_experts or 0) * config.num_layers * 3 * config.width * config.mlp_size
    if experts > there:
        raise InputError(
            f"{file.label} asks in its configuration for {config.num_experts:,} experts in each layer, which are "
            f"{experts:,} numbers, but its files hold {there:,} in all"
        )


def check_finite(file: TensorFile, name: str, tensor: np.ndarray) -> None:
    bad = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
    if bad:
        raise InputError(f"{name} in {file.label} has {bad} values that are NaN or infinite; the file is damaged")


def listed(names: Set[str], most: int = 5) -> str:
    """Sorted names in a sentence, the first few and a count."""
    first = ", ".join(
        name if name.isprintable() and len(name) < 100 else shown(name) for name in sorted(names)[:most]
    )
    return first if len(names) <= most else f"{first} and {len(names) - most} more tensors"


def flatten(params) -> dict:
    """``{"layers/attention/q/kernel": leaf, ...}`` from a nested dict."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def unflatten(flat: dict) -> dict:
    """The inverse of `flatten`."""
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested

"""From the tensors of a weight file to the decoder's parameters: names, orientations, completeness."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.functions import abstract_params
from fisher_jax.models.weight_rows import Rows, TensorFile, aligned, blocks, fill, spans

__all__ = ["assemble", "check_entries", "flatten", "same_values", "unflatten"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one parameter lies: the tensors of its layers, in the order of its stacked axes.

    Attributes:
        names: the tensor at every index of the stacked axes.
        select: see `assemble`.
    """

    file: TensorFile
    path: str
    shape: tuple[int, ...]
    dtype: Any
    names: Mapping[tuple[int, ...], str]
    select: Callable[[str, np.ndarray], Rows]

    @property
    def stacked(self) -> int:
        return len(next(iter(self.names)))

    @property
    def is_kernel(self) -> bool:
        return self.path.endswith("/kernel") and len(self.shape) - self.stacked > 1

    def rows(self, index: tuple[int, ...]) -> Rows:
        """Those of one layer; an ``InputError`` where they are another number than the configuration says."""
        name, wanted = self.names[index], self.shape[self.stacked :]
        stored = self.file.stored(name)
        # Of another rank they cannot even be selected.
        rows = self.select(self.path, stored) if stored.ndim == len(wanted) else Rows(stored)
        shape = (*rows.shape[:-1], self.file.shapes[name][-1]) if rows.are_bytes else rows.shape
        found = swapped(shape) if self.is_kernel and len(shape) > 1 else shape
        if found != wanted:
            raise InputError(
                f"{name} in {self.file.label} gives {self.path} the shape {list(found)}, "
                f"but the configuration wants {list(wanted)}"
            )
        return rows

    def part(self, where: tuple[tuple[int, int], ...]) -> np.ndarray:
        """A part of the parameter, from beginning to end along every axis, filled in blocks of rows."""
        stacked, inside = where[: self.stacked], tuple(slice(*span) for span in where[self.stacked :])
        inside = swapped(inside) if self.is_kernel else inside
        out = None
        for place in np.ndindex(*(end - start for start, end in stacked)):
            index = tuple(start + i for (start, _), i in zip(stacked, place, strict=True))
            rows = self.rows(index)
            # Allocated when one tensor has the right shape, for as many as there are names.
            out = aligned(tuple(end - start for start, end in where), self.dtype) if out is None else out
            target = out[place]
            fill(target.swapaxes(-1, -2) if self.is_kernel else target, self.file, self.names[index], rows, inside)
        assert out is not None
        return out

    def whole(self) -> np.ndarray:
        return self.part(tuple((0, size) for size in self.shape))


def swapped(axes: tuple) -> tuple:
    return (*axes[:-2], axes[-1], axes[-2])


def assemble(
    file: TensorFile,
    config: DecoderConfig,
    names: Mapping[str, str],
    dtype,
    select: Callable[[str, np.ndarray], Rows],
    ignored: Iterable[str] = (),
    shardings: Mapping[str, Sharding] | None = None,
):
    """The decoder's parameters as a nested dict of NumPy arrays, layers stacked, cast once to ``dtype``.

    Each array is filled in blocks of rows from the mapped file, so beside the arrays there is never more than a
    block.

    Args:
        names: the tensor of each parameter path, with one ``{}`` for each stacked axis.
        select: ``select(path, stored)`` gives the rows of a stored tensor, in their order, that are the parameter of
            one layer, kernels as ``[out, in]``. Quantised rows are bytes, so they stay whole.
        ignored: tensors without use.
        shardings: of every path; then the parameters are ``jax.Array``s, and only the parts that lie on devices of
            this process are read.

    Raises:
        InputError: tensors are missing, left over, of another shape than the configuration says, or not finite.
    """
    shapes = flatten(abstract_params(config, dtype))
    sources = []
    for path, leaf in shapes.items():
        stacked = leaf.shape[: names[path].count("{}")]
        tensors = {index: names[path].format(*index) for index in np.ndindex(stacked)}
        sources.append(Source(file, path, leaf.shape, leaf.dtype, tensors, select))
    wanted = {name for source in sources for name in source.names.values()}
    if missing := wanted - file.names:
        raise InputError(f"{file.label} lacks {listed(missing)}, which its configuration asks for")
    if unused := file.names - wanted - set(ignored):
        raise InputError(f"{file.label} holds {listed(unused)}, for which its configuration has no use")
    if shardings is None:
        return unflatten({source.path: source.whole() for source in sources})
    return unflatten({source.path: placed(source, shardings[source.path]) for source in sources})


def placed(source: Source, sharding: Sharding) -> jax.Array:
    """A parameter on the devices of its sharding. Each part is read once, one after the other."""
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(source.shape).items():
        devices.setdefault(spans(index or (), source.shape), []).append(device)
    arrays = []
    for where, there in devices.items():
        values = source.part(where)
        arrays += [
            jax.device_put(values, SingleDeviceSharding(device, memory_kind=sharding.memory_kind)) for device in there
        ]
    return jax.make_array_from_single_device_arrays(source.shape, sharding, arrays, dtype=source.dtype)


def same_values(file: TensorFile, first: str, second: str) -> bool:
    """Whether two tensors hold the same numbers."""
    a, b = file.stored(first), file.stored(second)
    return a.shape == b.shape and all(np.array_equal(a[block], b[block]) for block in blocks(a.shape))


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

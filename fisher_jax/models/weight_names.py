"""From the tensors of a weight file to the decoder's parameters: names, orientations, completeness."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, Protocol

import jax
import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.functions import abstract_params

__all__ = [
    "TensorFile", "aligned", "assemble", "blocks", "check_entries", "flatten", "same_values", "unflatten",
]  # fmt: skip


class TensorFile(Protocol):
    """One or several weight files: what is in them, and each tensor as it lies there."""

    label: str
    names: frozenset[str]
    shapes: dict[str, tuple[int, ...]]

    def stored(self, name: str) -> np.ndarray:
        """The tensor mapped into memory: numbers, or for quantised ones the bytes of each row along the last axis."""
        ...

    def values(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The numbers of some rows of `stored`."""
        ...


# Numbers that are read, dequantised and checked at a time.
BLOCK = 2**21


def assemble(
    file: TensorFile,
    config: DecoderConfig,
    names: Mapping[str, str],
    dtype,
    select: Callable[[str, np.ndarray], np.ndarray],
    ignored: Iterable[str] = (),
):
    """The decoder's parameters as a nested dict of NumPy arrays, layers stacked, cast once to ``dtype``.

    Each array is filled in blocks of rows from the mapped file, so beside the arrays there is never more than a
    block.

    Args:
        names: the tensor of each parameter path, with one ``{}`` for each stacked axis.
        select: ``select(path, stored)`` gives the rows of a stored tensor, in their order, that are the parameter of
            one layer, kernels as ``[out, in]``. Quantised rows are bytes, so they stay whole.
        ignored: tensors without use.

    Raises:
        InputError: tensors are missing, left over, of another shape than the configuration says, or not finite.
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
        kernel = path.endswith("/kernel")
        for index, name in sources[path].items():
            rows = file.stored(name)
            # Of another rank they cannot even be selected.
            rows = select(path, rows) if rows.ndim == len(shape) else rows
            if (found := shape_of(file, name, rows, kernel)) != shape:
                raise InputError(
                    f"{name} in {file.label} gives {path} the shape {list(found)}, "
                    f"but the configuration wants {list(shape)}"
                )
            # Allocated when one tensor has the right shape, for as many as there are names.
            out = aligned(leaf.shape, leaf.dtype) if out is None else out
            target = out[index]
            fill(target.swapaxes(-1, -2) if kernel else target, file, name, rows)
        params[path] = out
    return unflatten(params)


def shape_of(file: TensorFile, name: str, rows: np.ndarray, kernel: bool) -> tuple[int, ...]:
    """The shape of the parameter in these rows."""
    shape = (*rows.shape[:-1], file.shapes[name][-1]) if rows.dtype == np.uint8 else rows.shape
    return (*shape[:-2], shape[-1], shape[-2]) if kernel and len(shape) > 1 else shape


def fill(target: np.ndarray, file: TensorFile, name: str, rows: np.ndarray) -> None:
    """Writes rows of a file into an array, a block at a time; an ``InputError`` where they are not finite."""
    bad = 0
    for block in blocks(target.shape):
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            values = file.values(name, rows[block]).astype(target.dtype, copy=False)
        bad += values.size - int(np.count_nonzero(np.isfinite(values)))
        target[block] = values
    if bad:
        raise InputError(f"{name} in {file.label} has {bad} values that are NaN or infinite; the file is damaged")


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Indices of the rows of an array, together at most `BLOCK` numbers where a row is not longer."""
    if len(shape) < 2:
        yield (slice(None),)
        return
    step = max(1, BLOCK // shape[-1])
    for place in np.ndindex(shape[:-2]):
        for start in range(0, shape[-2], step):
            yield (*place, slice(start, start + step))


def same_values(file: TensorFile, first: str, second: str) -> bool:
    """Whether two tensors hold the same numbers."""
    a, b = file.stored(first), file.stored(second)
    return a.shape == b.shape and all(np.array_equal(a[block], b[block]) for block in blocks(a.shape))


def aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array without values that `jax.device_put` takes over on the CPU, where it would copy any other."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


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

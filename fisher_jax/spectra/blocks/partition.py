"""Blocks of parameters: which leaves, and which layers of them, form one block."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.dtypes import common_dtype, wide
from fisher_jax._support.selection import Chosen, Selection, matches, select
from fisher_jax._tracing.program import trace
from fisher_jax._tracing.structure import Structures
from fisher_jax.batch import Batch

__all__ = ["Blocks", "ParameterBlock", "partition"]

Tree = Any
Grouping = str | Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class ParameterBlock:
    """Leaves that form one block, or, where they are stacked, one block per layer.

    Attributes:
        name: the path of the leaf, or what the grouping calls it.
        leaves: their places among the moving leaves.
        layers: the length of the leading axis that tells layers apart, or ``None``.
        size: parameters of one layer's block.
    """

    name: str
    leaves: tuple[int, ...]
    layers: int | None
    size: int

    def vectors(self, leaves: list[Array]) -> Array:
        """Leaves ``[scores, ...]`` as ``[layers, scores, size]``, at least float32."""
        found = []
        for i in self.leaves:
            x = wide(leaves[i])
            x = x[None] if self.layers is None else jnp.swapaxes(x, 0, 1)
            found.append(x.reshape(*x.shape[:2], math.prod(x.shape[2:])))
        dtype = common_dtype(*(x.dtype for x in found))
        return jnp.concatenate([x.astype(dtype) for x in found], 2)

    def names(self) -> tuple[str, ...]:
        """One name per layer."""
        return (self.name,) if self.layers is None else tuple(f"{self.name}[{i}]" for i in range(self.layers))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The moving leaves and their blocks."""

    selection: Selection
    blocks: tuple[ParameterBlock, ...]


def partition(
    params: Tree,
    blocks: Grouping,
    stacked: Chosen,
    parameters: Chosen,
    apply_fn: Callable,
    example: Batch | None,
    structures: Structures,
) -> Blocks:
    """Divide the chosen parameters into blocks. The words are those of `fisher_jax.block_spectrum`."""
    chosen = select(params, parameters)
    layered = _layered(stacked, params, apply_fn, example, structures)
    groups: dict[str, list[int]] = {}
    for i, path in enumerate(chosen.paths):
        name = _name(blocks, path, params, i) if chosen.moves[i] else None
        if name is not None:
            groups.setdefault(name, []).append(i)
    if not groups:
        raise ValueError("blocks= leaves out every parameter")
    moving = sorted(i for group in groups.values() for i in group)
    place = {leaf: j for j, leaf in enumerate(moving)}
    shapes = [x.shape for x in jax.tree.leaves(params)]
    found = []
    for name, group in groups.items():
        lengths = {shapes[i][0] if layered[i] else None for i in group}
        if len(lengths) > 1:
            raise ValueError(
                f"block {name} joins leaves with different numbers of layers: "
                + ", ".join(f"{chosen.paths[i]} of shape {list(shapes[i])}" for i in group)
            )
        (layers,) = lengths
        size = sum(math.prod(shapes[i]) for i in group) // (layers or 1)
        found.append(ParameterBlock(name, tuple(place[i] for i in group), layers, size))
    moves = tuple(i in place for i in range(len(chosen.moves)))
    return Blocks(dataclasses.replace(chosen, moves=moves), tuple(found))


def _name(blocks: Grouping, path: str, params: Tree, leaf: int) -> str | None:
    if blocks == "parameter":
        return path
    if blocks == "module":
        keys = jax.tree_util.tree_flatten_with_path(params)[0][leaf][0]
        return jax.tree_util.keystr(keys[:-1]) or path
    if not callable(blocks):
        raise ValueError(f"blocks is 'parameter', 'module' or a function of a path, found {blocks!r}")
    name = blocks(path)
    if name is not None and not isinstance(name, str):
        raise ValueError(f"blocks returns the name of a block or None, found {name!r} for {path}")
    return name


def _layered(
    stacked: Chosen, params: Tree, apply_fn: Callable, example: Batch | None, structures: Structures
) -> list[bool]:
    """For every leaf whether its leading axis tells layers apart."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    if stacked is None or stacked is False:
        return [False] * len(flat)
    if stacked is not True:
        layered = matches(params, stacked)
    elif example is None:
        raise ValueError(
            "stacked=True finds scanned layers in a trace of the model: pass example=, a Batch of shapes"
        )
    else:
        layered = _scanned(params, apply_fn, example, structures)
    for (path, x), layers in zip(flat, layered, strict=True):
        if layers and (x.ndim == 0 or x.shape[0] == 0):
            raise ValueError(f"{jax.tree_util.keystr(path)} is stacked but has shape {list(x.shape)}: no layers")
    return layered


def _scanned(params: Tree, apply_fn: Callable, example: Batch, structures: Structures) -> list[bool]:
    """Leaves whose every use lies in a loop that takes a slice of the leading axis each time."""
    program = trace(apply_fn, params, (example.inputs,), None, structures, None)

    def layers(leaf: int, x: Array) -> bool:
        uses = program.structure.uses(leaf)
        outer = {(*spec.use.loops[:1], *spec.lengths[:1]) for spec in uses}
        return bool(uses) and outer == {("stacked", *x.shape[:1])}

    return [layers(i, x) for i, x in enumerate(program.leaves)]

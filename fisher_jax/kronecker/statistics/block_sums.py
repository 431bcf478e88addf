"""Statistics of single uses, summed over loops, uses, devices and columns to those of every block."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from fisher_jax._support.placement import automatic, spec_of
from fisher_jax.kronecker.blocks.plan import Block, Rules
from fisher_jax.kronecker.statistics.second_moments import COLUMNS, Masks, combine, diagonal_of

__all__ = ["on_any_device", "over_columns", "over_devices", "sums_of_blocks"]

Tree = Any


def over_devices(reduced: Tree, axis_name: Any) -> Tree:
    """Sums over shards of the tokens; columns are gathered, since Gram matrices of shards miss their products."""
    if axis_name is None:
        return reduced

    def whole(name, x):
        if name in COLUMNS:
            return jax.lax.all_gather(x, axis_name, axis=x.ndim - 1, tiled=True)
        return jax.lax.psum(x, axis_name)

    return {name: whole(name, x) for name, x in reduced.items()}


def on_any_device(reasons: Array, axis_name: Any) -> Array:
    """Bits that are set on any device."""
    if axis_name is None:
        return reasons
    return sum(jax.lax.pmax(reasons & bit, axis_name) for bit in (1, 2, 4, 8))


def sums_of_blocks(blocks: tuple[Block, ...], found: list, masks: Masks, rules: Rules) -> tuple[dict, ...]:
    """Sums over the loops and uses of every block."""
    leaves_and_uses = [(leaf, use) for leaf, use, _ in found]

    def joined(reduced, masks):
        found = [(leaf, use, x) for (leaf, use), x in zip(leaves_and_uses, reduced, strict=True)]
        return _joined(blocks, found, masks, rules)

    reduced = [x for _, _, x in found]
    out = tuple(_block_places(block, found) for block in blocks)
    return automatic(joined, out, reduced, masks)


def _block_places(block: Block, found: list) -> dict[str, PartitionSpec]:
    """Where the joined sums of one block lie."""
    if block.kind == "diagonal":
        return {"squares": PartitionSpec()}
    out = {}
    for leaf, _, reduced in found if block.is_kronecker else ():
        if leaf == block.leaf:
            for name, x in reduced.items():
                units = spec_of(x)[-2:-1] if name == "U" and len(spec_of(x)) else ()
                out[name] = PartitionSpec(None, *units, None) if units else PartitionSpec()
    return out


def _joined(blocks: tuple[Block, ...], found: list, masks: Masks, rules: Rules) -> tuple[dict, ...]:
    sums = []
    for block in blocks:
        own = [(use, reduced) for leaf, use, reduced in found if leaf == block.leaf]
        if block.kind == "diagonal":
            sums.append({"squares": diagonal_of(own)})
        elif block.kind == "tied":
            head = combine([x for x in own if "A" in x[1]], block, masks, rules)
            table = combine([x for x in own if "square" in x[1]], block, masks, rules)
            sums.append(head | table)
        else:
            sums.append(combine(own, block, masks, rules) if block.is_kronecker else {})
    return tuple(sums)


def over_columns(found: dict[str, Array]) -> dict[str, Array]:
    """Sum over the columns of the outputs' Fisher factor; what does not depend on them once."""
    out = {}
    for name, x in found.items():
        if name == "U":
            out[name] = jnp.moveaxis(x, 0, -1).reshape(*x.shape[1:-1], -1)
        else:
            out[name] = x.sum(0) if name in ("G", "squares", "square") else x[0]
    return out

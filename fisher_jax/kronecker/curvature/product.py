"""Products with the curvature that Kronecker factors describe, undamped: ``v -> F v``."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.dtypes import wide
from fisher_jax._support.placement import automatic, spec_of
from fisher_jax.kronecker.blocks.layout import bias_rows, inverse, kernel_matrices, table_matrices
from fisher_jax.kronecker.blocks.plan import Block
from fisher_jax.kronecker.curvature.factors import BlockFactors, Factors
from fisher_jax.kronecker.factors.forms import Diagonal, Eigen, LowRank, from_basis, product, to_basis
from fisher_jax.kronecker.factors.woodbury import SoftmaxHead

__all__ = ["block_product", "curvature_product", "moving_leaves"]

Tree = Any


def curvature_product(factors: Factors, v: Tree) -> Tree:
    """``F v``, block by block, at least float32; ``None`` stays where ``v`` has it."""
    leaves, treedef = jax.tree.flatten(v)
    where = moving_leaves(factors.plan)
    if len(leaves) != len(where):
        raise ValueError(
            f"a tangent has {len(leaves)} leaves, and the curvature has blocks for {len(where)}; leaves that are not "
            "floating are None, as fj.operators.restrict(params) makes them"
        )
    given: dict[int, Array] = dict(zip(where, leaves, strict=True))
    _check(factors.plan, given)

    def run(blocks, given):
        out: dict[int, Array] = {}
        for block, found in zip(factors.plan, blocks, strict=True):
            out |= _of_block(block, found, given)
        return out

    places = {i: spec_of(x) for i, x in given.items()}
    found = automatic(run, places, factors.blocks, given)
    return jax.tree.unflatten(treedef, [found[i] for i in where])


def moving_leaves(plan: tuple[Block, ...]) -> list[int]:
    """Places of the leaves that the blocks are of, among those of the parameters."""
    kernels = [block.leaf for block in plan if block.kind != "frozen"]
    return sorted(kernels + [block.bias for block in plan if block.bias is not None])


def _check(plan: tuple[Block, ...], given: dict[int, Array]) -> None:
    for block in plan:
        for use, leaf, name in ((block.use, block.leaf, ""), (block.bias_use, block.bias, "the bias of ")):
            if use is None or leaf is None or leaf not in given:
                continue
            wanted, found = tuple(use.segments[0].source.shape), jnp.shape(given[leaf])
            if wanted != found:
                raise ValueError(
                    f"{name}{block.path} has shape {list(wanted)} in the model, found {list(found)} in the tangent"
                )


def _of_block(block: Block, found: BlockFactors, given: dict[int, Array]) -> dict[int, Array]:
    if block.kind == "frozen":
        return {}
    M = wide(given[block.leaf])
    if block.kind in ("diagonal", "unused"):
        return {block.leaf: jnp.zeros_like(M) if found.diagonal is None else wide(found.diagonal) * M}

    def arrange(x):
        assert block.use is not None
        return table_matrices(block.use, x) if block.kind == "embedding" else kernel_matrices(block.use, x)

    def rows(x):
        assert block.bias_use is not None
        return bias_rows(block.bias_use, block.units, x)

    matrices = arrange(M)
    if block.bias is None:
        return {block.leaf: inverse(arrange, _like(M))(block_product(found, matrices))}
    bias = wide(given[block.bias])
    out = block_product(found, jnp.concatenate([matrices, rows(bias)[..., None]], -1))
    return {
        block.leaf: inverse(arrange, _like(M))(out[..., :-1]),
        block.bias: inverse(rows, _like(bias))(out[..., -1]),
    }


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def block_product(found: BlockFactors, M: Array) -> Array:
    """``[N, out, in]`` to the same: ``G M A``, with corrected eigenvalues or rows where there are some."""

    def one(found: BlockFactors, M: Array) -> Array:
        if found.eigenvalues is not None:
            # Of columns the basis is not normalised, and the eigenvalues are relative to its squared lengths.
            assert isinstance(found.A, Eigen | Diagonal)
            assert isinstance(found.G, Eigen | LowRank)
            inside = to_basis(found.A, to_basis(found.G, M).T).T * found.eigenvalues
            return from_basis(found.A, from_basis(found.G, inside).T).T
        curved = _side(found.A, _side(found.G, M).T).T
        return curved if found.rows is None else curved + found.rows[:, None] * M

    return jax.vmap(one)(found, M)


def _side(factor: Any, M: Array) -> Array:
    """A factor times a matrix."""
    if isinstance(factor, SoftmaxHead):
        spread = product(factor.columns, product(factor.columns.T, M))
        return factor.mean[:, None] * M - factor.mean[:, None] * product(factor.mean[None], M) - spread
    if isinstance(factor, LowRank):
        return product(factor.columns, product(factor.columns.T, M))
    if isinstance(factor, Eigen):
        return product(factor.vectors * factor.values[None], product(factor.vectors.T, M))
    return factor.values[:, None] * M

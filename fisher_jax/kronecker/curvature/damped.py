"""The damped inverse of every block, applied to a tree."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.dtypes import wide
from fisher_jax._support.placement import automatic, spec_of
from fisher_jax.kronecker.blocks.layout import bias_rows, inverse, kernel_matrices, table_matrices
from fisher_jax.kronecker.blocks.plan import Block
from fisher_jax.kronecker.curvature.decomposition import BlockFactors
from fisher_jax.kronecker.factors.tikhonov import corrected, diagonal_power, exact, factored
from fisher_jax.kronecker.factors.woodbury import SoftmaxHead, head_exact, head_factored, tied, tied_head

__all__ = ["EXACT_HEAD_LIMIT", "solve"]

# V T**2 in operations above which exact damping of a softmax head is refused.
EXACT_HEAD_LIMIT = 10**11


def solve(
    plan: tuple[Block, ...], blocks: tuple[BlockFactors, ...], leaves: list, damping: Any, form: str, power: float
) -> list:
    """`precondition` on a list of leaves, which may have ``None`` where no block is."""

    def run(blocks, leaves, damping):
        return _solve(plan, blocks, leaves, damping, form, power)

    out = [None if x is None else spec_of(x) for x in leaves]
    return automatic(run, out, blocks, leaves, jnp.asarray(damping))


def _solve(plan, blocks, leaves: list, damping: Array, form: str, power: float) -> list:
    out = list(leaves)
    for block, found in zip(plan, blocks, strict=True):
        if block.kind == "frozen":
            continue
        M = leaves[block.leaf]
        wanted = M.shape if block.use is None else block.use.segments[0].source.shape
        if M.shape != wanted:
            raise ValueError(f"{block.path} has shape {list(wanted)} in the model, found {list(M.shape)} in the tree")
        if block.kind in ("diagonal", "unused"):
            values = jnp.zeros(M.shape) if found.diagonal is None else found.diagonal
            out[block.leaf] = diagonal_power(values, M, damping, power).astype(M.dtype)
            continue
        arrange = _arrangement(block)
        matrices = arrange(wide(M))
        like = jax.ShapeDtypeStruct(M.shape, M.dtype)
        if block.bias is not None:
            rows, row_like = _bias(block), leaves[block.bias]
            matrices = jnp.concatenate([matrices, rows(wide(row_like))[..., None]], -1)
        X = _apply(block, found, matrices, damping, form, power)
        if block.bias is not None:
            out[block.bias] = inverse(rows, row_like)(X[..., -1]).astype(row_like.dtype)
            X = X[..., :-1]
        out[block.leaf] = inverse(arrange, like)(X).astype(M.dtype)
    return out


def _arrangement(block: Block) -> Callable[[Array], Array]:
    assert block.use is not None
    return functools.partial(table_matrices if block.kind == "embedding" else kernel_matrices, block.use)


def _bias(block: Block) -> Callable[[Array], Array]:
    assert block.bias_use is not None
    return functools.partial(bias_rows, block.bias_use, block.units)


def _apply(block: Block, found: BlockFactors, M: Array, damping: Any, form: str, power: float) -> Array:
    """``[N, out, in]`` to the same."""
    A, G = found.A, found.G
    if isinstance(G, SoftmaxHead) and power != -1:
        raise ValueError(
            f"the low-rank true Fisher of the head {block.path} has a closed form for the inverse only, found power="
            f"{power}; use policy='never' or estimator='sampled'"
        )
    if isinstance(G, SoftmaxHead) and (form == "exact" or found.rows is not None):
        cost = block.units * G.columns.shape[-1] ** 2 * M.shape[-1]
        if cost > EXACT_HEAD_LIMIT:
            raise ValueError(
                f"exact damping of the softmax head {block.path} takes {cost:.0e} operations, at most "
                f"{EXACT_HEAD_LIMIT:.0e} are allowed; lower token_cap, or use estimator='sampled'"
            )
    if found.rows is not None:
        if isinstance(G, SoftmaxHead):
            return jax.vmap(lambda a, g, r, m: tied_head(a, g, r, m, damping))(A, G, found.rows, M)
        return jax.vmap(lambda a, g, r, m: tied(a, g, r, m, damping, power))(A, G, found.rows, M)
    if isinstance(G, SoftmaxHead):
        with_head = head_exact if form == "exact" else head_factored
        return jax.vmap(lambda a, g, m: with_head(a, g, m, damping))(A, G, M)
    if found.eigenvalues is not None:
        with_values = functools.partial(corrected, damping=damping, power=power)
        return jax.vmap(lambda a, g, e, m: with_values(a, g, e, m))(A, G, found.eigenvalues, M)
    rule = factored if form == "factored" else exact
    return jax.vmap(lambda a, g, m: rule(a, g, m, damping, power))(A, G, M)

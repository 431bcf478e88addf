"""Eigenvalues corrected from per-token projections on the eigenbases (EK-FAC)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._tracing.program import Tap
from fisher_jax.kronecker.blocks.plan import Block, Rules
from fisher_jax.kronecker.blocks.slices import in_order, is_sliced
from fisher_jax.kronecker.factors.forms import Diagonal, product
from fisher_jax.kronecker.statistics.second_moments import Masks, lookups, observations

__all__ = ["column_weights", "second_moments"]


def second_moments(block: Block, taps: list[Tap], masks: Masks, rules: Rules, A: Any, G: Any) -> Array:
    """``[N, out, in]``: ``sum_t (v_i . g_t)**2 (p_j . a_t)**2`` over the positions of all uses.

    ``A``, ``G`` have a leading axis; ``v_i`` and ``p_j`` are the eigenvectors of ``G`` and ``A`` (of an embedding's
    diagonal ``A`` the rows themselves). Divided by the weight of the tokens this is the diagonal, in that basis, of
    the second moment of ``vec(g_t a_t^T)``. See George et al. (2018).
    """
    if isinstance(A, Diagonal):
        own = [_of_table(block, tap, masks, G.vectors) for tap in taps if tap.leaf == block.leaf]
    else:
        found = [tap for tap in taps if tap.leaf == block.leaf]
        if is_sliced(found[0].use, block.use):
            order = enumerate(in_order([tap.use for tap in found]))
            bases = [(found[tap], A.vectors[i : i + 1], G.vectors[i : i + 1]) for i, tap in order]
            return jnp.concatenate([_of_use(block, tap, masks, rules, a, g) for tap, a, g in bases])
        own = [_of_use(block, tap, masks, rules, A.vectors, G.vectors) for tap in found]
    return functools.reduce(jnp.add, own)


def _of_table(block: Block, tap: Tap, masks: Masks, on_g: Array) -> Array:
    """Of an embedding: squares summed over the tokens that look up the same row."""
    rows, g, mask = lookups(tap, block, masks)
    squares = product(g[0], on_g[0]).T ** 2
    squares = squares * (mask > 0).astype(squares.dtype)[None]
    return jnp.zeros((block.units, block.width), squares.dtype).at[:, rows].add(squares, mode="drop")[None]


def _of_use(block: Block, tap: Tap, masks: Masks, rules: Rules, on_a: Array, on_g: Array) -> Array:
    loops = tap.use.loops
    lengths = tap.cotangents.shape[: len(loops)]  # type: ignore[union-attr]
    stacks = [n for n, loop in zip(lengths, loops, strict=True) if loop == "stacked"]

    def run(inputs, cotangents, on_a, on_g, *iteration):
        whole = dataclasses.replace(tap, inputs=inputs, cotangents=cotangents, iteration=iteration)
        a, g, mask = observations(whole, block, masks, rules)
        # At the head the weight of a token is in its output gradient already.
        on_a = product(a, on_a)
        counts = (mask > 0).astype(on_a.dtype)[..., None]
        squares = (product(g, on_g) ** 2, (on_a * counts) ** 2)
        return product(jnp.swapaxes(squares[0], 1, 2), squares[1])

    for depth in reversed(range(len(loops))):
        basis = 0 if loops[depth] == "stacked" else None
        run = jax.vmap(run, (0, 0, basis, basis, *(0 if i == depth else None for i in range(len(loops)))))
    bases = (x.reshape(*stacks, -1, *x.shape[1:]) for x in (on_a, on_g))
    found = run(tap.inputs, tap.cotangents, *bases, *map(jnp.arange, lengths))
    shared = tuple(i for i, loop in enumerate(loops) if loop == "shared")
    found = found.sum(shared)
    return found.reshape(-1, *found.shape[-2:])


def column_weights(inputs: Array, A: Any, G: Any) -> Array:
    """``[N, T, in]``: ``sum_t Q_ti**2 (p_j . a_t)**2``, corrected eigenvalues over those ``s_i`` of ``G = U U^T``.

    ``inputs [N, in, T]`` are of the tokens that the columns are of (``[N, 1, T]`` rows of an embedding). With
    ``U^T U = Q diag(s) Q^T`` the projection of column ``t`` on eigenvector ``U q_i / sqrt(s_i)`` is
    ``sqrt(s_i) Q_ti``: no product with ``U`` is needed, and nothing is divided by a small ``s_i``.
    """

    def one(inputs, A, G):
        shares = G.vectors.T**2
        if isinstance(A, Diagonal):
            return jnp.zeros((len(shares), len(A.values)), shares.dtype).at[:, inputs[0]].add(shares, mode="drop")
        return product(shares, product(inputs.T, A.vectors) ** 2)

    return jax.vmap(one)(inputs, A, G)

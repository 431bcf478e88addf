"""Eigenvalues corrected from per-token projections on the eigenbases (EK-FAC)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fisher_jax.kronecker.blocks import Block, Rules
from fisher_jax.kronecker.factors import Eigen, product, wide
from fisher_jax.kronecker.statistics import Masks, observations
from fisher_jax.program import Tap

__all__ = ["corrected", "second_moments"]


def second_moments(block: Block, taps: list[Tap], masks: Masks, rules: Rules, A: Any, G: Any) -> Array:
    """``[N, out, in]``: ``sum_t (v_i . g_t)**2 (p_j . a_t)**2`` over the positions of all uses.

    ``A``, ``G`` are eigendecompositions with a leading axis; ``v_i`` and ``p_j`` are the eigenvectors of ``G`` and
    ``A``. Divided by the weight of the tokens this is the diagonal, in that basis, of the second moment of
    ``vec(g_t a_t^T)``. See George et al. (2018).
    """
    own = [_of_use(block, tap, masks, rules, A.vectors, G.vectors) for tap in taps if tap.leaf == block.leaf]
    return functools.reduce(jnp.add, own)


def _of_use(block: Block, tap: Tap, masks: Masks, rules: Rules, on_a: Array, on_g: Array) -> Array:
    loops = tap.use.loops
    lengths = tap.cotangents.shape[: len(loops)]  # type: ignore[union-attr]
    stacks = [n for n, loop in zip(lengths, loops, strict=True) if loop == "stacked"]

    def run(inputs, cotangents, on_a, on_g):
        whole = dataclasses.replace(tap, inputs=inputs, cotangents=cotangents)
        a, g, mask = observations(whole, block, masks, rules)
        # At the head the weight of a token is in its output gradient already.
        counts = (mask > 0)[:, None]
        squares = (product(g, on_g) ** 2, (product(a, on_a) * counts) ** 2)
        return product(jnp.swapaxes(squares[0], 1, 2), squares[1])

    for loop in reversed(loops):
        basis = 0 if loop == "stacked" else None
        run = jax.vmap(run, (0, 0, basis, basis))
    bases = (x.reshape(*stacks, -1, *x.shape[1:]) for x in (on_a, on_g))
    found = run(tap.inputs, tap.cotangents, *bases)
    shared = tuple(i for i, loop in enumerate(loops) if loop == "shared")
    found = found.sum(shared)
    return found.reshape(-1, *found.shape[-2:])


def corrected(
    A: Eigen, G: Eigen, eigenvalues: Float[Array, "out in"], M: Float[Array, "out in"], damping: Any, power: float
) -> Array:
    """``V [(V^T M P)_ij (eigenvalues_ij + damping)**power] P^T`` with ``V``, ``P`` the eigenvectors."""
    inside = product(product(G.vectors.T, wide(M)), A.vectors)
    scaled = inside * (eigenvalues + jnp.asarray(damping, inside.dtype)) ** power
    return product(product(G.vectors, scaled), A.vectors.T)

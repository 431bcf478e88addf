"""Approximate inverses of ``C + damping I``, and how small the eigenvalues of the preconditioned product can be."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from fisher_jax._support.dtypes import wide
from fisher_jax.kronecker.curvature.damped import solve as kronecker_solve
from fisher_jax.kronecker.curvature.factors import Factors
from fisher_jax.kronecker.curvature.product import moving_leaves
from fisher_jax.kronecker.factors.forms import LowRank
from fisher_jax.kronecker.factors.woodbury import SoftmaxHead
from fisher_jax.operators.tree_vectors import check_like

__all__ = ["preconditioner_of"]

Tree = Any


def preconditioner_of(given: Any, b: Tree, damping: Array) -> tuple[Partial, Array]:
    """``M`` as a product, and a lower bound of the eigenvalues of ``M (C + damping I)`` for ``C >= 0``; 0: unknown.

    With ``M = (D + damping I)^-1`` it is ``damping / (damping + largest eigenvalue of D)``.
    """
    if given is None:
        return Partial(_unchanged), damping
    if isinstance(given, Factors):
        factors = dataclasses.replace(given, damping=damping, power=-1.0)
        largest = _largest_eigenvalue(factors)
        smallest = jnp.zeros_like(damping) if largest is None else damping / (damping + largest.astype(damping.dtype))
        _check_factors(factors, b)
        return Partial(_by_factors, factors), smallest
    if callable(given):
        found = given if isinstance(given, Partial) else Partial(given)
        return Partial(_by_function, found), jnp.zeros_like(damping)
    diagonal = check_like(given, b, "preconditioner")
    largest = functools.reduce(jnp.maximum, [jnp.max(x).astype(damping.dtype) for x in jax.tree.leaves(diagonal)])
    return Partial(_by_diagonal, diagonal, damping), damping / (damping + largest)


def _unchanged(v: Tree) -> Tree:
    return v


def _by_function(function: Partial, v: Tree) -> Tree:
    return check_like(function(v), v, "the preconditioner's result")


def _by_diagonal(diagonal: Tree, damping: Array, v: Tree) -> Tree:
    return jax.tree.map(lambda x, d: x / (d + damping.astype(d.dtype)), v, diagonal)


def _by_factors(factors: Factors, v: Tree) -> Tree:
    leaves, treedef = jax.tree.flatten(v, is_leaf=lambda x: x is None)
    filled = list(leaves)
    for block in factors.plan:
        for use, leaf in ((block.use, block.leaf), (block.bias_use, block.bias)):
            if use is not None and leaf is not None and leaves[leaf] is None:
                filled[leaf] = jnp.zeros(use.segments[0].source.shape)
    found = kronecker_solve(factors.plan, factors.blocks, filled, factors.damping, factors.form, factors.power)
    kept = [None if x is None else y for x, y in zip(leaves, found, strict=True)]
    return jax.tree.unflatten(treedef, kept)


def _check_factors(factors: Factors, b: Tree) -> None:
    leaves = jax.tree.leaves(b, is_leaf=lambda x: x is None)
    where = moving_leaves(factors.plan)
    if not where or where[-1] >= len(leaves):
        raise ValueError(
            f"the factors have blocks for {len(where)} leaves, and b has {len(leaves)}; b is a tree like the "
            "parameters, as fj.operators.restrict(params) makes it"
        )
    jax.eval_shape(_by_factors, factors, b)


def _largest_eigenvalue(factors: Factors) -> Array | None:
    """At least the largest eigenvalue of what ``damping I`` is added to; ``None`` where it is not simply added."""
    found = [jnp.zeros(())]
    for block, part in zip(factors.plan, factors.blocks, strict=True):
        if block.kind in ("frozen", "unused"):
            continue
        if not block.is_kronecker:
            found.append(_top(part.diagonal))
            continue
        assert part.A is not None
        assert part.G is not None
        if part.eigenvalues is not None:
            found.append(_top(part.eigenvalues) * (_top(part.G.values) if isinstance(part.G, LowRank) else 1))
            continue
        if isinstance(part.G, SoftmaxHead):
            simply, top = factors.form == "exact", _top(part.G.mean)
        else:
            simply, top = factors.form != "factored", _top(part.G.values)
        if part.rows is None and not simply:
            return None
        found.append(_top(part.A.values) * top + _top(part.rows))
    return functools.reduce(jnp.maximum, found)


def _top(x: Any) -> Array:
    return jnp.zeros(()) if x is None else jnp.max(wide(x), initial=0)

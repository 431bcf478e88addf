"""Approximate inverses of ``C + damping I``, and how small the eigenvalues of the preconditioned product can be."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from fisher_jax._support.dtypes import wide
from fisher_jax._support.jax_internals import is_traced
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
        jax.eval_shape(_by_factors, factors, b)  # what does not fit is said before the first product
        return Partial(_by_factors, factors), smallest
    if callable(given):
        found = given if isinstance(given, Partial) else Partial(given)
        return Partial(_by_function, found), jnp.zeros_like(damping)
    diagonal = check_like(given, b, "preconditioner")
    leaves = jax.tree.leaves(diagonal)
    least = functools.reduce(jnp.minimum, [jnp.min(x).astype(damping.dtype) for x in leaves])
    if not is_traced(least) and not least >= 0:
        raise ValueError(f"the diagonal of a preconditioner is not negative, found {float(least):.3g}")
    largest = functools.reduce(jnp.maximum, [jnp.max(x).astype(damping.dtype) for x in leaves])
    smallest = jnp.where(least >= 0, damping / (damping + largest), 0)
    return Partial(_by_diagonal, diagonal, damping), smallest


def _unchanged(v: Tree) -> Tree:
    return v


def _by_function(function: Partial, v: Tree) -> Tree:
    return check_like(function(v), v, "the preconditioner's result")


def _by_diagonal(diagonal: Tree, damping: Array, v: Tree) -> Tree:
    return jax.tree.map(lambda x, d: x / (d + damping.astype(d.dtype)), v, diagonal)


def _by_factors(factors: Factors, v: Tree) -> Tree:
    """The inverse of every block; entries of leaves that do not move are zeros, and are left out of the result."""
    leaves, treedef = jax.tree.flatten(v)
    where = _places(factors, v)
    filled: list = [None] * _number_of_leaves(factors)
    for block in factors.plan:
        for use, leaf in ((block.use, block.leaf), (block.bias_use, block.bias)):
            if use is not None and leaf is not None:
                filled[leaf] = jnp.zeros(use.segments[0].source.shape)
    for i, x in zip(where, leaves, strict=True):
        filled[i] = x
    found = kronecker_solve(factors.plan, factors.blocks, filled, factors.damping, factors.form, factors.power)
    return jax.tree.unflatten(treedef, [found[i] for i in where])


def _number_of_leaves(factors: Factors) -> int:
    return 1 + max(i for block in factors.plan for i in (block.leaf, block.bias) if i is not None)


def _places(factors: Factors, v: Tree) -> list[int]:
    """Which of the parameters the leaves of ``v`` belong to: all that have blocks, or those that are not ``None``."""
    number, with_blocks = len(jax.tree.leaves(v)), moving_leaves(factors.plan)
    if number == len(with_blocks):
        return with_blocks
    spaces = jax.tree.leaves(v, is_leaf=lambda x: x is None)
    found = [i for i, x in enumerate(spaces) if x is not None]
    if len(spaces) != _number_of_leaves(factors) or not set(found) <= set(with_blocks):
        raise ValueError(
            f"b has {number} leaves, and the factors have blocks for {len(with_blocks)}; b is a tree like the "
            "parameters, with None where nothing moves, as fj.operators.restrict(params, parameters) makes it"
        )
    return found


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

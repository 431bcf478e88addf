"""Trees of arrays as vectors: dot products, sums, dtypes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from fisher_jax._support.dtypes import common_dtype, is_floating, wide, wide_dtype

__all__ = [
    "add_scaled",
    "check_like",
    "dot",
    "each",
    "norm",
    "number_of",
    "scalar_dtype",
    "select",
    "widened",
    "zeros_like",
]

Tree = Any


def scalar_dtype(tree: Tree) -> jnp.dtype:
    """The dtype of sums over all leaves: at least float32."""
    return common_dtype(*(wide_dtype(jnp.result_type(x)) for x in jax.tree.leaves(tree)))


def dot(x: Tree, y: Tree) -> Array:
    """``sum x y`` over all entries. Last axes are summed first, so that float32 loses little in long sums."""
    dtype = scalar_dtype(x)

    def of_leaf(a, b):
        product = (a * b).astype(dtype)
        return jnp.sum(jnp.sum(product, -1) if product.ndim else product)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(of_leaf, x, y)))


def norm(x: Tree) -> Array:
    """The 2-norm over all entries. Entries are divided by the largest one first, so that no square overflows."""
    dtype = scalar_dtype(x)
    largest = functools.reduce(
        jnp.maximum, (jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jax.tree.leaves(x))
    )
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    small = jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), x)
    return scale * jnp.sqrt(dot(small, small))


def add_scaled(x: Tree, scale: Array, y: Tree) -> Tree:
    """``x + scale y``, in the dtypes of ``x``."""
    return jax.tree.map(lambda a, b: a + scale.astype(a.dtype) * b, x, y)


def select(condition: Array, x: Tree, y: Tree) -> Tree:
    return jax.tree.map(functools.partial(jnp.where, condition), x, y)


def each(function: Callable) -> Callable:
    """``function`` of every entry of a leading axis, side by side.

    One after the other where Explicit axes do not let a product be batched.
    """
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return lambda *trees: jax.lax.map(lambda x: function(*x), trees)
    return jax.vmap(function)


def number_of(tree: Tree, what: str) -> int:
    """The length of the leading axis of every leaf.

    Raises:
        ValueError: leaves of different lengths, or without axes.
    """
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(tree)}
    if len(lengths) != 1 or () in lengths:
        shown = ", ".join(sorted(str(list(x)) for x in lengths))
        raise ValueError(f"{what} have one leading axis in all leaves, found the lengths {shown}")
    return next(iter(lengths))[0]


def zeros_like(x: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, x)


def widened(tree: Tree, name: str) -> Tree:
    """Floating leaves in at least float32.

    Raises:
        ValueError: a leaf that is not real and floating, or no leaf.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if not is_floating(x):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {jnp.result_type(x)}; wanted real floating leaves "
                "and None where nothing moves, as fj.operators.restrict(params) has it"
            )
    if not jax.tree.leaves(tree):
        raise ValueError(f"{name} has no leaf")
    return jax.tree.map(wide, tree)


def check_like(found: Tree, like: Tree, name: str, of: str = "b") -> Tree:
    """``found`` in the dtypes of ``like``.

    Raises:
        ValueError: another structure or shape than that of ``like``.
    """
    structure: Any = jax.tree.structure(found)
    wanted_structure: Any = jax.tree.structure(like)
    if structure != wanted_structure:
        raise ValueError(f"{name} has the structure {structure}, wanted that of {of}, {wanted_structure}")
    pairs = zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(found), strict=True)
    for (path, wanted), x in pairs:
        if jnp.shape(x) != jnp.shape(wanted):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {list(jnp.shape(x))}, wanted "
                f"{list(jnp.shape(wanted))} as in {of}"
            )
    return jax.tree.map(lambda x, wanted: jnp.asarray(x).astype(wanted.dtype), found, like)

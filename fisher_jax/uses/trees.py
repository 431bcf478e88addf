"""Trees side by side: the paths of leaves, the same structure and shapes, values that are not negative."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support.jax_internals import is_traced
from fisher_jax._support.printable import few

Tree = Any


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Leaves with their paths; a tree that is one array has the path ``array``."""
    return [(jax.tree_util.keystr(path) or "array", x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def check_alike(a: Tree, b: Tree, one: str, other: str, *, shapes: bool = True) -> None:
    """Raise unless both trees have the same paths and, if asked, shapes; the sentence names what differs."""
    leaves, others = named_leaves(a), named_leaves(b)
    names, other_names = ([name for name, _ in x] for x in (leaves, others))
    if names != other_names:
        only = [n for n in names if n not in set(other_names)]
        lacking = [n for n in other_names if n not in set(names)]
        parts = [f"only in {one}: {few(only)}"] if only else []
        parts += [f"only in {other}: {few(lacking)}"] if lacking else []
        raise ValueError(f"{one} and {other} have different trees; {'; '.join(parts) or 'their orders differ'}")
    for (name, x), (_, y) in zip(leaves, others, strict=True):
        if shapes and np.shape(x) != np.shape(y):
            raise ValueError(f"{name} has shape {list(np.shape(x))} in {one} and {list(np.shape(y))} in {other}")


def check_not_negative(tree: Tree, what: str) -> None:
    """Raise where a concrete array has a negative or NaN entry; inside ``jit`` nothing can be seen."""
    for name, x in named_leaves(tree):
        if is_traced(x) or not np.size(x):
            continue
        with jax.ensure_compile_time_eval():
            smallest = float(jnp.min(jnp.asarray(x)))
        if not smallest >= 0:
            found = "NaN" if math.isnan(smallest) else f"{smallest:.3g}"
            raise ValueError(f"{name} of {what} has the entry {found}; Fisher information is never negative")

"""Which axes of a kernel are inputs and which are outputs, and what a group is then."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisher_jax import groups as groups_room
from fisher_jax.batch import Batch

__all__ = ["reduction"]

Tree = Any


def reduction(groups: Any, apply_fn: Callable, params: Tree, example: Batch | None) -> Callable[[Tree], Tree]:
    """A function from squares, a tree like ``params``, to sums over groups.

    Raises:
        ValueError: see ``fj.group_fisher``.
    """
    if callable(groups):
        return _by_function(groups, params)
    name = groups_room.resolve(groups).name
    if name == "param":
        return lambda squares: squares
    if example is None:
        raise ValueError(
            f"groups={name!r} needs example=, a batch of arrays or jax.ShapeDtypeStructs: it is traced to find the "
            "orientation of every kernel; without it only fj.groups.param works"
        )
    if name == "tensor":
        return lambda squares: jax.tree.map(jnp.sum, squares)
    raise ValueError(
        f"groups={name!r} is not available for all parameters; use fj.groups.param or .tensor, a function (path, "
        "shape) -> reduction, or fj.lm_head for the rows of a head"
    )


def _by_function(choose: Callable, params: Tree) -> Callable[[Tree], Tree]:
    """Ask the user's function for every leaf, by its path and shape."""

    def reduce(squares: Tree) -> Tree:
        def leaf(path, x):
            found = choose(jax.tree_util.keystr(path), tuple(x.shape))
            if not callable(found):
                raise ValueError(
                    f"groups({jax.tree_util.keystr(path)!r}, {tuple(x.shape)}) returns a function of squares, found "
                    f"{type(found).__name__}"
                )
            return found(x)

        return jax.tree_util.tree_map_with_path(leaf, squares)

    del params
    return reduce

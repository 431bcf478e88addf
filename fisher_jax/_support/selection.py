"""Which leaves of the parameters move: the rest of the tree is ``None`` in every tangent."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fisher_jax._support.dtypes import check_not_complex, is_floating

__all__ = ["Selection", "matches", "no_array", "select"]

Tree = Any
Chosen = str | re.Pattern | Callable[[str, Any], bool] | Tree | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Selection:
    """The leaves of one tree that move. Static: equal for equal trees, so that nothing recompiles."""

    treedef: Any
    paths: tuple[str, ...]
    moves: tuple[bool, ...]

    def restrict(self, params: Tree) -> Tree:
        """The moving leaves; ``None`` for the others."""
        kept = [x if move else None for x, move in zip(jax.tree.leaves(params), self.moves, strict=True)]
        return jax.tree.unflatten(self.treedef, kept)

    def join(self, moving: Tree, params: Tree) -> Tree:
        """``params`` with the moving leaves replaced."""
        new = iter(jax.tree.leaves(moving))
        joined = [next(new) if move else x for x, move in zip(jax.tree.leaves(params), self.moves, strict=True)]
        return jax.tree.unflatten(self.treedef, joined)


def no_array(path: str, x: Any) -> str:
    """What is said of a leaf that is no array, as the functions of a whole module are."""
    return (
        f"parameter {path} is of type {type(x).__name__}, and parameters are arrays: take the rest out of the model, "
        "with params, rest = equinox.partition(model, equinox.is_inexact_array) and equinox.combine(params, rest) in "
        "apply_fn, or with graph, params, rest = nnx.split(model, nnx.Param, ...) and nnx.merge(graph, params, rest, "
        "copy=True)"
    )


def select(params: Tree, parameters: Chosen = None) -> Selection:
    """See `fisher_jax.operators.restrict`, which has the words."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in flat)
    leaves = [x for _, x in flat]
    for path, x in zip(paths, leaves, strict=True):
        if not hasattr(x, "dtype") or (isinstance(x, np.ndarray) and x.dtype.kind in "OUSMm"):
            raise ValueError(no_array(path, x))
    wanted = matches(params, parameters)
    moves = []
    for path, x, want in zip(paths, leaves, wanted, strict=True):
        if want:
            check_not_complex(path, x, ", or leave it out with parameters=")
        floating = is_floating(x)
        if want and not floating and parameters is not None:
            raise ValueError(
                f"parameter {path} has dtype {x.dtype} and cannot be differentiated; leave it out of parameters="
            )
        moves.append(want and floating)
    if not any(moves):
        shown = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
        raise ValueError(f"parameters={parameters!r} selects no floating parameter; there are: {shown or 'none'}")
    return Selection(treedef, paths, tuple(moves))


def matches(params: Tree, chosen: Chosen) -> list[bool]:
    """For every leaf whether a pattern (searched in its path), a predicate or a tree of booleans chooses it."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    if chosen is None:
        return [True] * len(flat)
    if isinstance(chosen, str | re.Pattern):
        return [re.search(chosen, jax.tree_util.keystr(path)) is not None for path, _ in flat]
    if callable(chosen):
        return [bool(chosen(jax.tree_util.keystr(path), x)) for path, x in flat]
    try:
        spread = jax.tree.leaves(jax.tree.broadcast(chosen, params))
    except ValueError as error:
        raise ValueError(
            f"a tree of booleans has the structure of the parameters, or a prefix of it: {error}"
        ) from None
    for (path, _), x in zip(flat, spread, strict=True):
        if not isinstance(x, bool | np.bool_):
            raise ValueError(
                f"leaves are chosen by a pattern, a predicate (path, leaf) -> bool or a tree of booleans; found "
                f"{type(x).__name__} for {jax.tree_util.keystr(path)}"
            )
    return [bool(x) for x in spread]

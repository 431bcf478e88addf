"""A part of the parameters beside the whole tree, as under ``optax.masked`` and ``multi_transform``."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fisher_jax._support.masked import is_masked
from fisher_jax.kronecker.blocks.problem import Problem

__all__ = ["aligned", "restricted", "shapes", "whole"]

Tree = Any


def shapes(tree: Tree) -> Tree:
    return None if tree is None else jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), tree)


def whole(params: Tree, instead: Tree, where: str) -> Tree:
    """``instead`` where it is given, else ``params``, which must then be all of them."""
    found = params if instead is None else instead
    if any(map(is_masked, jax.tree.leaves(found, is_leaf=is_masked))):
        raise ValueError(
            "scale_by_kfac sees a part of the parameters (under optax.masked or multi_transform), and the model "
            f"needs all of them in {where}"
        )
    return found


def restricted(problem: Problem, part: Tree) -> Problem:
    """The problem of the leaves that are in ``part``."""
    present = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(part)[0]}
    return problem._replace(rules=dataclasses.replace(problem.rules, follow=lambda path: path in present))


def aligned(part: Tree, whole: Tree) -> tuple[list, Any]:
    """Leaves of ``part`` at their places among those of ``whole``, ``None`` elsewhere."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(part)
    present = {jax.tree_util.keystr(path): x for path, x in paths}
    order = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(whole)[0]]
    unknown = sorted(set(present) - set(order))
    if unknown:
        raise ValueError(f"updates have leaves that the parameters do not have: {', '.join(unknown)}")
    return [present.get(path) for path in order], treedef

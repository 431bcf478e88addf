"""Trees side by side: the same structure, group sums beside the parameters that they are sums over."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax import welford
from fisher_jax._support.dtypes import wide
from fisher_jax._support.jax_internals import is_traced
from fisher_jax.moving_average import MovingAverage
from fisher_jax.welford.moments import Moments

__all__ = [
    "beside", "check_alike", "check_not_negative", "few", "named_leaves", "per_parameter", "values_of", "wide",
]  # fmt: skip

Tree = Any


def values_of(x: Any) -> Tree:
    """The mean of a state or of moments; any other tree as it is."""
    x = getattr(x, "fisher", x)  # an optax state that keeps a Fisher state
    if isinstance(x, welford.State | Moments):
        return welford.mean(x)
    return x.average if isinstance(x, MovingAverage) else x


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Leaves with their paths; a tree that is one array has the path ``array``."""
    return [(jax.tree_util.keystr(path) or "array", x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def few(names: list[str], most: int = 4) -> str:
    """The first few names in a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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


def beside(value: Array, shape: tuple[int, ...], name: str, what: str) -> tuple[Array, int]:
    """A group statistic with the axes of its parameter, of length 1 where it was summed; and the size of a group."""
    found = tuple(np.shape(value))
    if len(found) == len(shape):
        fits = {found} if all(f in (1, n) for f, n in zip(found, shape, strict=True)) else set()
    else:
        places = itertools.combinations(range(len(shape)), len(found))
        inside = [axes for axes in places if all(found[i] == shape[a] for i, a in enumerate(axes))]
        fits = {tuple(n if i in axes else 1 for i, n in enumerate(shape)) for axes in inside}
    if not fits:
        raise ValueError(
            f"{name} has shape {list(found)} in {what}, which does not go with the parameter's shape {list(shape)}; "
            f"a group sum has the parameter's axes, without those (or with length 1 for those) that it sums over"
        )
    if len(fits) > 1:
        raise ValueError(
            f"{name} has shape {list(found)} in {what}, which fits the parameter's shape {list(shape)} in several "
            f"ways; reshape it to {' or '.join(str(list(x)) for x in sorted(fits))}, with length 1 where it sums"
        )
    (full,) = fits
    size = math.prod(n // f if f else 1 for f, n in zip(full, shape, strict=True))
    return value.reshape(full), size


def per_parameter(fisher: Any, params: Tree) -> Tree:
    """The mean Fisher of a parameter of each group: ``F_group / |group|``, ready to broadcast against ``params``.

    Group sums (rows, columns, tensors) know only the total of their group; this takes it as spread evenly. With
    groups of single parameters it changes nothing.

    Args:
        fisher: a tree like ``params`` of sums over groups, per weighted token, or a Welford state, moments or moving
            average of such (its mean is taken). A leaf has the parameter's axes; axes that were summed are left out
            or have length 1.
        params: arrays or ``jax.ShapeDtypeStruct``s.

    Returns:
        A tree like ``params`` of arrays with the parameter's number of axes, of length 1 where the Fisher was summed;
        at least float32.

    Raises:
        ValueError: other trees, a shape that does not fit, or one that fits in several ways (a row of a square
            kernel: reshape it to ``[out, 1]`` or ``[1, out]``).

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> fj.per_parameter({"kernel": jnp.array([6.0, 12.0])}, {"kernel": jnp.ones((2, 3))})["kernel"].tolist()
        [[2.0], [4.0]]
    """
    fisher = values_of(fisher)
    check_alike(params, fisher, "the parameters", "the Fisher", shapes=False)

    def leaf(name, value, param):
        full, size = beside(wide(value), tuple(param.shape), name, "the Fisher")
        return full if size == 1 else full / size

    named = zip(named_leaves(fisher), jax.tree.leaves(params), strict=True)
    return jax.tree.unflatten(jax.tree.structure(params), [leaf(n, f, p) for (n, f), p in named])

"""Sums over groups beside the parameters that they are sums over."""

import itertools
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from fisher_jax._support.dtypes import wide
from fisher_jax.uses import reading
from fisher_jax.uses.trees import check_alike, named_leaves

Tree = Any


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
    fisher = reading.mean(fisher)
    check_alike(params, fisher, "the parameters", "the Fisher", shapes=False)

    def leaf(name, value, param):
        full, size = beside(wide(value), tuple(param.shape), name, "the Fisher")
        return full if size == 1 else full / size

    named = zip(named_leaves(fisher), jax.tree.leaves(params), strict=True)
    return jax.tree.unflatten(jax.tree.structure(params), [leaf(n, f, p) for (n, f), p in named])

"""What to prune: saliency of parameters and groups, and masks that keep an exact number of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support.dtypes import wide
from fisher_jax._support.jax_internals import is_traced
from fisher_jax._support.placement import automatic, spec_of
from fisher_jax.uses import reading
from fisher_jax.uses.group_sums import beside
from fisher_jax.uses.trees import check_alike, check_not_negative, named_leaves

Tree = Any


def saliency(params: Tree, fisher: Any) -> Tree:
    """``F_i p_i**2 / 2``: by how much the loss grows if a parameter is set to zero, to second order.

    In nats per weighted token, since ``F`` is the mean per weighted token (the Fisher in place of the Hessian, first
    order left out). Of a group its sum over the group; a group sum ``F_g`` is taken as spread evenly:
    ``F_g / |g| * sum_{i in g} p_i**2 / 2``. Where ``F`` is known for every parameter that is the better number: sum
    its saliency over the group (``fj.prune_mask(..., structured=True)`` does).

    Args:
        params: a tree of arrays.
        fisher: a tree like ``params``, of the parameters' shapes or of sums over groups (see `fj.per_parameter`); or
            a Welford state, moments or moving average, whose mean is taken.

    Returns:
        A tree of the shapes of ``fisher``, at least float32.

    Raises:
        ValueError: other trees, shapes that do not fit, a negative Fisher.

    See LeCun, Denker and Solla (1990), Optimal brain damage, eq. 5; Theis et al. (2018), Faster gaze prediction.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> params, fisher = {"w": jnp.array([[1.0, 2.0], [3.0, 0.0]])}, {"w": jnp.array([[2.0, 2.0], [4.0, 4.0]])}
        >>> fj.saliency(params, fisher)["w"].tolist()
        [[1.0, 4.0], [18.0, 0.0]]
        >>> fj.saliency(params, {"w": jnp.array([4.0, 8.0])})["w"].tolist()  # sums over columns 0 and 1 of each row
        Traceback (most recent call last):
        ...
        ValueError: ['w'] has shape [2] in the Fisher, which fits the parameter's shape [2, 2] in several ways; ...
        >>> fj.saliency(params, {"w": jnp.array([[4.0], [8.0]])})["w"].tolist()
        [[5.0], [18.0]]
    """
    fisher = reading.mean(fisher)
    check_alike(params, fisher, "the parameters", "the Fisher", shapes=False)
    check_not_negative(fisher, "the Fisher")

    def leaf(name, value, param):
        full, size = beside(wide(value), jnp.shape(param), name, "the Fisher")
        summed = tuple(i for i, (f, n) in enumerate(zip(full.shape, jnp.shape(param), strict=True)) if f != n)
        squares = jnp.sum(wide(param) ** 2, summed, keepdims=True)
        return (full * (0.5 / size) * squares).reshape(jnp.shape(value))

    named = zip(named_leaves(fisher), jax.tree.leaves(params), strict=True)
    return jax.tree.unflatten(jax.tree.structure(fisher), [leaf(n, f, p) for (n, f), p in named])


def prune_mask(
    scores: Tree, sparsity: float, structured: bool = True, *, scope: str = "global", axis: int = 0
) -> Tree:
    """Which entries to keep: true but for the ``round(sparsity * N)`` units of the smallest score.

    Exactly that many are pruned, whatever ties there are: of equal scores the later one, in the order of the tree
    and then of the array, goes first (in a vocabulary the rarer token). ``sparsity=1 - keep / N`` keeps ``keep``. A
    NaN is never pruned under ``jit``, and refused elsewhere.

    Args:
        scores: a tree of arrays, or one row vector ``[V]``: importance, saliency, or any number that is small where
            little is lost.
        sparsity: the share to prune, in [0, 1]; static.
        structured: prune whole units along ``axis``: a unit's score is the sum over the other axes of its leaf. A
            vector has one entry per unit, a scalar is one unit. ``False``: every entry by itself.
        scope: ``"global"`` compares all leaves; ``"tensor"`` prunes the same share of each.
        axis: of the units, for ``structured``: 0 for ``[vocabulary, width]``, -1 for a Flax kernel ``[in, out]``.

    Returns:
        Boolean arrays of the shapes of ``scores``, laid out as they are on a mesh of explicit axes; NumPy where all
        scores are NumPy (float64 scores are then compared as such).

    Raises:
        ValueError: a sparsity outside [0, 1], a NaN score, an unknown scope, an axis that a leaf does not have.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> fj.prune_mask(jnp.array([3.0, 1.0, 2.0, 1.0]), 0.25).tolist()
        [True, True, True, False]
        >>> fj.prune_mask({"a": jnp.array([[1.0, 1.0], [0.0, 9.0]])}, 0.5)["a"].tolist()
        [[False, False], [True, True]]
        >>> fj.prune_mask({"a": jnp.array([[1.0, 1.0], [0.0, 9.0]])}, 0.5, structured=False)["a"].tolist()
        [[True, False], [False, True]]
    """
    if is_traced(sparsity):
        raise ValueError("sparsity is a Python number, not a traced one: it fixes how many entries are pruned")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is the share to prune, in [0, 1], found {sparsity}")
    if scope not in ("global", "tensor"):
        raise ValueError(f"scope is 'global' or 'tensor', found {scope!r}")
    leaves, treedef = jax.tree.flatten(scores)
    if not leaves:
        raise ValueError("the scores hold no array")
    for name, x in named_leaves(scores):
        _check_scores(name, x, axis if structured else None)
    if all(isinstance(x, np.ndarray | np.generic | float | int) for x in leaves):
        masks = _masks([np.asarray(x) for x in leaves], sparsity, structured, scope, axis, np)
    else:
        leaves = [jnp.asarray(x) for x in leaves]
        masks = automatic(
            lambda leaves: _masks(leaves, sparsity, structured, scope, axis, jnp),
            [spec_of(x) for x in leaves],
            leaves,
        )
    return jax.tree.unflatten(treedef, masks)


def _check_scores(name: str, x: Any, axis: int | None) -> None:
    ndim = np.ndim(x)
    if axis is not None and ndim and not -ndim <= axis < ndim:
        raise ValueError(f"{name} of the scores has {ndim} axes and no axis {axis}; choose another axis=")
    if is_traced(x) or not np.size(x):
        return
    with jax.ensure_compile_time_eval():
        bad = np.isnan(x).any() if isinstance(x, np.ndarray) else bool(jnp.isnan(jnp.asarray(x)).any())
    if bad:
        raise ValueError(f"{name} of the scores has a NaN; what cannot be compared cannot be pruned")


def _masks(leaves: list, sparsity: float, structured: bool, scope: str, axis: int, xp: Any) -> list:
    units = [_unit_scores(x, axis) if structured else x.reshape(-1) for x in leaves]
    if scope == "tensor":
        kept = [_kept(x, sparsity, xp) for x in units]
    else:
        every = _kept(xp.concatenate(units), sparsity, xp)
        ends = np.cumsum([x.shape[0] for x in units])
        kept = [every[end - x.shape[0] : end] for x, end in zip(units, ends, strict=True)]
    return [_on_leaf(k, x, structured, axis, xp) for k, x in zip(kept, leaves, strict=True)]


def _unit_scores(x: Any, axis: int) -> Any:
    if x.ndim == 0:
        return x.reshape(1)
    return x.sum(tuple(i for i in range(x.ndim) if i != axis % x.ndim))


def _kept(scores: Any, sparsity: float, xp: Any) -> Any:
    """True for the largest; stable, so that of equal scores the first is kept."""
    number = scores.shape[0] - round(sparsity * scores.shape[0])
    order = xp.argsort(xp.where(xp.isnan(scores), -xp.inf, -scores), stable=True)
    places = xp.argsort(order, stable=True)
    return places < number


def _on_leaf(kept: Any, like: Any, structured: bool, axis: int, xp: Any) -> Any:
    if not structured or like.ndim == 0:
        return kept.reshape(like.shape)
    shape = [1] * like.ndim
    shape[axis] = like.shape[axis]
    return xp.broadcast_to(kept.reshape(shape), like.shape)


def apply_mask(params: Tree, mask: Tree) -> Tree:
    """``params`` with zeros where ``mask`` is false.

    Args:
        params: a tree of arrays.
        mask: a tree of boolean arrays, of the parameters' shapes or of their groups (as in `fj.per_parameter`: axes
            that a group covers are left out or have length 1).

    Returns:
        A tree like ``params``, of its dtypes; entries that stay are the same bits.

    Raises:
        ValueError: other trees, shapes that do not fit, a mask that is not boolean.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> mask = fj.prune_mask(jnp.array([3.0, 1.0, 2.0]), 1 / 3)
        >>> fj.stats.apply_mask(jnp.ones((3, 2)), mask).tolist()
        [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    """
    check_alike(params, mask, "the parameters", "the mask", shapes=False)

    def leaf(name, keep, param):
        if keep.dtype != bool:
            raise ValueError(f"{name} of the mask has dtype {keep.dtype}; a mask is boolean, true where kept")
        full, _ = beside(keep, jnp.shape(param), name, "the mask")
        return jnp.where(full, param, jnp.zeros((), jnp.result_type(param)))

    named = zip(named_leaves(mask), jax.tree.leaves(params), strict=True)
    return jax.tree.unflatten(jax.tree.structure(params), [leaf(n, k, p) for (n, k), p in named])

"""Several fine-tuned models as one: means of parameters weighted by their Fisher information."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fisher_jax._support.dtypes import check_not_complex, is_floating, wide
from fisher_jax._support.jax_internals import is_traced
from fisher_jax.uses import reading
from fisher_jax.uses.group_sums import beside
from fisher_jax.uses.trees import check_alike, check_not_negative, named_leaves

Tree = Any
_TINY = 2.0**-64


def merge_params(
    params_list: Sequence[Tree], fishers: Sequence[Any], *, scales: Sequence[float] | None = None, floor: float = 0.0
) -> Tree:
    """``sum_i c_i F_i p_i / sum_i c_i F_i``, parameter by parameter: the mode of the product of the models' Laplace
    posteriors with diagonal precision.

    - Fishers are per weighted token, so texts of different length count alike; ``scales=`` (such as token counts)
      changes that.
    - A group sum (row, column, tensor) weights every parameter of its group: sizes of groups cancel.
    - Ratios are kept down to the smallest float32, 1.4e-45, also on devices that flush numbers below 1.2e-38 to zero.
    - Where all Fishers are zero it is ``sum_i c_i p_i / sum_i c_i``, the plain mean. Where some are, the others
      decide alone, even with a tiny Fisher; ``floor`` softens that.

    Equal parameters come back bit for bit, and so does model ``i`` where the others' weights are zero.

    Args:
        params_list: trees of floating arrays, alike in shapes and dtypes.
        fishers: one for each model: a tree like its parameters, of their shapes or of sums over groups (see
            `fj.per_parameter`); or a Welford state, moments or moving average, whose mean is taken.
        scales: ``c_i``, not negative; ``None``: all 1.
        floor: each ``F_i`` is raised to at least this share of its mean over the tensor.

    Returns:
        A tree like the first, in its dtypes; computed in at least float32. Works under ``jit``, where a negative
        Fisher gives NaN.

    Raises:
        ValueError: no model, another number of Fishers or scales, trees or shapes that differ, a parameter that is
            not floating, a negative Fisher, scale or floor.

    See Matena and Raffel (2022), Merging models with Fisher-weighted averaging, eq. 4.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> one, two = {"w": jnp.array([1.0, 1.0, 1.0])}, {"w": jnp.array([5.0, 5.0, 5.0])}
        >>> fishers = [{"w": jnp.array([3.0, 0.0, 0.0])}, {"w": jnp.array([1.0, 2.0, 0.0])}]
        >>> fj.merge_params([one, two], fishers)["w"].tolist()
        [2.0, 5.0, 3.0]
    """
    counts = scales_of(params_list, scales)
    weights = _weights(params_list, fishers, counts, floor)
    leaves = [jax.tree.leaves(params) for params in params_list]
    merged = [
        weighted_mean([wide(x[i]) for x in leaves], [w[i] for w in weights], counts).astype(jnp.result_type(first))
        for i, first in enumerate(leaves[0])
    ]
    return jax.tree.unflatten(jax.tree.structure(params_list[0]), merged)


def merge_task_vectors(
    base: Tree,
    params_list: Sequence[Tree],
    fishers: Sequence[Any],
    *,
    scale: float = 1.0,
    scales: Sequence[float] | None = None,
    floor: float = 0.0,
) -> Tree:
    """``base + scale * sum_i c_i F_i (p_i - base) / sum_i c_i F_i``: Fisher-weighted task arithmetic.

    With ``scale=1`` the same as `merge_params`, up to rounding; a larger one goes further along the tasks, -1 takes
    them away. ``scale`` equal to the number of models makes equally weighted tasks add up as in task arithmetic. Zero
    Fishers and floors are treated as in `merge_params`.

    Args:
        base: the tree that all models were fine-tuned from.
        params_list, fishers, scales, floor: as in `merge_params`.
        scale: of the merged task vector.

    Returns:
        A tree like ``base``, in its dtypes.

    Raises:
        ValueError: as `merge_params`.

    See Ilharco et al. (2023), Editing models with task arithmetic.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> base, one, two = ({"w": jnp.array([x, 1.0])} for x in (1.0, 2.0, 4.0))
        >>> fishers = [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([3.0, 1.0])}]
        >>> fj.continual.merge_task_vectors(base, [one, two], fishers)["w"].tolist()
        [3.5, 1.0]
    """
    counts = scales_of(params_list, scales)
    weights = _weights(params_list, fishers, counts, floor)
    check_alike(base, params_list[0], "the base", "model 0")
    starts, treedef = jax.tree.flatten(base)
    leaves = [jax.tree.leaves(params) for params in params_list]
    merged = []
    for i, start in enumerate(starts):
        task = weighted_mean([wide(x[i]) - wide(start) for x in leaves], [w[i] for w in weights], counts)
        merged.append((wide(start) + scale * task).astype(jnp.result_type(start)))
    return jax.tree.unflatten(treedef, merged)


def weighted_mean(
    values: list[Float[Array, "*shape"]], weights: list[Float[Array, "..."]], scales: list
) -> Float[Array, "*shape"]:
    """``sum w v / sum w``, or ``sum c v / sum c`` where all weights are zero.

    As a running mean, which moves by nothing where values are equal or a weight is zero, and where only one weight is
    positive takes over its value as it is.
    """
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    weights = [jnp.where(total == 0, jnp.asarray(c, w.dtype), w) for c, w in zip(scales, weights, strict=True)]
    mean, seen = values[0], weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        seen = seen + weight
        share = jnp.where(seen == 0, 0, weight / jnp.where(seen == 0, 1, seen)).astype(mean.dtype)
        mean = jnp.where(share == 1, value, mean + (value - mean) * share)
    return mean


def scales_of(params_list: Sequence[Tree], scales: Sequence[float] | None) -> list:
    """``c_i`` of models that can be merged."""
    check_models(params_list)
    if scales is None:
        return [1.0] * len(params_list)
    if len(scales) != len(params_list):
        raise ValueError(f"{len(params_list)} models need as many scales, found {len(scales)}")
    known = [x for x in scales if not is_traced(x)]
    for i, scale in enumerate(known):
        if not 0 <= scale < float("inf"):
            raise ValueError(f"scale {i} is {scale}; scales are not negative")
    if len(known) == len(scales) and not any(known):
        raise ValueError("all scales are zero: no model would count")
    return list(scales)


def _weights(params_list: Sequence[Tree], fishers: Sequence[Any], scales: list, floor: float) -> list[list[Array]]:
    """Weights of every leaf of every model, beside its axes."""
    if len(fishers) != len(params_list):
        raise ValueError(f"{len(params_list)} models need as many Fishers, found {len(fishers)}")
    if not 0 <= floor < float("inf"):
        raise ValueError(f"floor is a share of the mean Fisher, not negative, found {floor}")
    models = zip(params_list, map(reading.mean, fishers), strict=True)
    found = [_of_one(params, fisher, i) for i, (params, fisher) in enumerate(models)]
    by_leaf = [_weights_of_leaf(list(leaf), scales, floor) for leaf in zip(*found, strict=True)]
    return [list(model) for model in zip(*by_leaf, strict=True)]


def check_models(params_list: Sequence[Tree]) -> None:
    """Raise unless there are models, of floating parameters, alike in trees, shapes and dtypes."""
    if not params_list:
        raise ValueError("there is no model to merge")
    first = named_leaves(params_list[0])
    for name, x in first:
        check_not_complex(name, x)
        if not is_floating(x):
            raise ValueError(f"{name} has dtype {jnp.result_type(x)}; only floating parameters can be merged")
    for i, params in enumerate(params_list[1:], 1):
        check_alike(params_list[0], params, "model 0", f"model {i}")
        for (name, x), y in zip(first, jax.tree.leaves(params), strict=True):
            if jnp.result_type(x) != jnp.result_type(y):
                raise ValueError(
                    f"{name} has dtype {jnp.result_type(x)} in model 0 and {jnp.result_type(y)} in model {i}"
                )


def _of_one(params: Tree, fisher: Tree, number: int) -> list[Array]:
    what = f"the Fisher of model {number}"
    check_alike(params, fisher, f"model {number}", what, shapes=False)
    check_not_negative(fisher, what)
    out = []
    for (name, value), param in zip(named_leaves(fisher), jax.tree.leaves(params), strict=True):
        full, _ = beside(wide(value), jnp.shape(param), name, what)
        out.append(jnp.where(full < 0, jnp.nan, full))
    return out


def _weights_of_leaf(fishers: list[Array], scales: list, floor: float) -> list[Array]:
    """Weights of one leaf of every model, all times the same power of two where all of them are tiny."""

    def raised(lift: Callable[..., Array]) -> list[Array]:
        return [jnp.maximum(lift(f), jnp.mean(lift(f, floor))) if floor else lift(f) for f in fishers]

    as_they_are, lifted = raised(lambda f, by=1.0: f * by), raised(_lifted)
    tiny = functools.reduce(jnp.logical_and, [w < _TINY for w in as_they_are])
    return [jnp.where(tiny, a, b) * c for a, b, c in zip(lifted, as_they_are, scales, strict=True)]


def _lifted(x: Array, by: float = 1.0) -> Array:
    """``2**64 by x``, also of numbers below 2**-126, which devices take for 0 in their arithmetic."""
    normal = jnp.where(x < 1, x * 2.0**64 * by, x * by * 2.0**64)
    if x.dtype != jnp.float32:
        return normal
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    # Such a number is its bits times 2**-149.
    return jnp.where((bits > 0) & (bits < 1 << 23), bits.astype(x.dtype) * 2.0 ** (64 - 149) * by, normal)


def shrunk_mean(state: Any) -> Tree:
    """Mean importance of each group, drawn towards that of its tensor by as much as it is uncertain.

    On the logarithm, since importance spans decades. With ``y_g = log mean_g`` and its error to first order,
    ``r_g = se_g / mean_g``: ``y_g -> ybar + (y_g - ybar) tau**2 / (tau**2 + r_g**2)``, where ``ybar`` is the average
    of ``y`` over the leaf and ``tau**2 = max(0, var(y) - mean(r**2))`` what of its spread is not error. A group that
    one document decides (``r = 1``) hardly weighs by itself; one that is well known stays as it is. A mean of zero
    stays zero: use it with a ``floor``.

    Args:
        state: a Welford state or moments (for text the unit is the document). Works under ``jit``.

    Returns:
        A tree of the statistic's shapes, at least float32; weights for `merge_params`. NaN for fewer than two
        observations; a leaf of one group stays as it is.

    See Efron and Morris (1975), Data analysis using Stein's estimator.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> scores = jnp.array([[1.0, 9.0, 0.0, 4.0], [1.1, 0.0, 0.0, 4.4], [0.9, 0.0, 0.0, 3.6]])
        >>> [round(float(x), 2) for x in fj.stats.shrunk_mean(fj.welford.observe(scores, unit="sequence"))]
        [1.01, 2.39, 0.0, 3.96]
    """
    return jax.tree.map(_shrunk, reading.mean(state), reading.standard_error(state))


def _shrunk(mean: Array, error: Array) -> Array:
    present = mean > 0
    safe = jnp.where(present, mean, 1)
    log, relative = jnp.log(safe), jnp.where(present, error / safe, 0) ** 2
    number = jnp.sum(present, dtype=mean.dtype)
    average = functools.partial(_average, present=present, number=number)
    centre = average(log)
    spread = average((log - centre) ** 2) * number / jnp.maximum(number - 1, 1)
    real = jnp.maximum(spread - average(relative), 0)
    share = jnp.where(relative == 0, 1, real / jnp.where(relative == 0, 1, real + relative))
    shrunk = jnp.where(share == 1, mean, jnp.exp(centre + (log - centre) * share))
    return jnp.where(present, jnp.where(number > 1, shrunk, mean), jnp.where(jnp.isnan(error), jnp.nan, 0))


def _average(x: Array, present: Array, number: Array) -> Array:
    return jnp.sum(jnp.where(present, x, 0)) / jnp.maximum(number, 1)

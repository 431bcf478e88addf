"""What any state says of the Fisher information: its mean, the standard error of the mean, an interval."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fisher_jax import welford
from fisher_jax._support.dtypes import is_floating
from fisher_jax.moving_average import MovingAverage
from fisher_jax.welford.state import state_in


def mean(fisher: Any) -> PyTree:
    """The mean Fisher of each group per weighted token, ``sum_u w_u f_u / sum_u w_u``, whatever holds it.

    Args:
        fisher: a Welford state, moments, a moving average, an optax state that holds one of them
            (`fj.track_fisher`, also inside a chain), or a tree of Fisher values, which is returned as it is.

    Returns:
        A tree of the statistic's shapes, at least float32. Zero where nothing was observed. Works under ``jit``.

    Raises:
        ValueError: an optax state that holds several.
        TypeError: another state of this library (of K-FAC, of block spectra), or what is no array of real numbers.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([1.0, 5.0]), jnp.array([3.0, 1.0]))
        >>> recent = fj.moving_average.add(fj.moving_average.init(moments, decay=0.9), moments)
        >>> float(fj.mean(moments)), float(fj.mean(recent)), fj.mean({"w": 2.0})
        (2.0, 2.0, {'w': 2.0})
    """
    found = state_in(fisher, welford.State, welford.Moments, MovingAverage)
    if found is None:
        _check_values(fisher)
        return fisher
    return found.average if isinstance(found, MovingAverage) else welford.mean(found)


def _check_values(tree: Any) -> None:
    """Raise for what is no tree of Fisher values."""

    def is_ours(x: Any) -> bool:
        return type(x).__module__.startswith("fisher_jax.")

    wanted = "a Welford state, moments, a moving average, an optax state that holds one, or a tree of Fisher values"
    for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_ours):
        if is_ours(x):
            raise TypeError(f"expected {wanted}; a {type(x).__name__} holds none")
        where = jax.tree_util.keystr(path) or "all of it"
        if not hasattr(x, "dtype") and not isinstance(x, float | int):
            raise TypeError(f"expected {wanted}; {where} is of type {type(x).__name__}")
        if not isinstance(x, int | float) and not is_floating(x):
            raise TypeError(f"expected {wanted}, which are floating; {where} has dtype {jnp.result_type(x)}")


def standard_error(fisher: Any) -> PyTree:
    """The standard error of `fj.mean`, ``se**2 = n / (n - 1) * sum_u w_u**2 (f_u - mean)**2 / W**2``.

    Args:
        fisher: a Welford state, moments, or an optax state that holds one.

    Returns:
        A tree of the statistic's shapes, at least float32. NaN for fewer than two observations. Works under ``jit``.

    Raises:
        TypeError: a moving average or a tree of values, which keep no record of the spread of observations.
        ValueError: a state that has dropped the sums for it (``fj.welford.plain``); an optax state with several.

    See `fj.welford.standard_error`.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> float(fj.standard_error(fj.welford.observe(jnp.array([1.0, 3.0]), unit="sequence")))
        1.0
    """
    return welford.standard_error(_with_errors(fisher))


def interval(fisher: Any, level: float = 0.95) -> tuple[PyTree, PyTree]:
    """``mean -+ t * standard_error`` with Student's t quantile at ``n - 1`` degrees of freedom, on the host.

    For a corpus the unit of observation should be the document: tokens of a sequence, and sequences of a document,
    are correlated, and intervals from them are too narrow.

    Args:
        fisher: as in `fj.standard_error`.
        level: of confidence, in (0, 1).

    Returns:
        ``(lower, upper)``: trees of float64 NumPy arrays. The lower end can be negative: it is not clipped.

    Raises:
        TypeError, ValueError: as `fj.standard_error`; a level outside (0, 1).

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> lower, upper = fj.interval(fj.welford.observe(jnp.array([1.0, 2.0, 6.0])))
        >>> round(float(lower), 3), round(float(upper), 3)
        (-3.572, 9.572)
    """
    return welford.interval(_with_errors(fisher), level)


def _with_errors(fisher: Any) -> welford.State | welford.Moments:
    found = state_in(fisher, welford.State, welford.Moments, MovingAverage)
    if isinstance(found, welford.State | welford.Moments):
        return found
    if found is None:
        _check_values(fisher)
    what = "a moving average" if isinstance(found, MovingAverage) else f"a tree of values ({type(fisher).__name__})"
    raise TypeError(
        f"{what} keeps no record of the spread of its observations, so its error is not known; accumulate a Welford "
        f"state, as the estimators do by themselves, or moments"
    )

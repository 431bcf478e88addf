"""What a state says: mean, variance, standard error, intervals and counts."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fisher_jax._support import compensated
from fisher_jax.welford.accumulation import closed

Tree = Any  # a pytree of arrays
Readable = Any  # a State, Moments, or a tree that holds one of them, such as an optimizer's state


def _unscaled(tree: Tree, exponent: int) -> Tree:
    return jax.tree.map(lambda x: x * jnp.asarray(2.0**-exponent, x.dtype), tree)


def mean(x: Readable) -> Tree:
    """``sum_u w_u f_u / sum_u w_u``, per weighted token: a tree of the statistic's shapes, at least float32.

    Zero where nothing was observed. An unfinished document counts with what it has. NaN of moments whose batch cannot
    be used; `fisher_jax.check` says why.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> float(fj.welford.mean(fj.welford.observe(jnp.array([1.0, 5.0]), jnp.array([3.0, 1.0]))))
        2.0
    """
    state = closed(x)
    return _unscaled(jax.tree.map(compensated.value, state.mean), state.scale)


def variance(x: Readable, weighting: str | None = None) -> Tree:
    """Variance of one observation.

    ``weighting="frequency"``: ``m2 / (W - 1)``, right only when the unit is the token.
    ``weighting="reliability"``: ``m2 / (W - sum w**2 / W)``, for weighted units whose variance does not depend
    on their weight. ``None``: the first for tokens, the second for other units. NaN where it is not defined (one
    observation).
    This is a spread, not the error of the mean (`standard_error`).

    Raises:
        ValueError: another weighting, or ``frequency`` for a unit that is not the token.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> float(fj.welford.variance(fj.welford.observe(jnp.array([1.0, 2.0, 6.0]))))
        7.0
    """
    state = closed(x)
    weighting = weighting or ("frequency" if state.unit == "token" else "reliability")
    total = compensated.value(state.weight)
    if weighting == "frequency":
        if state.unit != "token":
            raise ValueError(
                f"weighting='frequency' counts tokens; the unit is {state.unit!r}: use weighting='reliability'"
            )
        freedom = total - 1
    elif weighting == "reliability":
        freedom = total - compensated.value(state.weight_sq) / jnp.where(total > 0, total, 1)
    else:
        raise ValueError(f"weighting is 'frequency' or 'reliability', found {weighting!r}")
    freedom = jnp.where(freedom > 0, freedom, jnp.nan)
    # Divided before the scale is removed: the quotient is the larger number.
    scaled = jax.tree.map(lambda m2: jnp.maximum(compensated.value(m2), 0) / freedom.astype(m2.dtype), state.m2)
    return _unscaled(scaled, 2 * state.scale)


def standard_error(x: Readable) -> Tree:
    """Standard error of the mean for units of unequal weight.

    ``se**2 = n / (n - 1) * sum_u w_u**2 (f_u - mean)**2 / W**2`` over ``n`` observations (the linearised ratio
    estimator, Cochran, Sampling Techniques, 6.3). NaN for fewer than two.

    Raises:
        ValueError: a state that has dropped the sums for it (`plain`).

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([1.0, 3.0]), jnp.array([10.0, 10.0]), unit="sequence")
        >>> float(fj.welford.standard_error(moments))
        1.0
    """
    state = closed(x)
    if not state.errors:
        raise ValueError(
            "this state keeps no sums for standard errors: it was made by fj.welford.plain(standard_errors=False)"
        )
    total, total_sq, n = (compensated.value(v) for v in (state.weight, state.weight_sq, state.count))
    factor = jnp.where(n > 1, n / jnp.where(n > 1, n - 1, 1), jnp.nan)
    safe = jnp.where(total > 0, total, 1)

    def leaf(mean, m2, square_mean, square_m2):
        shift = sum(compensated.two_difference(mean, square_mean))
        squares = compensated.value(square_m2) + total_sq.astype(mean.dtype) * shift * shift
        return jnp.sqrt(factor.astype(mean.dtype) * jnp.maximum(squares, 0)) / safe.astype(mean.dtype)

    squares = (state.mean, state.m2) if state.square_mean is None else (state.square_mean, state.square_m2)
    return _unscaled(jax.tree.map(leaf, state.mean, state.m2, *squares), state.scale)


def interval(x: Readable, level: float = 0.95) -> tuple[Tree, Tree]:
    """``mean -+ t * standard_error`` with Student's t quantile at ``n - 1`` degrees of freedom, on the host.

    Meant for a corpus, the unit is the document: tokens of a sequence, and sequences of a document, are correlated,
    and intervals from them are too narrow.

    Returns:
        ``(lower, upper)``: trees of float64 NumPy arrays. The lower end can be negative: it is not clipped.

    Raises:
        ValueError: a level outside (0, 1).

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> lower, upper = fj.welford.interval(fj.welford.observe(jnp.array([1.0, 2.0, 6.0])))
        >>> round(float(lower), 3), round(float(upper), 3)
        (-3.572, 9.572)
    """
    if not isinstance(level, numbers.Real) or not 0 < level < 1:
        raise ValueError(f"level is a probability between 0 and 1, found {level!r}")
    import scipy.stats  # slow to import, and wanted here only

    n = count(x)
    quantile = scipy.stats.t.ppf(0.5 + level / 2, n - 1) if n > 1 else np.nan
    centre = jax.tree.map(lambda v: np.asarray(v, np.float64), mean(x))
    half = jax.tree.map(lambda v: quantile * np.asarray(v, np.float64), standard_error(x))
    return jax.tree.map(np.subtract, centre, half), jax.tree.map(np.add, centre, half)


def spread(x: Readable, num_std: float = 1.96) -> tuple[Tree, Tree]:
    """``mean -+ num_std * std``: where single observations lie. Not a confidence interval of the mean.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> lower, upper = fj.welford.spread(fj.welford.observe(jnp.array([1.0, 3.0])), num_std=1.0)
        >>> round(float(lower), 3), round(float(upper), 3)
        (0.586, 3.414)
    """
    centre, std = mean(x), jax.tree.map(jnp.sqrt, variance(x))
    return (
        jax.tree.map(lambda c, s: c - num_std * s, centre, std),
        jax.tree.map(lambda c, s: c + num_std * s, centre, std),
    )


def count(x: Readable) -> int:
    """Number of observations with weight, exact, on the host.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> fj.welford.count(fj.welford.observe(jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 0.0, 2.5])))
        2
    """
    return round(float(np.asarray(closed(x).count, np.float64).sum()))


def total_weight(x: Readable) -> Float[Array, ""]:
    """``sum w`` as a scalar array, also inside ``jit``.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 0.0, 2.5]))
        >>> jax.jit(fj.welford.total_weight)(moments).item()
        3.5
    """
    return compensated.value(closed(x).weight)


def weight(x: Readable) -> float:
    """``sum w``: the number of weighted tokens, exact up to 2**48, on the host.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> fj.welford.weight(fj.welford.observe(jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 0.0, 2.5])))
        3.5
    """
    return float(np.asarray(closed(x).weight, np.float64).sum())

"""How well is the importance of a group known, and how much more text would it take?"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support.outline import outline
from fisher_jax.uses import reading
from fisher_jax.welford.per_group import effective, observed, on_tree

Tree = Any


class DataNeeded(NamedTuple):
    """How much more must be observed.

    Attributes:
        units: a tree of further observations of the state's unit (documents, ...); 0 where it is enough already,
            infinite where no amount is known to be.
        tokens: the same in weighted tokens, at the mean weight of an observation so far.
    """

    units: Tree
    tokens: Tree

    def __repr__(self) -> str:
        return outline(self)


def signal_to_noise(x: Any) -> Tree:
    """Importance over its standard error, ``mean / standard_error``: how sure it is that a group matters at all.

    Ranks groups by evidence instead of size. For scores that are zero but for ``k`` of ``n`` observations it is about
    ``sqrt(k)``, whatever their size.

    Args:
        x: a Welford state, moments, or an optax state that keeps one. Works under ``jit``.

    Returns:
        A tree of the statistic's shapes and dtypes; 0 where the mean is 0, infinite where all observations are equal,
        NaN for fewer than two.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
        >>> fj.stats.signal_to_noise(moments).tolist()
        [2.0, 0.0]
    """

    def ratio(mean, error):
        quotient = jnp.where(error == 0, jnp.inf, mean / jnp.where(error == 0, 1, error))
        return jnp.where((mean == 0) & ~jnp.isnan(error), 0, quotient)

    return jax.tree.map(ratio, reading.mean(x), reading.standard_error(x))


def effective_count(x: Any) -> Tree:
    """How many observations carry the mean of each group: ``(sum_u w_u f_u)**2 / sum_u (w_u f_u)**2``.

    Of equal weights it is exactly that, computed from the standard error:
    ``1 / n_eff = (n - 1) / n * (se / mean)**2 + sum w**2 / W**2``. A row that a single document decides has 1, one
    that all of ``n`` equal documents share has ``n``. Of unequal weights the same formula, in which documents count
    as ``W**2 / sum w**2`` (Kish 1965).

    Args:
        x: a Welford state, moments, or an optax state that keeps one.

    Returns:
        A tree of float64 NumPy arrays, on the host; 0 where the mean is 0.

    Raises:
        ValueError: fewer than two observations.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([[1.0, 7.0], [1.0, 0.0], [1.0, 0.0]]))
        >>> fj.stats.effective_count(moments).round(5).tolist()
        [3.0, 1.0]
    """
    seen = observed(x)
    return on_tree(effective(seen), seen)


def data_needed(
    x: Any, *, width: float | None = None, relative_width: float | None = None, level: float = 0.95
) -> DataNeeded:
    """How much more text makes the confidence interval of each group as narrow as wanted.

    The smallest ``n'`` with ``2 t(n' - 1) s / sqrt(n') <= width``, where ``s**2 = n se**2`` is what one observation
    contributes; less the ``n`` there are. It takes further observations to be like those seen: for a group with a
    small `effective_count` the answer is as rough as its interval.

    Args:
        x: a Welford state or moments; the unit of observation is that of the answer.
        width: of the interval, upper minus lower end, in units of the statistic.
        relative_width: the same as a share of each group's mean; give one of the two.
        level: of confidence.

    Returns:
        `DataNeeded`: trees of float64 NumPy arrays, whole numbers of observations, and tokens.

    Raises:
        ValueError: fewer than two observations, a width that is not positive, both widths or none, a level outside
            (0, 1).

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> moments = fj.welford.observe(jnp.array([1.0, 2.0, 6.0]), jnp.array([50.0, 50.0, 50.0]), unit="document",
        ...     units=jnp.arange(3))
        >>> needed = fj.stats.data_needed(moments, width=3.0)
        >>> needed.units.tolist(), needed.tokens.tolist()
        (12.0, 600.0)
    """
    import scipy.stats  # slow to import, and wanted here only

    if not 0 < level < 1:
        raise ValueError(f"level is a probability between 0 and 1, found {level}")
    if (width is None) == (relative_width is None):
        raise ValueError("give one of width= and relative_width=")
    wanted = width if width is not None else relative_width
    if wanted is None or not (wanted > 0 and math.isfinite(wanted)):
        raise ValueError(f"the width of an interval is positive, found {wanted}")
    seen = observed(x)
    scale = np.ones_like(seen.mean) if width is not None else np.abs(seen.mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = 2 * seen.error * np.sqrt(seen.size) / (wanted * scale)
    possible = np.isfinite(spread) & (seen.resolved | (seen.error > 0))

    def enough(n):
        return scipy.stats.t.ppf(0.5 + level / 2, n - 1) * spread[possible] <= np.sqrt(n)

    low = np.full(int(possible.sum()), 1.0)  # never enough: one observation has no interval
    high = np.maximum(2.0, np.ceil((scipy.stats.t.ppf(0.5 + level / 2, 1) * spread[possible]) ** 2))
    # Above 2**52 whole numbers are further apart than 1 in float64.
    while (high - low > np.maximum(1, 1e-14 * high)).any():
        middle = np.maximum(np.floor((low + high) / 2), 2.0)
        good = enough(middle)
        low, high = np.where(good, low, middle), np.where(good, middle, high)
        low = np.where(high == 2, 1.0, low)
    units = np.full_like(seen.mean, np.inf)
    units[possible] = np.maximum(high - seen.size, 0)
    return DataNeeded(on_tree(units, seen), on_tree(units * (seen.weight / seen.size), seen))

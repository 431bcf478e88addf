"""Many tests at once: adjusted p values that bound the share, or the chance, of false claims."""

from typing import Any

import jax
import numpy as np

from fisher_jax.uses.trees import named_leaves

Tree = Any


def q_values(p: Tree, method: str = "bh") -> Tree:
    """Adjusted p values: claiming all groups with ``q <= a`` has a false discovery rate of at most ``a``.

    ``q_(i) = min_{j >= i} c m p_(j) / j`` over the ``m`` sorted p values of the whole tree; NaN (a group that could
    not be tested) stays NaN and is not counted.

    Args:
        p: a tree of arrays of p values.
        method: ``"bh"``, Benjamini and Hochberg (1995), ``c = 1``: for tests that are independent or positively
            dependent, as groups measured on the same documents tend to be. ``"by"``, Benjamini and Yekutieli (2001),
            ``c = sum_{i<=m} 1/i``: whatever the dependence.

    Returns:
        A tree like ``p`` of float64 NumPy arrays; what ``scipy.stats.false_discovery_control`` gives.

    Raises:
        ValueError: p values outside [0, 1], an unknown method.

    Example:
        >>> import fisher_jax as fj, numpy as np
        >>> fj.stats.q_values(np.array([0.01, 0.5, np.nan, 0.02])).tolist()
        [0.03, 0.5, nan, 0.03]
    """
    if method not in ("bh", "by"):
        raise ValueError(f"method is 'bh' or 'by', found {method!r}")

    def adjust(ascending):
        ranks = np.arange(1, len(ascending) + 1)
        factor = np.sum(1 / ranks) if method == "by" else 1.0
        scaled = ascending * (len(ascending) * factor) / ranks
        return np.minimum.accumulate(scaled[::-1])[::-1]

    return _adjusted(p, adjust)


def holm(p: Tree) -> Tree:
    """Adjusted p values: claiming all groups with ``holm(p) <= a`` errs anywhere with probability at most ``a``.

    ``max_{j <= i} (m - j + 1) p_(j)`` over the sorted p values of the whole tree, whatever their dependence (Holm
    1979). NaN stays NaN and is not counted.

    Args:
        p: a tree of arrays of p values.

    Returns:
        A tree like ``p`` of float64 NumPy arrays.

    Raises:
        ValueError: p values outside [0, 1].

    Example:
        >>> import fisher_jax as fj, numpy as np
        >>> fj.stats.holm(np.array([0.01, 0.5, np.nan, 0.02])).tolist()
        [0.03, 0.5, nan, 0.04]
    """

    def adjust(ascending):
        return np.maximum.accumulate(ascending * np.arange(len(ascending), 0, -1))

    return _adjusted(p, adjust)


def _adjusted(p: Tree, adjust: Any) -> Tree:
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(p)]
    for name, x in named_leaves(p):
        x = np.asarray(x, np.float64)
        if ((x < 0) | (x > 1)).any():
            worst = x[(x < 0) | (x > 1)].flat[0]
            raise ValueError(f"{name} has the entry {worst:.3g}; p values are in [0, 1], NaN where not tested")
    flat = np.concatenate([x.ravel() for x in leaves]) if leaves else np.zeros(0)
    tested = np.flatnonzero(~np.isnan(flat))
    order = tested[np.argsort(flat[tested], kind="stable")]
    out = np.full_like(flat, np.nan)
    out[order] = np.minimum(adjust(flat[order]), 1.0)
    parts = np.split(out, np.cumsum([x.size for x in leaves]))[: len(leaves)]  # of no leaves no part
    return jax.tree.unflatten(
        jax.tree.structure(p), [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
    )

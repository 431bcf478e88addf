"""Which groups lie above or below a threshold, with a stated chance of error; pruning only what surely lies below."""

from typing import Any, NamedTuple

import jax
import numpy as np

from fisher_jax._support.outline import outline
from fisher_jax.uses.many_tests import holm, q_values
from fisher_jax.welford.per_group import Observed, effective, observed, on_tree

Tree = Any


class Decisions(NamedTuple):
    """Every group against a threshold; trees of NumPy arrays.

    Attributes:
        verdict: int8, 1 above, -1 below, 0 not known.
        p: the chance of such evidence for the nearest mean on the other side; NaN where nothing can be said.
        adjusted: the same for many groups at once, by the method of control.
    """

    verdict: Tree
    p: Tree
    adjusted: Tree

    def __repr__(self) -> str:
        return outline(self)


class CautiousPruning(NamedTuple):
    """What `prune_below` keeps.

    Attributes:
        mask: a tree of booleans, true where kept.
        p, adjusted: as in `Decisions`, of the claim that the group lies below.
        num_pruned, num_unsure: groups pruned; groups whose mean is below the threshold, but not surely.
    """

    mask: Tree
    p: Tree
    adjusted: Tree
    num_pruned: int
    num_unsure: int

    def __repr__(self) -> str:
        return outline(self)


def decide(x: Any, threshold: float, *, level: float = 0.95, control: str = "holm", side: str = "both") -> Decisions:
    """Which groups' mean importance lies above or below ``threshold``.

    With ``m`` the mean of a group and ``se`` its standard error:

    - above: ``p = P(T > (m - threshold) / se)``, Student's t at ``n - 1`` degrees of freedom.
    - below: ``p = P(T > (1 - m / threshold) m / se)`` at ``n_eff - 1``: the error that the mean would have at the
      threshold with the same coefficient of variation. Importance is heavy-tailed: a group whose few large
      observations have not been met looks small *and* certain. The usual t test then claims "below" falsely up to 300
      times as often as it says (at 0.001); this one kept its level to within 1.2 in all of our simulations of bursty,
      log-normal scores. It cannot claim anything of a group that was never seen, or of fewer than a few effective
      observations. ``n`` is Kish's ``W**2 / sum w**2``, ``n_eff`` is `fj.stats.effective_count`.

    Args:
        x: a Welford state or moments; for text the unit is the document.
        threshold: positive, in units of the statistic. It counts as given: a threshold that was read off the same
            data (a quantile) adds its own error.
        level: 1 - the error that is allowed.
        control: ``"holm"``: the chance of any false claim; ``"bh"``: the expected share of false claims; ``"none"``:
            of each claim by itself.
        side: ``"both"`` (p values are doubled), ``"below"`` or ``"above"`` alone.

    Returns:
        `Decisions`.

    Raises:
        ValueError: a threshold that is not positive, a level outside (0, 1), an unknown control or side, fewer than
            two observations.

    See Shaffer (1980) for the direction of claims; `fj.stats.holm`, `fj.stats.q_values`.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> scores = jnp.array([[0.5, 9.0, 1.0], [0.6, 8.0, 3.0], [0.55, 10.0, 2.0], [0.45, 9.0, 0.5]])
        >>> fj.stats.decide(fj.welford.observe(scores, unit="sequence"), threshold=2.0).verdict.tolist()
        [-1, 1, 0]
    """
    seen, p, sign = _evidence(x, threshold, level, control, side)
    adjusted = {"holm": holm, "bh": q_values, "none": lambda p: p}[control](p)
    verdict = np.where(adjusted <= 1 - level, sign, 0).astype(np.int8)
    return Decisions(on_tree(verdict, seen), on_tree(p, seen), on_tree(adjusted, seen))


def _evidence(
    x: Any, threshold: float, level: float, control: str, side: str
) -> tuple[Observed, np.ndarray, np.ndarray]:
    """P values of the side that each mean lies on, and that side."""
    if not 0 < level < 1:
        raise ValueError(f"level is a probability between 0 and 1, found {level}")
    if not 0 < threshold < np.inf:
        raise ValueError(f"threshold is a positive mean importance, found {threshold}")
    if control not in ("holm", "bh", "none"):
        raise ValueError(f"control is 'holm', 'bh' or 'none', found {control!r}")
    if side not in ("both", "below", "above"):
        raise ValueError(f"side is 'both', 'below' or 'above', found {side!r}")
    seen = observed(x)
    above, below = _p_above(seen, threshold), _p_below(seen, threshold)
    if side != "both":
        p = above if side == "above" else below
        return seen, p, np.full(p.shape, 1 if side == "above" else -1)
    is_above = seen.mean > threshold
    return seen, np.minimum(2 * np.where(is_above, above, below), 1), np.where(is_above, 1, -1)


def _p_above(seen: Observed, threshold: float) -> np.ndarray:
    import scipy.stats  # slow to import

    with np.errstate(divide="ignore", invalid="ignore"):
        t = (seen.mean - threshold) / seen.error
        p = scipy.stats.t.sf(t, max(seen.units - 1, 1e-6))
    return np.where(seen.resolved & (seen.error > 0), p, np.nan)


def _p_below(seen: Observed, threshold: float) -> np.ndarray:
    import scipy.stats

    freedom = np.minimum(effective(seen), seen.units) - 1
    known = seen.resolved & (seen.error > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (1 - seen.mean / threshold) * seen.mean / seen.error
        p = np.where(freedom > 0, scipy.stats.t.sf(t, np.maximum(freedom, 1e-6)), 1.0)
    return np.where(known, np.where(seen.mean < threshold, p, 1.0), np.nan)


def prune_below(x: Any, threshold: float, *, level: float = 0.95, control: str = "holm") -> CautiousPruning:
    """Prune the groups whose importance surely lies below ``threshold``; keep the others, and what is not known.

    ``mask = not (adjusted p of "below" <= 1 - level)``, see `fj.stats.decide` for the test. With ``control="holm"``
    the chance that any pruned group really lies above the threshold is at most ``1 - level``; with ``"bh"`` the
    expected share of such groups among the pruned. Groups that were never seen are kept.

    Args:
        x, threshold, level, control: as in `fj.stats.decide`.

    Returns:
        `CautiousPruning`, whose ``mask`` `fj.stats.apply_mask` takes.

    Raises:
        ValueError: as `fj.stats.decide`.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> scores = jnp.array([[0.5, 9.0, 1.0], [0.6, 8.0, 3.0], [0.55, 10.0, 2.0], [0.45, 9.0, 0.5]])
        >>> found = fj.stats.prune_below(fj.welford.observe(scores, unit="sequence"), threshold=2.0)
        >>> found.mask.tolist(), found.num_pruned, found.num_unsure
        ([False, True, True], 1, 1)
    """
    found = decide(x, threshold, level=level, control=control, side="below")
    mask = jax.tree.map(lambda verdict: verdict != -1, found.verdict)
    means = jax.tree.leaves(on_tree((seen := observed(x)).mean, seen))
    masks = jax.tree.leaves(mask)
    pruned = sum(int((~m).sum()) for m in masks)
    unsure = sum(int((m & (mean < threshold)).sum()) for m, mean in zip(masks, means, strict=True))
    return CautiousPruning(mask, found.p, found.adjusted, pruned, unsure)

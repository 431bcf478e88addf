"""What a Welford state says of each group, on the host in float64: the common ground of every test."""

from typing import Any, NamedTuple

import jax
import numpy as np

from fisher_jax import welford
from fisher_jax.welford.moments import Moments
from fisher_jax.welford.state import state_in

Tree = Any


class Observed(NamedTuple):
    """Means of all groups, one after the other.

    Attributes:
        mean, error: ``[G]``, weighted mean and its standard error.
        resolved: ``[G]``, whether squares of such values are above the underflow of the state's dtype.
        size: number of observations.
        units: ``W**2 / sum w**2``, the number of equally weighted observations that weigh as evenly (Kish).
        weight: ``W``.
        shapes, treedef: of the tree.
    """

    mean: np.ndarray
    error: np.ndarray
    resolved: np.ndarray
    size: int
    units: float
    weight: float
    shapes: list[tuple[int, ...]]
    treedef: Any


@jax.jit
def _from_moments(moments: Moments) -> welford.State:
    return welford.add(welford.init(moments), moments)


@jax.jit
def _means_and_errors(state: welford.State) -> tuple[Tree, Tree]:
    return welford.mean(state), welford.standard_error(state)


def as_state(x: Any, what: str = "the state") -> welford.State:
    """A Welford state, or moments as one, or the one inside an optax state."""
    found = state_in(x, welford.State, Moments)
    if found is None:
        raise TypeError(f"{what} is a Welford state or moments, which know their errors; found {type(x).__name__}")
    return _from_moments(found) if isinstance(found, Moments) else found


def observed(x: Any, what: str = "the state") -> Observed:
    """Read a state; raise where it has fewer than two observations."""
    state = as_state(x, what)
    count, weight = welford.count(state), welford.weight(state)
    if count < 2:
        raise ValueError(
            f"{what} has {count} observation{'s' * (count != 1)} (unit: {state.unit}); an error of the mean needs "
            f"two or more: observe more data, or a smaller unit"
        )
    weight_sq = float(np.asarray(state.weight_sq, np.float64).sum())
    if state.open is not None:
        weight_sq += float(np.asarray(state.open.weight, np.float64).sum()) ** 2
    means, errors = (jax.tree.leaves(x) for x in _means_and_errors(state))
    limits = np.finfo(means[0].dtype)
    mean, error = _flat(means), _flat(errors)
    resolved = (np.abs(mean) * 2.0**state.scale) ** 2 >= float(limits.tiny) / float(limits.eps)
    shapes = [tuple(x.shape) for x in means]
    return Observed(
        mean, error, resolved, count, weight**2 / weight_sq, weight, shapes, jax.tree.structure(state.mean)
    )


def _flat(leaves: list) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])


def on_tree(values: np.ndarray, like: Observed) -> Tree:
    """``[G]`` back to the tree of groups."""
    sizes = [int(np.prod(shape)) for shape in like.shapes]
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return jax.tree.unflatten(like.treedef, [x.reshape(s) for x, s in zip(parts, like.shapes, strict=True)])


def effective(x: Observed) -> np.ndarray:
    """See `fj.stats.effective_count`, which has the words."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        relative = (x.size - 1) / x.size * (x.error / x.mean) ** 2
        return np.where(x.mean == 0, 0.0, 1 / (relative + 1 / x.units))

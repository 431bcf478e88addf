"""Two measurements of one model side by side: what changed from A to B, and what cannot be told."""

from typing import Any, NamedTuple

import jax
import numpy as np

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax.cli.report.importance import Importance, importance
from fisher_jax.cli.report.layers import FAMILIES, Layers, on_parts, part_sizes, read_layers, several
from fisher_jax.cli.report.task_state import LEVEL, Task, layer_settings
from fisher_jax.models import LanguageModel
from fisher_jax.uses.shift import MIN_EFFECTIVE
from fisher_jax.welford.per_group import effective, observed

# Why a row is not tested.
NEVER = "importance 0"
TINY = "too small for its squares in float32"
FEW = f"fewer than {MIN_EFFECTIVE:g} effective observations"


class Total(NamedTuple):
    """The sum over all rows of the head. Its error is a bound: the sum of the rows' errors, as if all moved together,
    since a state keeps no covariances between rows; so the p value is a bound from above.
    """

    before: float
    after: float
    error: float
    p: float


class RowShift(NamedTuple):
    """Every vocabulary row in both texts, and the difference B minus A; arrays [V]."""

    before: Importance  # in A
    after: Importance  # in B
    shift: fj.shift.Shift
    reason: np.ndarray  # of objects: why a row is not tested, "" where it is
    total: Total

    def changed(self, rate: float) -> np.ndarray:
        """Rows that are discoveries, the largest difference first."""
        rows = np.flatnonzero(self.shift.q < rate)
        return rows[np.argsort(-np.abs(self.shift.difference[rows]), kind="stable")]

    def gained(self, rate: float) -> np.ndarray:
        rows = self.changed(rate)
        return rows[self.shift.difference[rows] > 0]

    def lost(self, rate: float) -> np.ndarray:
        rows = self.changed(rate)
        return rows[self.shift.difference[rows] < 0]


def row_shift(a: Task, b: Task, kind: str) -> RowShift:
    """The shift of one kind of Fisher from A to B.

    Raises:
        InputError: fewer than two documents in one of them, or nothing that could be tested.
    """
    first, second = a.arrays[kind], b.arrays[kind]
    shift = _shift(first, second, a, b)
    before, after = (importance(task.arrays, kind, LEVEL) for task in (a, b))
    pooled = observed(jax.jit(fj.welford.merge)(first, second))
    reason = np.full(len(shift.testable), "", object)
    reason[effective(pooled) < MIN_EFFECTIVE] = FEW
    reason[~pooled.resolved] = TINY
    reason[pooled.mean == 0] = NEVER
    reason[shift.testable] = ""
    return RowShift(before, after, shift, reason, _total(before, after))


def _shift(first: Any, second: Any, a: Task, b: Task) -> fj.shift.Shift:
    """B minus A."""
    for task, state in ((a, first), (b, second)):
        if (count := fj.welford.count(state)) < 2:
            raise InputError(
                f"{task.place} has {count} {state.unit}, and an error of the mean needs two or more; measure more "
                "text, or split it with --split-documents blank-line."
            )
    try:
        return fj.importance_shift(second, first)
    except ValueError as error:
        raise InputError(f"{a.place} and {b.place} cannot be compared: {error}.") from None


def _total(before: Importance, after: Importance) -> Total:
    import scipy.stats  # slow to import

    sums = float(before.mean.sum()), float(after.mean.sum())
    error = float(np.hypot(before.error.sum(), after.error.sum()))
    # Welch's degrees of freedom are never fewer.
    freedom = min(before.units, after.units) - 1
    z = abs(sums[1] - sums[0]) / error if error > 0 else np.inf
    return Total(*sums, error, float(2 * scipy.stats.t.sf(z, freedom)))


class Change(NamedTuple):
    """A part of the model in both texts and the difference B minus A, arrays of one shape; q within its family."""

    before: np.ndarray
    after: np.ndarray
    difference: np.ndarray
    error: np.ndarray
    z: np.ndarray
    p: np.ndarray
    q: np.ndarray


class LayerShift(NamedTuple):
    """All parameters: what was measured in A and B, and the changes by path; q values are those of a family."""

    before: Layers
    after: Layers
    tensors: dict[str, Change]
    heads: dict[str, Change]
    parts: dict[str, Change]  # of every layer, that hold several tensors: [L]
    wholes: dict[str, Change]  # such parts in all layers, and the model: []
    experts: dict[str, Change]


def layer_shift(a: Task, b: Task, model: LanguageModel) -> LayerShift:
    """The shift of tensors, attention heads, layers and the whole model."""
    first, second = a.arrays["layers"], b.arrays["layers"]
    before, after = (read_layers(task.arrays["layers"], model, layer_settings(task.progress)) for task in (a, b))
    shift = _shift(first, second, a, b)
    sizes = part_sizes(model, layer_settings(a.progress))
    means = fj.welford.mean(first), fj.welford.mean(second)
    fields = [on_parts(x, sizes) for x in (*means, shift.difference, shift.standard_error, shift.z, shift.p)]
    wanted = {**sizes, "parts": several(before)}
    families = {}
    for name in FAMILIES:
        q = fj.stats.q_values({path: fields[-1][name][path] for path in wanted[name]})
        families[name] = {path: Change._make([*(x[name][path] for x in fields), q[path]]) for path in q}
    return LayerShift(before, after, **families)

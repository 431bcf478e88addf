"""The numbers a report is about: importance of every vocabulary row with its interval, and tasks compared."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fisher_jax.cli.page.csv_text import csv_text


class Importance(NamedTuple):
    """Per-token Fisher of every vocabulary row; intervals are NaN with fewer than two units."""

    mean: np.ndarray  # [V], per scored token, summed over the columns of the row
    error: np.ndarray  # [V], standard error of the mean
    lower: np.ndarray  # [V]
    upper: np.ndarray  # [V]
    counts: np.ndarray  # [V], occurrences as a label
    units: float
    tokens: float

    @property
    def has_intervals(self) -> bool:
        """Whether two or more units were seen."""
        return self.units >= 2

    @property
    def order(self) -> np.ndarray:
        """Rows from the most to the least important; the lower id first where equal."""
        return np.argsort(-self.mean, kind="stable")


class Comparison(NamedTuple):
    """Two tasks side by side."""

    task: str
    other: str
    rank_correlation: float  # Spearman's, over all rows
    gainers: np.ndarray  # rows that matter more in `task`, by difference over its standard error
    losers: np.ndarray


def importance(arrays: dict[str, Any], kind: str, level: float) -> Importance:
    """Reads the Welford state of one kind into host arrays."""
    import fisher_jax as fj

    state = arrays[kind]
    lower, upper = fj.welford.interval(state, level=level)
    return Importance(
        np.asarray(fj.welford.mean(state), np.float64),
        np.asarray(fj.welford.standard_error(state), np.float64),
        np.asarray(lower, np.float64),
        np.asarray(upper, np.float64),
        np.asarray(arrays["counts"]),
        float(fj.welford.count(state)),
        float(fj.welford.weight(state)),
    )


def importance_csv(tasks: Mapping[str, Mapping[str, Importance]], tokens: list[str]) -> str:
    """One line per task and vocabulary row, ``{task: {kind: ...}}``, most important first by a task's first kind.

    Tokens are as they are in the text, as JSON strings.
    """
    kinds = sorted({kind for of in tasks.values() for kind in of})
    fields = ("", "_standard_error", "_lower", "_upper")
    header = ["task", "token_id", "token", "count", *(f"{kind}{field}" for kind in kinds for field in fields)]
    rows: list[list[object]] = []
    for task, of in tasks.items():
        first = next(iter(of.values()))
        columns = [values for kind in kinds for values in of[kind][:4]]
        for row in first.order.tolist():
            numbers = (f"{column[row]:.9g}" for column in columns)
            rows.append([task, row, tokens[row], int(first.counts[row]), *numbers])
    return csv_text(header, rows)


def outliers(result: Importance, *, minimum_count: int = 5) -> np.ndarray:
    """Rows whose importance is furthest from that of equally frequent ones: two or four for each doubling of the
    count, half of them above the others and half below.
    """
    counts, mean = result.counts, result.mean
    seen = np.flatnonzero((counts >= minimum_count) & (mean > 0))
    octaves = np.log2(counts[seen] / minimum_count).astype(int)
    found = []
    for octave in np.unique(octaves):
        rows = seen[octaves == octave]
        # Within an octave importance still grows with the count: judge importance for each occurrence.
        ordered = rows[np.argsort(np.log(mean[rows] / counts[rows]), kind="stable")]
        number = min(2 if octave < 3 else 1, len(ordered) // 2) or len(ordered)
        found += [*ordered[:number], *ordered[-number:]]
    return np.array(list(dict.fromkeys(found)), int)


def compare(task: str, here: Importance, other: str, there: Importance, *, number: int = 10) -> Comparison:
    """Spearman correlation of two tasks, and the rows whose difference stands out most."""
    from scipy import stats  # slow to import

    spread = np.hypot(np.nan_to_num(here.error), np.nan_to_num(there.error))
    difference = here.mean - there.mean
    # A row seen as a label only a few times in both has an error that knows nothing of the next occurrence.
    often = np.maximum(here.counts, there.counts) >= 5
    score = np.where(often & (spread > 0), difference / np.where(spread > 0, spread, 1.0), 0.0)
    order = np.argsort(-score, kind="stable")
    return Comparison(
        task,
        other,
        float(stats.spearmanr(here.mean, there.mean).statistic),
        order[:number][score[order[:number]] > 0],
        order[::-1][:number][score[order[::-1][:number]] < 0],
    )

"""All that a comparison found out, and its tables as CSV."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fisher_jax._support.printable import readable
from fisher_jax.cli.compare.settings import CompareSettings
from fisher_jax.cli.compare.shift import LayerShift, RowShift
from fisher_jax.cli.page.csv_text import csv_text
from fisher_jax.cli.report.layers import FAMILIES, PLACE, place
from fisher_jax.cli.report.task_state import Task


@dataclass
class Compared:
    """All that the page is written from."""

    settings: CompareSettings
    model_name: str
    tokens: list[str]  # by id, as they are in the text
    tasks: tuple[Task, Task]  # A and B
    names: tuple[str, str]
    rows: dict[str, RowShift]  # by kind
    columns: list[str]
    layers: LayerShift | None = None
    layers_missing: str = ""  # why there are none
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def vocabulary(self) -> list[str]:
        """Readable tokens by id."""
        return [readable(token) for token in self.tokens]


def rows_csv(found: Compared) -> str:
    """One line for every kind and vocabulary row, the smallest p value first."""
    header = (
        ["kind", "token_id", "token", "count_a", "count_b", "importance_a", "standard_error_a", "importance_b",
         "standard_error_b", "difference", "standard_error", "z", "degrees_of_freedom", "p", "q", "not_tested"]
    )  # fmt: skip
    rows: list[list[object]] = []
    for kind, x in found.rows.items():
        s = x.shift
        fields = (x.before.mean, x.before.error, x.after.mean, x.after.error, *s[:6])
        for row in np.lexsort((-np.abs(s.z), s.p)).tolist():
            counts = int(x.before.counts[row]), int(x.after.counts[row])
            numbers = (_number(values[row]) for values in fields)
            rows.append([kind, row, found.tokens[row], *counts, *numbers, x.reason[row]])
    return csv_text(header, rows)


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.7g}"


def layers_csv(found: Compared) -> str | None:
    """One line for every part of the model; q values are adjusted within a family."""
    if found.layers is None:
        return None
    header = (
        ["family", "path", *PLACE, "importance_a", "importance_b", "difference", "standard_error",
         "z", "p", "q"]
    )  # fmt: skip
    rows: list[list[object]] = []
    for family in FAMILIES:
        for path, change in getattr(found.layers, family).items():
            for index in np.ndindex(change.p.shape):
                where = place(path, index, family)
                rows.append([family, path, *where, *(_number(x[index]) for x in change)])
    return csv_text(header, rows)

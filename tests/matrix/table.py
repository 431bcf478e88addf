"""The table: rows, columns, which cells are refused and which have no meaning; how a cell is measured.

A cell is a value that is right, or an error whose type and words stand here. There is no third kind.
"""

import contextlib
from typing import NamedTuple

import jax
import numpy as np

import fisher_jax as fj
from tests.matrix import cases, rights
from tests.matrix.rows import ROWS

__all__ = ["COLUMNS", "ROWS", "Refusal", "distance", "kind_of", "of_draws", "precision", "same_draws", "wanted"]

# Of every column what is put to the test.
COLUMNS = {
    "mask": "rows of 6, 3, 0 and 5 real positions, `Batch.real`",
    "weights": "weights of 0.5, 1 and 1.5",
    "NaN in padding": "NaN inputs and targets out of range where nothing is real; prompts have no weight",
    "NaN under weight 0": "a row of NaN inputs without weight, and no `Batch.real`",
    "time-major": "the model works on `[S, B]`",
    "flipped": "the model works on positions in reverse",
    "windows": "the model works on windows, `[B, S] -> [2 B, S / 2]`",
    "rows that interact": "batch norm in training",
    "bfloat16": "parameters, inputs and products in bfloat16",
    "x64": "all in float64",
    "remat": "layers under `jax.checkpoint`",
    "vmap": "the model of one row, mapped",
    "checkpoint": "a state saved, restored without `like=`, and gone on with",
    "checkpoint, like": "the same with `like=`",
    "scan": "layers in a `jax.lax.scan`, their parameters stacked",
    "donation": "the state donated to a jitted update",
    "Auto mesh": "eight devices, batch and parameters sharded, the mesh left to the compiler",
    "Explicit mesh": "the same, places in the types and named by the model",
}


class Refusal(NamedTuple):
    """A named error: its type, what its sentence must name, and in words why and what to do."""

    error: type[Exception]
    names: tuple[str, ...]
    why: str


ROWS_INTERACT = Refusal(
    ValueError, ("cases.py",),
    "a row has no score of its own where rows interact: run batch norm with its running statistics, or observe by "
    "batch or token",
)  # fmt: skip
NOT_FINITE = Refusal(
    fj.RejectedBatchError, ("NaN or infinite",),
    "without `Batch.real` every position is real and counts in `A`, also where it has no loss: pass `real=`",
)  # fmt: skip
PLACES = Refusal(
    ValueError, ("out_sharding",),
    "a row alone cannot lie where the model says: leave out `out_sharding=`, or use an Auto mesh",
)  # fmt: skip
MODELS = ("time-major", "flipped", "windows", "rows that interact", "remat", "vmap", "scan")


def kind_of(name: str, column: str) -> tuple[str, Refusal | str | None]:
    """``("value", None)``, ``("refused", Refusal)`` or ``("no meaning", why or Refusal)``."""
    row = ROWS[name]
    if column == "rows that interact" and row.by_row:
        return "no meaning", ROWS_INTERACT
    if column in MODELS and not row.of_model:
        return "no meaning", "hidden states are given, no model"
    if column == "donation" and row.begin is None:
        return "no meaning", "no state"
    if column.startswith("checkpoint") and not row.saved:
        return "no meaning", "no state"
    if column == "NaN under weight 0" and ("K-FAC" in name or "kfac" in name):
        return "refused", NOT_FINITE
    if column == "Explicit mesh" and "block_spectr" in name:
        return "refused", PLACES
    return "value", None


def wanted(column: str) -> rights.Right:
    case = cases.case(column)
    params = cases.unstack(case.params) if case.stacked else case.params
    return rights.right(params, case.batch, cases.batch_norm if column == "rows that interact" else cases.identity)


def distance(found: np.ndarray, right: np.ndarray) -> float:
    """The largest difference, in units of the largest entry; infinite where one alone has a NaN."""
    assert found.shape == right.shape
    if (np.isnan(found) != np.isnan(right)).any():
        return float("inf")
    return float(np.nanmax(np.abs(found - right)) / np.nanmax(np.abs(right)))


def of_draws(draws: np.ndarray, right: np.ndarray, slack: float) -> tuple[float, float]:
    """Of the mean over draws its largest error and the root mean square of all, in standard errors."""
    error = draws.std(0) / np.sqrt(len(draws)) + slack * np.abs(right).max()
    z = (draws.mean(0) - right) / error
    return float(np.abs(z).max()), float(np.sqrt((z**2).mean()))


def precision(column: str):
    return jax.enable_x64(True) if column == "x64" else contextlib.nullcontext()


def same_draws(column: str) -> str:
    """A column of the plain model that has the same masks and weights, and so the same draws."""
    return column if column in ("weights", "NaN under weight 0") else "remat"

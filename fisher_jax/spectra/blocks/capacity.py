"""Spectra of blocks, and how much capacity they show."""

from typing import NamedTuple

import numpy as np

from fisher_jax._support.outline import outline

__all__ = ["BlockSpectrum", "Capacity", "spectrum"]


class Capacity(NamedTuple):
    """Measures of one block's eigenvalues ``lambda_1 >= ... >= lambda_P >= 0``, of all of them, whatever ``top_k``.

    Attributes:
        trace: ``sum_i lambda_i``, the mean squared length of a score.
        log_determinant: ``log det(F + damping I) = sum_i log(lambda_i + damping)`` over all ``P`` eigenvalues, zeros
            included; ``- P log(damping)`` makes it 0 for a block that learns nothing.
        participation_ratio: ``(sum_i lambda_i)**2 / sum_i lambda_i**2``, between 1 and ``P``: how many directions
            share the trace. 0 if the trace is 0.
        entropy_rank: ``exp(-sum_i p_i log p_i)`` with ``p_i = lambda_i / sum_j lambda_j`` (Roy and Vetterli 2007,
            "effective rank"). 0 if the trace is 0.
        condition_number: ``lambda_1 / lambda_r`` over the ``r = rank`` eigenvalues that differ from zero, not of the
            whole block where ``rank < P``. NaN if there is none.
        damped_condition_number: ``(lambda_1 + damping) / (lambda_P + damping)``, of the whole block.
        rank: eigenvalues above ``eps max(N, P) lambda_1``, with float32's (or float64's) ``eps``: what rounding
            leaves of a zero is below.
        damping: as given.
    """

    trace: float
    log_determinant: float
    participation_ratio: float
    entropy_rank: float
    condition_number: float
    damped_condition_number: float
    rank: int
    damping: float

    def __repr__(self) -> str:
        return outline(self)


class BlockSpectrum(NamedTuple):
    """The spectrum of one block, on the host.

    Attributes:
        eigenvalues: numpy float64 ``[k]``, descending, accurate to float32 (an absolute error of a few ``eps`` times
            the largest). ``k`` is ``top_k``, or ``min(N, P)``; eigenvalues beyond ``N`` are zero.
        capacity: `Capacity`.
        num_parameters: ``P``.
        num_scores: ``N``, tokens or sequences of positive weight (times labels drawn).
        method: ``covariance``, ``gram``, ``taps`` (a Gram matrix without gradients) or ``sketch``.
        error_bound: every eigenvalue lies between its value here and that plus this bound. 0 but for a ``sketch``,
            whose trace is exact, while its other measures are of the eigenvalues given.
    """

    eigenvalues: np.ndarray
    capacity: Capacity
    num_parameters: int
    num_scores: int
    method: str
    error_bound: float

    def __repr__(self) -> str:
        return outline(self)


def spectrum(
    values: np.ndarray,
    size: int,
    num_scores: int,
    method: str,
    *,
    eps: float,
    top_k: int | None,
    damping: float,
    error_bound: float = 0.0,
    trace: float | None = None,
) -> BlockSpectrum:
    """From all eigenvalues that may differ from zero, in any order."""
    values = np.maximum(np.sort(np.asarray(values, np.float64))[::-1], 0)
    values = values[: min(size, num_scores)]
    kept = values if top_k is None else np.pad(values, (0, max(0, size - values.size)))[:top_k]
    capacity = _capacity(values, size, num_scores, eps, damping, trace)
    return BlockSpectrum(kept, capacity, size, num_scores, method, error_bound)


def _capacity(values, size, num_scores, eps, damping, trace) -> Capacity:
    total, largest = float(values.sum()), float(values[0])
    rank = int(np.sum(values > eps * max(num_scores, size) * largest))
    share = values[values > 0] / total if total > 0 else np.zeros(0)
    zeros = size - values.size
    smallest = float(values[-1]) if zeros == 0 else 0.0
    return Capacity(
        trace=total if trace is None else trace,
        log_determinant=float(np.sum(np.log(values + damping)) + zeros * np.log(damping)),
        participation_ratio=total**2 / float(np.sum(values**2)) if total > 0 else 0.0,
        entropy_rank=float(np.exp(-np.sum(share * np.log(share)))) if total > 0 else 0.0,
        condition_number=largest / float(values[rank - 1]) if rank else float("nan"),
        damped_condition_number=(largest + damping) / (smallest + damping),
        rank=rank,
        damping=damping,
    )

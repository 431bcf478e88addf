"""What is kept of a block's scores: their covariance, their rows, or a sketch of the rows with its error.

Every array has a leading axis of layers. With scores ``x`` (rows of ``X [N, P]``) all three know ``X^T X``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import compensated

__all__ = ["Covariance", "Kept", "ScoreRows", "absorb", "begin", "combine", "keep", "trace"]

_EXACT = jax.lax.Precision.HIGHEST


class Covariance(NamedTuple):
    """``X^T X``, exact for any number of scores: ``[layers, P, P]``, in a state a pair ``[2, layers, P, P]``."""

    sums: Array


class ScoreRows(NamedTuple):
    """The scores themselves, as long as they fit; then directions that stand for them (frequent directions).

    Attributes:
        rows: ``[layers, capacity + chunk, P]``, zeros after the first ``filled``.
        filled: int32.
        lost: ``[layers]``; ``0 <= X^T X - rows^T rows <= lost`` as matrices. 0: exact.
    """

    rows: Array
    filled: Array
    lost: Array


Kept = Covariance | ScoreRows


def keep(layers: int, size: int, max_scores: int, chunk: int, dtype) -> Kept:
    """The smaller of the two, empty: covariance where there are no more parameters than scores to keep."""
    if size <= max_scores:
        return Covariance(jnp.zeros((2, layers, size, size), dtype))
    rows = jnp.zeros((layers, max_scores + chunk, size), dtype)
    return ScoreRows(rows, jnp.zeros((), jnp.int32), jnp.zeros(layers, dtype))


def begin(kept: Kept) -> Kept:
    """What a batch's scores are added to: plain sums that start at zero, or the rows."""
    return Covariance(jnp.zeros_like(kept.sums[0])) if isinstance(kept, Covariance) else kept


def combine(kept: Kept, batch: Kept) -> Kept:
    """The state after a batch; sums of batches are compensated."""
    if isinstance(kept, Covariance):
        return Covariance(compensated.add(kept.sums, compensated.from_value(batch.sums)))  # type: ignore[union-attr]
    return batch


def absorb(kept: Kept, scores: Array, live: Array, capacity: int) -> Kept:
    """Add scores ``[layers, chunk, P]`` of which only those that are ``live`` are not zero."""
    if isinstance(kept, Covariance):
        return Covariance(kept.sums + jnp.einsum("lcp,lcq->lpq", scores, scores, precision=_EXACT))
    front = jnp.argsort(~live, stable=True)
    zero = jnp.zeros_like(kept.filled)
    rows = jax.lax.dynamic_update_slice(kept.rows, scores[:, front], (zero, kept.filled, zero))
    filled = kept.filled + jnp.sum(live, dtype=jnp.int32)
    return jax.lax.cond(filled > capacity, _shrink, lambda x: x, ScoreRows(rows, filled, kept.lost))


def _shrink(kept: ScoreRows) -> ScoreRows:
    """Half as many directions, every squared length less the first that is left out.

    Ghashami, Liberty, Phillips and Woodruff 2016, "Frequent Directions", algorithm 2.2: with ``m`` directions left,
    ``lost`` stays below ``(|X|_F^2 - |X_k|_F^2) / (m + 1 - k)`` for every ``k <= m``.
    """
    directions = kept.rows.shape[1] // 2

    def one(rows):
        gram = jnp.matmul(rows, rows.T, precision=_EXACT)
        values, vectors = jnp.linalg.eigh(gram)
        values, vectors = values[::-1], vectors[:, ::-1]
        shift = jnp.maximum(values[directions], 0)
        top = values[:directions]
        scale = jnp.sqrt(jnp.where(top > shift, (top - shift) / jnp.where(top > shift, top, 1), 0))
        new = scale[:, None] * jnp.matmul(vectors[:, :directions].T, rows, precision=_EXACT)
        return jnp.zeros_like(rows).at[:directions].set(new), shift

    # One layer after the other: batches of LAPACK can wait for each other for ever on few cores.
    rows, shift = jax.lax.map(one, kept.rows)
    return ScoreRows(rows, jnp.full_like(kept.filled, directions), kept.lost + shift)


def trace(scores: Array) -> Array:
    """``tr X^T X`` of scores ``[layers, chunk, P]``: ``[layers]``."""
    return jnp.sum(scores**2, (1, 2))

"""Orders in which vocabulary rows can be pruned, least important first."""

from typing import NamedTuple

import numpy as np

# By option of fisher-jax trim.
NAMES = {
    "empirical": "Group Fisher, empirical",
    "true": "Group Fisher, exact true",
    "saliency": "saliency ½·F·w²",
    "magnitude": "weight magnitude",
    "frequency": "corpus frequency",
}
# Shares of the vocabulary rows that are pruned, in the pictures and tables.
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Ordering(NamedTuple):
    """A name and, for each repetition, every vocabulary row in the order in which it is pruned."""

    name: str
    permutations: np.ndarray  # [repetitions, V]


def orderings(
    empirical: np.ndarray,
    true: np.ndarray,
    head: np.ndarray,
    counts: np.ndarray,
    *,
    saliency: np.ndarray | None = None,
    seed: int = 0,
    random_repetitions: int = 5,
) -> list[Ordering]:
    """The orderings that the report compares; equal scores are ordered at random with `seed`.

    `saliency` is `0.5 * sum_j F[v, j] * w[v, j]**2`, [V]. Row groups do not know the columns; the honest row
    version is then `0.5 * F_row[v] * |w_v|**2 / D`, which takes F as equal over the D columns of a row.
    """
    width = head.shape[1]
    squares = np.sum(np.square(head, dtype=np.float64), axis=1)
    if saliency is None:
        saliency = 0.5 * np.asarray(empirical, np.float64) * squares / width
    scores = zip(NAMES.values(), (empirical, true, saliency, np.sqrt(squares), counts), strict=True)
    generator = np.random.default_rng(seed)
    ranked = [Ordering(name, _ascending(np.asarray(score), generator)[None]) for name, score in scores]
    random = np.stack([generator.permutation(len(counts)) for _ in range(random_repetitions)])
    return [*ranked, Ordering("random", random)]


def _ascending(scores: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.lexsort((generator.permutation(len(scores)), scores))


def prune_levels(permutation: np.ndarray, shares: tuple[float, ...] = SHARES) -> np.ndarray:
    """For every vocabulary row the index of the smallest share at which it is pruned, [V]; never: len(shares)."""
    vocab_size = len(permutation)
    num_pruned = np.round(np.asarray(shares) * vocab_size).astype(int)
    levels = np.empty(vocab_size, np.int32)
    levels[permutation] = np.searchsorted(num_pruned, np.arange(vocab_size), side="right")
    return levels

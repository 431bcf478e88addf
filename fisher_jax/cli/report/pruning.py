"""Held-out loss against the share of vocabulary rows pruned, in the use of the matrix as head only.

Two curves for each ordering. *Zeroed*: the row is set to zero, as a pruning mask does, so that its logit becomes 0
(or the bias). *Removed*: its logit is minus infinity, a really smaller vocabulary; the loss is then over the targets
that were kept, and their share is told.

One product of hidden states and head serves every ordering and every share: rows are given the smallest share at
which they are pruned, `exp(logit)` is summed by that level with one more product, and sums over the levels that are
*kept* give each log-sum-exp without cancellation.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax.cli.report.orderings import SHARES, Ordering, prune_levels

# exp(logit - (largest - 60)): 60 + log(V) stays below float32's 88, and 147 nats below the largest stay above zero.
_HEADROOM = 60.0


class Curve(NamedTuple):
    """One ordering: loss per held-out token at every share, with the spread over documents and repetitions."""

    name: str
    zeroed: np.ndarray  # [shares], nats per token, over all targets
    zeroed_error: np.ndarray  # standard error of `zeroed - zeroed[0]` over documents (over repetitions: random)
    removed: np.ndarray  # [shares], nats per kept token
    removed_error: np.ndarray  # of `removed`'s difference from the full vocabulary on the same targets
    kept: np.ndarray  # [shares], share of targets whose row was kept
    area: float  # area under `zeroed - zeroed[0]` over the shares


class PruningResult(NamedTuple):
    """All orderings on the same held-out tokens."""

    shares: np.ndarray
    curves: list[Curve]
    loss: float  # with nothing pruned
    num_tokens: int
    num_documents: int


def prune(
    hidden: np.ndarray,
    targets: np.ndarray,
    documents: np.ndarray,
    head: jax.Array | np.ndarray,
    ranked: list[Ordering],
    *,
    bias: np.ndarray | None = None,
    soft_cap: float | None = None,
    shares: tuple[float, ...] = SHARES,
    chunk_size: int = 128,
) -> PruningResult:
    """Pruning curves of every ordering.

    Args:
        hidden: final hidden states of the held-out targets, [T, H].
        targets: token ids, [T].
        documents: document numbers, [T]; standard errors are over documents.
        head: [V, H].
        ranked: orderings with the row to prune first in front.
        bias: added to the logits, [V]; a zeroed row keeps it.
        soft_cap: `c` in `c * tanh(logit / c)`.
        shares: shares of rows pruned, the first one 0.
        chunk_size: tokens per logits product.
    """
    if shares[0] != 0.0:
        raise ValueError(f"the first share must be 0, the unpruned model; it is {shares[0]}.")
    levels = np.stack([prune_levels(permutation, shares) for o in ranked for permutation in o.permutations])  # [P, V]
    log_kept, target_logit = _log_kept_sums(hidden, targets, head, levels, len(shares), bias, soft_cap, chunk_size)
    log_pruned = _log_pruned_sums(levels, len(shares), bias, soft_cap)  # [P, S]
    kept = levels[:, targets, None] > np.arange(len(shares))  # [P, T, S]
    pruned_logit = np.zeros(len(targets)) if bias is None else _capped(bias, soft_cap)[targets]
    zeroed = np.logaddexp(log_kept, log_pruned[:, None]) - np.where(
        kept, target_logit[:, None], pruned_logit[:, None]
    )
    removed = np.where(kept, log_kept - target_logit[:, None], 0.0)
    curves, first = [], 0
    for ordering in ranked:
        rows = slice(first, first := first + len(ordering.permutations))
        curves.append(_curve(ordering.name, np.asarray(shares), zeroed[rows], removed[rows], kept[rows], documents))
    return PruningResult(
        np.asarray(shares), curves, float(zeroed[0, :, 0].mean()), len(targets), len(np.unique(documents))
    )


def _capped(logits: np.ndarray, soft_cap: float | None) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)


def _log_pruned_sums(
    levels: np.ndarray, num_shares: int, bias: np.ndarray | None, soft_cap: float | None
) -> np.ndarray:
    """log sum over pruned rows of exp(their logit, 0 or the bias), [P, S]; minus infinity where none is pruned."""
    weights = np.ones(levels.shape[1]) if bias is None else np.exp(_capped(bias, soft_cap))
    by_level = np.stack([np.bincount(row, weights, minlength=num_shares + 1) for row in levels])
    with np.errstate(divide="ignore"):
        return np.log(np.cumsum(by_level, axis=1)[:, :num_shares])


def _log_kept_sums(
    hidden: np.ndarray,
    targets: np.ndarray,
    head: jax.Array | np.ndarray,
    levels: np.ndarray,
    num_shares: int,
    bias: np.ndarray | None,
    soft_cap: float | None,
    chunk_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """log sum over kept rows of exp(logit), [P, T, S], and the target's logit, [T], both float64."""
    num_permutations, vocab_size = levels.shape
    num_levels = num_shares + 1
    indicator = np.zeros((vocab_size, num_permutations * num_levels), np.float32)
    columns = levels + num_levels * np.arange(num_permutations)[:, None]
    indicator[np.arange(vocab_size), columns] = 1.0
    shift = jnp.zeros(vocab_size, jnp.float32) if bias is None else jnp.asarray(bias, jnp.float32)

    @jax.jit
    def by_level(chunk, target, head, indicator, shift):
        logits = jnp.einsum("th,vh->tv", chunk, head, precision="highest", preferred_element_type=jnp.float32)
        logits = logits + shift[None, :]
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        anchor = jnp.max(logits, axis=-1, keepdims=True) - _HEADROOM
        sums = jnp.dot(jnp.exp(logits - anchor), indicator, precision="highest")
        return sums, anchor[:, 0], jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]

    device_indicator = jnp.asarray(indicator)
    log_kept = np.empty((num_permutations, len(targets), num_shares))
    target_logit = np.empty(len(targets))
    for rows, chunk, target in _chunks(hidden, targets, chunk_size):
        sums, anchor, logit = (
            np.asarray(x, np.float64) for x in by_level(chunk, target, head, device_indicator, shift)
        )
        size = rows.stop - rows.start
        by_share = sums[:size].reshape(size, num_permutations, num_levels)
        # Kept at share k: every level above k. Summed from the far end, so nothing is subtracted.
        kept = np.cumsum(by_share[:, :, ::-1], axis=2)[:, :, ::-1][:, :, 1:]
        with np.errstate(divide="ignore"):
            log_kept[:, rows] = (np.log(kept) + anchor[:size, None, None]).transpose(1, 0, 2)
        target_logit[rows] = logit[:size]
    return log_kept, target_logit


def _chunks(hidden: np.ndarray, targets: np.ndarray, size: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Token chunks of one shape; the last one is padded."""
    for first in range(0, len(targets), size):
        rows = slice(first, min(first + size, len(targets)))
        missing = size - (rows.stop - rows.start)
        yield rows, np.pad(hidden[rows], ((0, missing), (0, 0))), np.pad(targets[rows], (0, missing))


def _curve(
    name: str, shares: np.ndarray, zeroed: np.ndarray, removed: np.ndarray, kept: np.ndarray, documents: np.ndarray
) -> Curve:
    """Means over tokens (and repetitions), and their standard errors; arrays are [repetitions, T, S]."""
    everything = np.ones_like(kept[0], dtype=float)
    losses = zeroed.mean(axis=1)  # [repetitions, S]
    kept_share = kept.mean(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        removed_losses = removed.sum(axis=1) / kept.sum(axis=1)
    if len(zeroed) > 1:
        spread = 1 / np.sqrt(len(zeroed))
        zeroed_error = losses.std(axis=0, ddof=1) * spread
        removed_error = removed_losses.std(axis=0, ddof=1) * spread
    else:
        full = np.where(kept[0], zeroed[0, :, :1], 0.0)
        zeroed_error = ratio_error(zeroed[0] - zeroed[0, :, :1], everything, documents)
        removed_error = ratio_error(removed[0] - full, kept[0].astype(float), documents)
    loss = losses.mean(axis=0)
    return Curve(
        name,
        loss,
        zeroed_error,
        removed_losses.mean(axis=0),
        removed_error,
        kept_share.mean(axis=0),
        float(np.trapezoid(loss - loss[0], shares)),
    )


def ratio_error(values: np.ndarray, weights: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Standard error over documents of `sum(values) / sum(weights)`, by column; NaN with fewer than two.

    `se^2 = n / (n - 1) * sum_d (values_d - mean * weights_d)^2 / W^2`, the same formula as for the Fisher means.
    """
    _, numbers = np.unique(documents, return_inverse=True)
    n = int(numbers.max()) + 1 if len(numbers) else 0
    if n < 2:
        return np.full(values.shape[1], np.nan)
    value_sums, weight_sums = np.zeros((n, values.shape[1])), np.zeros((n, values.shape[1]))
    np.add.at(value_sums, numbers, values)
    np.add.at(weight_sums, numbers, weights)
    total = weight_sums.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = value_sums.sum(axis=0) / total
        return np.sqrt(n / (n - 1) * np.sum((value_sums - mean * weight_sums) ** 2, axis=0)) / total

"""Pruning curves against a float64 loop over tokens, orderings and shares."""

import jax.numpy as jnp
import numpy as np
import pytest

from fisher_jax.cli.report.orderings import Ordering, orderings, prune_levels
from fisher_jax.cli.report.pruning import prune, ratio_error

SHARES = (0.0, 0.1, 0.5, 0.9, 0.97)


def _slow(logits, targets, permutation, share, bias):
    """(zeroed loss by token, removed loss by token or NaN) with `share` of the rows pruned."""
    pruned = permutation[: round(share * logits.shape[1])]
    zeroed, removed = logits.copy(), logits.copy()
    zeroed[:, pruned] = bias[pruned]
    removed[:, pruned] = -np.inf
    rows = np.arange(len(targets))

    def loss(z):
        top = z.max(axis=1)
        with np.errstate(divide="ignore"):
            return top + np.log(np.exp(z - top[:, None]).sum(axis=1)) - z[rows, targets]

    outside = np.isin(targets, pruned)
    return loss(zeroed), np.where(outside, np.nan, loss(removed))


@pytest.mark.parametrize(
    ("scale", "offset", "with_bias"), [(1, 0, False), (6, 0, True), (10, -60, False), (1, 30, False)]
)
def test_curves_equal_a_slow_loop(scale, offset, with_bias):
    generator = np.random.default_rng(0)
    T, V, H = 53, 70, 8
    head = (generator.normal(size=(V, H)) * scale / np.sqrt(H)).astype(np.float32)
    hidden = generator.normal(size=(T, H)).astype(np.float32)
    # A constant offset of all logits: GPT-2's are far below zero.
    head = np.concatenate([head, np.full((V, 1), offset, np.float32)], axis=1)
    hidden = np.concatenate([hidden, np.ones((T, 1), np.float32)], axis=1)
    bias = generator.normal(size=V) if with_bias else np.zeros(V)
    targets = generator.integers(0, V, T)
    documents = np.sort(generator.integers(0, 5, T))
    permutations = np.stack([generator.permutation(V) for _ in range(3)])
    ranked = [Ordering("one", permutations[:1]), Ordering("random", permutations[1:])]
    result = prune(
        hidden,
        targets,
        documents,
        jnp.asarray(head),
        ranked,
        bias=bias if with_bias else None,
        shares=SHARES,
        chunk_size=16,
    )

    logits = hidden.astype(np.float64) @ head.astype(np.float64).T + bias
    tolerance = 30 * np.finfo(np.float32).eps * (1 + np.abs(logits).max())
    for s, share in enumerate(SHARES):
        slow = [_slow(logits, targets, p, share, bias) for p in permutations]
        one, random = result.curves
        np.testing.assert_allclose(one.zeroed[s], slow[0][0].mean(), atol=tolerance)
        np.testing.assert_allclose(one.removed[s], np.nanmean(slow[0][1]), atol=tolerance)
        np.testing.assert_allclose(one.kept[s], np.mean(~np.isnan(slow[0][1])))
        np.testing.assert_allclose(random.zeroed[s], np.mean([z.mean() for z, _ in slow[1:]]), atol=tolerance)
    assert result.loss == pytest.approx(result.curves[0].zeroed[0])


def test_kept_logits_far_below_the_largest_pruned_one_do_not_vanish():
    """Removing the one token that the model is sure of leaves a loss over 100 nats further down."""
    head = np.array([[120.0], [0.0], [-3.0], [-20.0]], np.float32)
    ranked = [Ordering("one", np.array([[0, 3, 2, 1]]))]
    result = prune(
        np.ones((1, 1), np.float32), np.array([2]), np.array([0]), jnp.asarray(head), ranked, shares=(0.0, 0.25)
    )
    np.testing.assert_allclose(result.curves[0].removed[1], np.log1p(np.exp(-3.0)) + 3, rtol=1e-5)


def test_levels_prune_nested_sets_of_the_right_size():
    permutation = np.random.default_rng(1).permutation(1000)
    levels = prune_levels(permutation, SHARES)
    for s, share in enumerate(SHARES):
        pruned = np.flatnonzero(levels <= s)
        assert set(pruned) == set(permutation[: round(share * 1000)])


def test_orderings_put_the_least_important_first_and_break_ties_at_random():
    counts = np.array([0, 5, 0, 3, 0, 0, 9, 0])
    head = np.eye(8) * np.arange(1, 9)[:, None]
    ranked = {o.name: o for o in orderings(counts / 10, counts[::-1], head, counts, seed=3)}
    np.testing.assert_array_equal(ranked["corpus frequency"].permutations[0][-3:], [3, 1, 6])
    np.testing.assert_array_equal(ranked["weight magnitude"].permutations[0], np.arange(8))
    firsts = {orderings(counts, counts, head, counts, seed=s)[4].permutations[0][0].item() for s in range(20)}
    assert firsts == {0, 2, 4, 5, 7}
    assert ranked["random"].permutations.shape == (5, 8)


def test_ratio_error_is_that_of_document_means_when_documents_are_equally_long():
    values = np.random.default_rng(2).normal(size=(60, 2))
    documents = np.repeat(np.arange(6), 10)
    means = values.reshape(6, 10, 2).mean(axis=1)
    np.testing.assert_allclose(
        ratio_error(values, np.ones((60, 2)), documents), means.std(axis=0, ddof=1) / np.sqrt(6)
    )
    assert np.isnan(ratio_error(values, np.ones((60, 2)), np.zeros(60))).all()

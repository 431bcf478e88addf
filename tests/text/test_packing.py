"""Packing scores every target once, keeps documents together and depends on nothing but its inputs."""

import itertools

import numpy as np
import pytest

from fisher_jax._support.errors import InputError
from fisher_jax.text.corpora import Document
from fisher_jax.text.packing import pack


def _encode(text):
    return [int(word) for word in text.split()]


def _documents(lengths):
    """Every token id is unique, so a target can be traced to its place."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return [Document(f"d{i}", " ".join(str(t) for t in range(starts[i], starts[i + 1]))) for i in range(len(lengths))]


def _pack(lengths, **options):
    options = {"seq_len": 8, "max_targets": 10**6, "held_out_targets": 10**6, "vocab_size": 10**6, **options}
    return pack(_documents(lengths), _encode, **options)


def _pairs(rows):
    """(token, next token) of every target of the batches, in stream order."""
    pairs = []
    for tokens, mask, _ in rows.batches(3):
        for row, real in zip(tokens, mask, strict=True):
            n = real.sum()
            pairs += list(zip(row[: n - 1].tolist(), row[1:n].tolist(), strict=True)) if n else []
    return pairs


def test_every_target_is_scored_exactly_once():
    lengths = [30, 2, 8, 9, 1, 15, 64, 22, 7, 3, 16]
    packed = _pack(lengths)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    wanted = {(t, t + 1) for first, last in itertools.pairwise(bounds) for t in range(first, last - 1)}
    found = _pairs(packed.stream) + _pairs(packed.held_out)
    assert len(found) == len(set(found)) == packed.stream.num_targets + packed.held_out.num_targets
    assert set(found) == wanted


def test_rows_of_a_document_are_consecutive_across_batches():
    packed = _pack([30, 12, 8, 9, 11, 15, 64, 22, 7])
    units = np.concatenate([units for _, _, units in packed.stream.batches(4)])
    assert np.all(np.diff(units) >= 0)
    assert len(np.unique(units)) == len(packed.stream.names)


def test_batches_have_one_shape_and_the_last_is_padded_with_empty_rows():
    packed = _pack([30, 12, 8, 9, 11, 15, 64, 22, 7])
    batches = list(packed.stream.batches(4))
    assert {tokens.shape for tokens, _, _ in batches} == {(4, 8)}
    assert len(batches) == packed.stream.num_batches(4)
    assert sum(int(mask.any(axis=1).sum()) for _, mask, _ in batches) == len(packed.stream.lengths)
    resumed = list(packed.stream.batches(4, start=2))
    for (a, _, _), (b, _, _) in zip(batches[2:], resumed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_budget_reaches_every_document_before_any_document_twice():
    packed = _pack([100] * 40, max_targets=35 * 7 + 30)
    rows = np.bincount(packed.stream.documents)
    assert len(packed.stream.names) == 35
    assert set(rows) == {1, 2}
    assert packed.stream.num_targets <= 35 * 7 + 30


def test_a_budget_below_one_row_each_spreads_over_the_corpus():
    packed = _pack([100] * 800, max_targets=70)
    numbers = [int(name[1:]) for name in packed.stream.names]
    assert len(numbers) == 10
    assert numbers[0] == 0
    assert numbers[-1] > 780


@pytest.mark.parametrize("budget", [1, 5, 40, 111, 250, 399, 5000])
def test_the_budget_is_a_limit(budget):
    lengths = np.random.default_rng(budget).integers(2, 60, 50).tolist()
    packed = _pack(lengths, max_targets=budget, held_out_targets=33)
    assert packed.stream.num_targets <= max(budget, 7)
    assert 0 < packed.held_out.num_targets <= 33
    if budget == 5000:
        assert packed.stream.num_targets == sum(n - 1 for i, n in enumerate(lengths) if i % 8 != 7)


def test_held_out_documents_are_whole_and_disjoint():
    packed = _pack([20] * 24)
    assert packed.held_out.names == ("d7", "d15", "d23")
    assert not set(packed.held_out.names) & set(packed.stream.names)
    assert packed.whole_documents_held_out


def test_one_document_holds_out_its_end():
    packed = _pack([400], held_out_targets=1000)
    assert packed.held_out.num_targets == 49
    assert packed.stream.tokens.max() < packed.held_out.tokens[0, 0]
    assert not packed.whole_documents_held_out


def test_fewer_tokens_than_a_sequence_is_an_error_with_both_counts():
    with pytest.raises(InputError, match="has 5 tokens, fewer than one sequence of 8"):
        _pack([5])


def test_a_token_outside_the_vocabulary_is_an_error():
    with pytest.raises(InputError, match=r"token id 11 in d1, outside the model's vocabulary of 11"):
        _pack([11, 20], vocab_size=11)


def test_the_digest_sees_tokens_and_documents():
    base = _pack([20] * 9).stream.digest()
    assert base == _pack([20] * 9).stream.digest()
    assert base != _pack([20] * 10).stream.digest()
    assert base != _pack([20] * 9, max_targets=20).stream.digest()
    rows = _pack([20] * 9).stream
    assert base != rows._replace(documents=np.zeros_like(rows.documents)).digest()
    assert base != rows._replace(lengths=rows.lengths - 1).digest()

"""Parts of a plan hold all of its rows, each once, in the places that they have in the batches of all."""

import itertools

import numpy as np
import pytest

from fisher_jax._support.errors import InputError
from fisher_jax.text.corpora import Document
from fisher_jax.text.dividing import joined, part_of, shared_document
from fisher_jax.text.packing import pack


def plan_of(lengths, first=0, **options):
    """Tokens are their places, from ``first`` on."""
    starts = first + np.concatenate([[0], np.cumsum(lengths)])
    documents = [Document(f"d{a}", " ".join(map(str, range(a, b)))) for a, b in itertools.pairwise(starts)]
    options = {"seq_len": 8, "max_targets": 10**6, "held_out_targets": 10**6, "vocab_size": 10**6, **options}
    return pack(documents, lambda text: [int(word) for word in text.split()], **options)


RANDOM = np.random.default_rng(0).integers(2, 60, 40).tolist()
LENGTHS = {"even": [8] * 40, "one": [300], "random": RANDOM, "long first": [400, *[9] * 30], "few": [5, 9, 8]}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 16])
@pytest.mark.parametrize("name", LENGTHS)
def test_batches_of_all_parts_together_are_those_of_the_plan(name, count, batch_size, whole):
    rows = plan_of(LENGTHS[name]).stream
    pieces = len(rows.names) if whole else rows.num_batches(batch_size)
    if count > pieces:
        with pytest.raises(InputError, match=f"{pieces:,}"):
            part_of(rows, 1, count, batch_size, whole_documents=whole)
        return
    parts = [part_of(rows, i + 1, count, batch_size, whole_documents=whole) for i in range(count)]
    batches = list(rows.batches(batch_size))
    seen = [np.zeros_like(mask) for _, mask, _ in batches]
    for part in parts:
        assert part.num_targets > 0
        found = list(part.batches(batch_size))
        assert len(found) == part.num_batches(batch_size)
        for number, (tokens, mask, units) in enumerate(found, part.first_batch):
            all_tokens, all_mask, all_units = batches[number]
            assert tokens.shape == all_tokens.shape
            real = mask.any(1)
            assert real.any()
            np.testing.assert_array_equal(mask[real], all_mask[real])
            np.testing.assert_array_equal(tokens[mask], all_tokens[mask])
            np.testing.assert_array_equal(units[real], all_units[real])
            assert (np.diff(units) >= 0).all()
            assert not (seen[number] & mask).any()
            seen[number] |= mask
    assert all((mask == all_mask).all() for mask, (_, all_mask, _) in zip(seen, batches, strict=True))
    assert sum(part.num_targets for part in parts) == rows.num_targets


@pytest.mark.parametrize("name", LENGTHS)
def test_no_document_is_in_two_parts(name):
    rows = plan_of(LENGTHS[name]).stream
    count = min(4, len(rows.names))
    parts = [part_of(rows, i + 1, count, 4, whole_documents=True) for i in range(count)]
    documents = [set(part.documents[part.lengths > 0].tolist()) for part in parts]
    assert sum(map(len, documents)) == len(set.union(*documents)) == len(rows.names)


def test_parts_of_whole_batches_waste_none():
    rows = plan_of([8] * 64, held_out_targets=0).stream
    parts = [part_of(rows, i + 1, 2, 4, whole_documents=True) for i in range(2)]
    assert sum(part.num_batches(4) for part in parts) == rows.num_batches(4)
    assert len({part.num_targets for part in parts}) == 1


def test_a_row_of_a_part_is_told_by_its_own_document():
    rows = plan_of([30, 12, 8, 9, 11, 15, 64, 22, 7]).stream
    part = part_of(rows, 2, 3, 4, whole_documents=True)
    named = {name for i in range(part.num_batches(4)) for name in part.names_in_batch(i, 4)}
    assert named == {rows.names[i] for i in part.documents[part.lengths > 0]}


def test_joined_plans_hold_the_rows_of_both_and_keep_documents_apart():
    plans = [plan_of([30, 12, 8]), plan_of([20] * 16, first=1000)]
    both = joined(plans)
    assert both.stream.num_targets == sum(plan.stream.num_targets for plan in plans)
    assert len(np.unique(both.stream.documents)) == len(both.stream.names) == 3 + 14
    assert both.corpus_targets == sum(plan.corpus_targets for plan in plans)
    assert both.held_out.num_targets == sum(plan.held_out.num_targets for plan in plans)
    np.testing.assert_array_equal(np.diff(both.stream.documents) >= 0, True)
    assert joined(plans[:1]).digest() == plans[0].digest()


def test_a_document_that_is_in_two_plans_is_found():
    one, other = plan_of([30] * 9, seq_len=20), plan_of([30] * 9, first=1000, seq_len=20)
    assert shared_document([one, other]) is None
    again = plan_of([30] * 3, first=8 * 30, seq_len=20)
    found = shared_document([other, one, again])
    assert found.plans == (1, 2)
    assert found.names == ("d240", "d240")

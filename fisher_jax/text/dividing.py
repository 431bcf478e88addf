"""One plan of rows in parts that separate jobs measure, and the plans of several texts as one."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fisher_jax._support.errors import InputError
from fisher_jax.text.packing import Packed, Rows

__all__ = ["Shared", "joined", "part_of", "shared_document"]

# Tokens from which on two documents that begin alike are taken for the same one.
_TELLING = 16


def part_of(rows: Rows, index: int, count: int, batch_size: int, *, whole_documents: bool) -> Rows:
    """The rows of one of ``count`` parts, numbered from 1, where they stand in the batches of all rows.

    A batch that two parts share has empty rows in the places of the other part's, so that whatever is drawn by batch
    and place is the same as without parts. Every part has a document, or a batch, at least.

    Args:
        whole_documents: parts are cut at documents; otherwise at batches.

    Raises:
        InputError: there are more parts than documents or batches.
    """
    size = rows.rows_in_batch(batch_size)
    first, end = _cuts(rows, count, batch_size, whole_documents)[index - 1 : index + 1]
    places = np.arange(first // size * size, -(-end // size) * size)
    own, nearest = (places >= first) & (places < end), np.clip(places, first, end - 1)
    return Rows(
        np.where(own[:, None], rows.tokens[nearest], 0),
        np.where(own, rows.lengths[nearest], 0),
        rows.documents[nearest],
        rows.names,
        rows.first_batch + int(first // size),
    )


def _cuts(rows: Rows, count: int, batch_size: int, whole_documents: bool) -> list[int]:
    """Where each part begins, and the number of rows: near equal numbers of batches, where documents allow it."""
    size, batches = rows.rows_in_batch(batch_size), rows.num_batches(batch_size)
    starts = np.flatnonzero(np.diff(rows.documents, prepend=-1)) if whole_documents else np.arange(batches) * size
    if count > len(starts):
        pieces = "documents" if whole_documents else "batches"
        raise InputError(
            f"--part asks for {count:,} parts, and this run can be cut into {len(starts):,} at most, its number of "
            f"{pieces}; give fewer parts."
        )
    wanted = np.searchsorted(starts, np.round(np.arange(count) * batches / count) * size)
    chosen: list[int] = []
    for k, place in enumerate(wanted.tolist()):
        least = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(place, least), len(starts) - count + k))
    return [*starts[chosen].tolist(), len(rows.lengths)]


def joined(plans: Sequence[Packed]) -> Packed:
    """The plans of several texts, one after the other, as that of one."""
    return Packed(
        _chained([plan.stream for plan in plans]),
        _chained([plan.held_out for plan in plans]),
        sum(plan.num_documents for plan in plans),
        sum(plan.corpus_targets for plan in plans),
        all(plan.whole_documents_held_out for plan in plans),
    )


def _chained(parts: Sequence[Rows]) -> Rows:
    offsets = np.cumsum([0, *(len(part.names) for part in parts[:-1])])
    return Rows(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.documents + np.int32(offset) for part, offset in zip(parts, offsets, strict=True)]),
        tuple(name for part in parts for name in part.names),
    )


class Shared(NamedTuple):
    """A document that is in two plans: the plans by their place in the sequence, and its name in each."""

    plans: tuple[int, int]
    names: tuple[str, str]


def shared_document(plans: Sequence[Packed]) -> Shared | None:
    """The first document of a later plan that is in an earlier one too, measured or held out.

    Two documents are the same where their first rows are.
    """
    seen: dict[bytes, tuple[int, str]] = {}
    for number, plan in enumerate(plans):
        own = [found for rows in (plan.stream, plan.held_out) for found in _beginnings(rows)]
        for beginning, name in own:
            if beginning in seen:
                earlier, other = seen[beginning]
                return Shared((earlier, number), (other, name))
        seen |= {beginning: (number, name) for beginning, name in own}
    return None


def _beginnings(rows: Rows) -> Iterator[tuple[bytes, str]]:
    """(first row, name) of every document that is long enough to be known by it."""
    for row in np.flatnonzero(np.diff(rows.documents, prepend=-1)):
        length = rows.lengths[row]
        if length >= _TELLING:
            yield rows.tokens[row, :length].tobytes(), rows.names[rows.documents[row]]

"""Documents to rows of token ids: a row belongs to one document, and every target is scored exactly once."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from fisher_jax._support.errors import InputError
from fisher_jax._support.host_memory import check_memory
from fisher_jax.text.corpora import Document

__all__ = ["Packed", "Rows", "longest_document", "pack"]

# Every HOLD_OUT_EVERY-th document is kept for the pruning curves; with fewer documents, the end of each one.
HOLD_OUT_EVERY = 8
# No document is tokenised further than the budget reaches at this many characters per token.
_MAX_CHARACTERS_PER_TOKEN = 16
_ROW_BYTES = 200  # of a row, beside its tokens, while rows are cut


class Rows(NamedTuple):
    """Right-padded token rows, rows of one document consecutive; `documents` numbers them from 0."""

    tokens: Int32[np.ndarray, "rows seq_len"]
    lengths: Int32[np.ndarray, " rows"]  # at least 2, or 0: an empty row
    documents: Int32[np.ndarray, " rows"]
    names: tuple[str, ...]  # by document number
    first_batch: int = 0  # its number in the plan that these rows are a part of

    @property
    def num_targets(self) -> int:
        """Next-token targets: a row of n tokens has n - 1, and consecutive rows overlap by one token."""
        return int(np.sum(self.lengths[self.lengths > 0] - 1))

    def rows_in_batch(self, batch_size: int) -> int:
        """No batch has more rows than there are."""
        return min(batch_size, len(self.lengths))

    def num_batches(self, batch_size: int) -> int:
        """Batches of constant shape, the last one padded with empty rows."""
        return -(-len(self.lengths) // batch_size)

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens [B, S], mask [B, S], units [B]) from batch `start` on; padding rows carry the last unit.

        B is `batch_size`, or the number of all rows where that is smaller.
        """
        seq_len, batch_size = self.tokens.shape[1], self.rows_in_batch(batch_size)
        for first in range(start * batch_size, len(self.lengths), batch_size):
            rows = slice(first, first + batch_size)
            missing = batch_size - len(self.lengths[rows])
            tokens = np.pad(self.tokens[rows], ((0, missing), (0, 0)))
            lengths = np.pad(self.lengths[rows], (0, missing))
            units = np.pad(self.documents[rows], (0, missing), mode="edge")
            yield tokens, np.arange(seq_len) < lengths[:, None], units

    def names_in_batch(self, index: int, batch_size: int) -> list[str]:
        """Names of the documents that batch `index` holds rows of."""
        numbers = self.documents[index * batch_size : (index + 1) * batch_size]
        return [self.names[number] for number in dict.fromkeys(numbers.tolist())]

    def digest(self) -> str:
        """SHA-256 of the tokens, their lengths and their documents: what a resumed run must see again."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.lengths, self.documents):
            digest.update(np.ascontiguousarray(array, np.int32).tobytes())
        return digest.hexdigest()


class Packed(NamedTuple):
    """What is streamed and what is held out."""

    stream: Rows
    held_out: Rows
    num_documents: int  # in the corpus, chosen or not
    corpus_targets: int  # targets of the whole corpus (of its documents' readable beginnings)
    whole_documents_held_out: bool

    def digest(self) -> str:
        """SHA-256 of what is streamed and of what is held out."""
        return hashlib.sha256(f"{self.stream.digest()} {self.held_out.digest()}".encode()).hexdigest()

    @property
    def choice(self) -> str:
        """How the rows were chosen, in a sentence."""
        stream, held_out, number = self.stream, self.held_out, self.num_documents
        documents = f"{len(stream.names):,} of {number:,} documents" if number > 1 else "one document"
        most = int(np.bincount(stream.documents, weights=stream.lengths - 1).max())
        reach = f"at most {most:,} from each" if number > 1 else f"rows of {stream.tokens.shape[1]}"
        held = (
            f"{held_out.num_targets:,} tokens of {len(held_out.names)} other documents are held out"
            if self.whole_documents_held_out
            else f"the last {held_out.num_targets:,} tokens are held out (fewer than {HOLD_OUT_EVERY} documents)"
        )
        chosen = f"{stream.num_targets:,} tokens of {documents}, {reach} ({self.corpus_targets:,} in all)"
        return f"{chosen}; {held} for pruning"


class _Tokenised(NamedTuple):
    name: str
    tokens: np.ndarray


def pack(
    documents: Iterable[Document],
    encode: Callable[[str], Sequence[int]],
    *,
    seq_len: int,
    max_targets: int,
    held_out_targets: int,
    vocab_size: int,
) -> Packed:
    """Chooses rows so that the budget covers as many documents as possible, and holds documents out.

    Rows are dealt round by round: every document gives its first row, then every document its second one, until
    the budget of targets is spent; the last round takes documents spread evenly over the corpus. The chosen rows
    stand in corpus order, so those of a document are consecutive. The choice depends on nothing but the inputs.

    Raises:
        InputError: fewer tokens than one sequence, or a token id outside the vocabulary.
    """
    limit = longest_document(max_targets, held_out_targets, seq_len)
    tokenised = []
    for name, text in documents:
        tokens = np.asarray(encode(text[:limit]), np.int64)
        _check_tokens(tokens, vocab_size, name)
        if len(tokens) >= 2:
            tokenised.append(_Tokenised(name, tokens.astype(np.int32)))
    total = sum(len(document.tokens) for document in tokenised)
    if total < seq_len:
        raise InputError(
            f"the text has {total} tokens, fewer than one sequence of {seq_len}; give more text or a smaller "
            "--row-length."
        )
    whole = len(tokenised) >= HOLD_OUT_EVERY
    streamed, held = _hold_out(tokenised, whole, seq_len, held_out_targets)
    stream, held_out = _deal(streamed, seq_len, max_targets), _deal(held, seq_len, held_out_targets)
    return Packed(stream, held_out, len(tokenised), total - len(tokenised), whole)


def longest_document(*tokens: int) -> int:
    """Characters of a document that are read where the longest of these is needed of it."""
    return max(tokens) * _MAX_CHARACTERS_PER_TOKEN


def _check_tokens(tokens: np.ndarray, vocab_size: int, name: str) -> None:
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise InputError(
            f"the tokenizer gives token id {bad} in {name}, outside the model's vocabulary of {vocab_size}; "
            "the tokenizer and the model do not belong together."
        )


def _hold_out(
    documents: list[_Tokenised], whole: bool, seq_len: int, held_out_targets: int
) -> tuple[list[_Tokenised], list[_Tokenised]]:
    if whole:
        last = HOLD_OUT_EVERY - 1
        streamed = [d for i, d in enumerate(documents) if i % HOLD_OUT_EVERY != last]
        return streamed, documents[last::HOLD_OUT_EVERY]
    streamed, held = [], []
    share = held_out_targets // len(documents)
    for name, tokens in documents:
        tail = min(max(len(tokens) // HOLD_OUT_EVERY, 2), share + 1)
        cut = max(len(tokens) - tail, min(len(tokens), 2))
        streamed.append(_Tokenised(name, tokens[:cut]))
        if len(tokens) - cut >= 2:
            held.append(_Tokenised(name, tokens[cut:]))
    return streamed, held


def _deal(documents: list[_Tokenised], seq_len: int, budget: int) -> Rows:
    """Rows chosen round by round until `budget` targets; a row is one more token than its targets."""
    step = seq_len - 1
    targets = np.array([len(document.tokens) - 1 for document in documents])
    rows = np.zeros(len(documents), int)  # dealt to each document so far
    left = budget
    while left > 0 and np.any(rows * step < targets):
        candidates = np.flatnonzero(rows * step < targets)
        sizes = np.minimum(targets[candidates] - rows[candidates] * step, step)
        if sizes.sum() > left:
            # As many evenly spread documents as fit, at least one.
            count = max(int(len(candidates) * left / sizes.sum()), 1)
            chosen = np.unique(np.linspace(0, len(candidates) - 1, count).round().astype(int))
            fits = np.cumsum(sizes[chosen]) <= left
            fits[0] |= not rows.any()  # one row at least, whatever the budget
            rows[candidates[chosen[fits]]] += 1
            break
        rows[candidates] += 1
        left -= int(sizes.sum())
    return _cut(documents, rows, seq_len)


def _cut(documents: list[_Tokenised], rows: np.ndarray, seq_len: int) -> Rows:
    number = int(rows.sum())
    check_memory(
        number * (4 * seq_len + _ROW_BYTES),
        f"{number:,} rows of {seq_len:,} tokens",
        "give another --row-length or less text",
    )
    pieces = [
        (number, document.tokens[k * (seq_len - 1) : k * (seq_len - 1) + seq_len])
        for number, document in enumerate(document for document, count in zip(documents, rows, strict=True) if count)
        for k in range(rows[rows > 0][number])
    ]
    tokens = np.zeros((len(pieces), seq_len), np.int32)
    for row, (_, piece) in enumerate(pieces):
        tokens[row, : len(piece)] = piece
    return Rows(
        tokens,
        np.array([len(piece) for _, piece in pieces], np.int32),
        np.array([number for number, _ in pieces], np.int32),
        tuple(document.name for document, count in zip(documents, rows, strict=True) if count),
    )

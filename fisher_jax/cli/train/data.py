"""Batches of a training run: which rows a step sees follows from the seed and the step alone."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fisher_jax._support.errors import InputError
from fisher_jax.cli.train.settings import BYTES, TrainSettings
from fisher_jax.models import Tokenizer
from fisher_jax.models.tokenizer import byte_alphabet, is_byte
from fisher_jax.text.corpora import documents
from fisher_jax.text.packing import Packed, Rows, pack

# More than any text here has; everything that is not held out is trained on.
_ALL = 10**9


class Text(NamedTuple):
    """Rows to train on and rows that are held out, with one token more than the model sees."""

    packed: Packed
    bytes_per_token: float  # of the held-out targets

    def batch(self, settings: TrainSettings, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [B, S + 1], mask) of a step: every row once per epoch, in an order of the epoch's own."""
        rows = self.packed.stream
        size = rows.rows_in_batch(settings.batch_size)
        places = np.arange(step * size, (step + 1) * size)
        return _rows(rows, _order(len(rows.lengths), settings.seed, places))

    def held_out(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The held-out rows in batches of one shape."""
        for tokens, mask, _ in self.packed.held_out.batches(batch_size):
            yield tokens, mask

    def digest(self) -> str:
        return f"{self.packed.stream.digest()[:16]}, held out {self.packed.held_out.digest()[:16]}"


def _order(rows: int, seed: int, places: np.ndarray) -> np.ndarray:
    """Rows at places of an endless sequence of epochs."""
    epochs = {epoch: np.random.default_rng([seed, epoch]).permutation(rows) for epoch in np.unique(places // rows)}
    return np.array([epochs[place // rows][place % rows] for place in places])


def _rows(rows: Rows, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens = rows.tokens[chosen]
    return tokens, np.arange(tokens.shape[1]) < rows.lengths[chosen][:, None]


def read_text(settings: TrainSettings, tokenizer: Tokenizer) -> Text:
    """The text of a run.

    Raises:
        InputError: a source that cannot be read, too little text, or nothing to hold out.
    """
    packed = pack(
        documents(settings.text, split=settings.split_documents),
        tokenizer.encode,
        seq_len=settings.row_length + 1,
        max_targets=_ALL,
        held_out_targets=settings.held_out_tokens,
        vocab_size=tokenizer.vocab_size,
    )
    held = packed.held_out
    if not len(held.lengths):
        raise InputError("the text leaves nothing to hold out; give more of it, or a larger --held-out-tokens.")
    return Text(packed, float(bytes_of_tokens(tokenizer)[_targets(held)].mean()))


def _targets(rows: Rows) -> np.ndarray:
    tokens, mask = _rows(rows, np.arange(len(rows.lengths)))
    return tokens[:, 1:][mask[:, 1:]]


def tokenizer_for(source: str) -> Tokenizer:
    """A byte for every token, or the tokenizer of a model, without its weights."""
    if source == BYTES:
        return _byte_tokenizer()
    from fisher_jax.models.gguf_file import GgufFile
    from fisher_jax.models.gguf_tokenizer import tokenizer_from_gguf
    from fisher_jax.models.hf_folder import HfFolder
    from fisher_jax.models.loading import files_of

    path = files_of(source)
    return HfFolder(path).tokenizer() if path.is_dir() else tokenizer_from_gguf(GgufFile(path))


def _byte_tokenizer() -> Tokenizer:
    """Token ids are the bytes of UTF-8."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """For every token id how many bytes of UTF-8 it stands for; 0 for ids without text."""
    sizes = np.zeros(tokenizer.vocab_size, int)
    for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if tokenizer.bytes_of is not None and id not in tokenizer.added:
            sizes[id] = len(token)
        else:
            sizes[id] = 1 if is_byte(token) else len(token.replace("\u2581", " ").encode())
    return sizes

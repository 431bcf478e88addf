"""Texts that a report or a training run on the same source does not see, to measure a loss on."""

from collections.abc import Iterable, Sequence

import numpy as np

from fisher_jax._support.errors import InputError
from fisher_jax.models import LanguageModel
from fisher_jax.text.corpora import Document, describe_sources, documents
from fisher_jax.text.packing import HOLD_OUT_EVERY

__all__ = ["held_out"]

_TRIED = 256  # characters that tell whether a document has two tokens


def held_out(model: LanguageModel, sources: Sequence[str], split: str, number: int, characters: int) -> list[str]:
    """Beginnings of documents that a report on these sources holds out, spread evenly over them.

    Raises:
        InputError: a source that cannot be read, or too few documents.
    """
    texts = [d.text for d in tokenisable(documents(sources, split=split, longest=max(characters, _TRIED)), model)]
    if len(texts) < HOLD_OUT_EVERY:
        raise InputError(
            f"{describe_sources(sources)} has {len(texts)} documents, fewer than the {HOLD_OUT_EVERY} of which one "
            "is held out; give more files to --text, or --split-documents blank-line."
        )
    held = texts[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    chosen = np.unique(np.linspace(0, len(held) - 1, min(number, len(held))).round().astype(int))
    if len(chosen) < 2:
        raise InputError("one held-out document gives no standard error; give more text")
    return [held[i][:characters] for i in chosen]


def tokenisable(found: Iterable[Document], model: LanguageModel) -> Iterable[Document]:
    """Those that packing counts: of two tokens or more."""
    return (d for d in found if len(model.tokenizer.encode(d.text[:_TRIED])) >= 2)

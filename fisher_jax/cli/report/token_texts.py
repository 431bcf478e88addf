"""The texts of token ids, from whatever a person calls a tokenizer."""

from collections.abc import Callable, Sequence
from typing import Any

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models import Tokenizer


def token_texts(tokenizer: Any, vocab_size: int) -> list[str]:
    """One text for each row of a head.

    A list of texts, a tokenizer of transformers, tokenizers, sentencepiece, tiktoken or one like them, or a function
    of an id; ``None`` shows the ids.

    Raises:
        InputError: something else, or a list that is longer than the vocabulary.
    """
    if tokenizer is None:
        return [f"#{id}" for id in range(vocab_size)]
    if isinstance(tokenizer, Sequence) and not isinstance(tokenizer, str):
        if len(tokenizer) > vocab_size:
            raise InputError(f"tokenizer= has {len(tokenizer):,} texts, but the head has {vocab_size:,} rows")
        return [str(text) for text in tokenizer] + [_without(id) for id in range(len(tokenizer), vocab_size)]
    text = _text_of(tokenizer)
    return [_tried(text, id) for id in range(vocab_size)]


def _text_of(tokenizer: Any) -> Callable[[int], Any]:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.token_text
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "get_added_tokens_decoder") and hasattr(backend, "to_str"):
        return Tokenizer.from_json(backend.to_str()).token_text  # a copy, since ours switches padding off
    if hasattr(tokenizer, "id_to_piece"):  # sentencepiece; its decode drops spaces at the front
        return lambda id: tokenizer.id_to_piece(id).replace("\u2581", " ")
    if hasattr(tokenizer, "decode"):
        return lambda id: tokenizer.decode([id])
    if callable(tokenizer):
        return tokenizer
    raise InputError(
        f"tokenizer= is {shown(tokenizer)}, but must be a list of texts, have decode([id]), or be a function of an id"
    )


def _tried(text: Callable[[int], Any], id: int) -> str:
    """Heads may have rows without a token, for which tokenizers raise what they like."""
    try:
        found = text(id)
    except Exception:
        return _without(id)
    return found if isinstance(found, str) else _without(id)


def _without(id: int) -> str:
    return f"<no text {id}>"

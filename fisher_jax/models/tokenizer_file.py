"""What the package tokenizers does not look at in a ``tokenizer.json``: ids, randomness, failures on plain text."""

import json
from typing import Any

from fisher_jax._support.errors import InputError, shown

__all__ = ["checked_content", "tried"]

# Runs of one character make patterns with nested repetitions fail at once.
PROBES = (
    "", "a", "The river, 1234 hills!\n\n\t it's é漢🙂", "a" * 64 + "!", "1" * 64 + "x", " " * 64 + "x",
    "A" * 64 + "1", "-" * 64 + "a", "ab" * 32 + "!", "a\u0301" * 16,
)  # fmt: skip


def checked_content(content: Any, label: str) -> str | None:
    """The text to read instead where truncation or padding must be left out, else ``None``.

    Raises:
        InputError: two tokens have one id, an added token has another id than the vocabulary gives it, merges are
            skipped at random, or what must be an object is none.
    """
    if not isinstance(content, dict) or not isinstance(model := content.get("model"), dict):
        raise InputError(
            f"{label} is not a tokenizer: it has no model; save it with the fast tokenizer's save_pretrained"
        )
    if (dropout := model.get("dropout")) not in (None, 0) or isinstance(dropout, bool):
        raise InputError(f"{label} skips merges at random (dropout {shown(dropout)}); set it to null")
    check_ids(content, model, label)
    if content.get("truncation") is None and content.get("padding") is None:
        return None
    # Both are switched off anyway, and impossible ones make the package panic.
    return json.dumps(content | {"truncation": None, "padding": None}, ensure_ascii=False)


def check_ids(content: dict, model: dict, label: str) -> None:
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise InputError(f"{label} has added_tokens {shown(added)}, but they must be a list of tokens")
    vocabulary = model.get("vocab")
    known: dict[Any, Any] = vocabulary if isinstance(vocabulary, dict) else {}
    taken = {id: token for token, id in known.items() if isinstance(id, int)}
    if len(taken) < len(known):
        raise InputError(f"{label} gives one id to two tokens, or no whole number; fetch it again")
    for entry in added:
        id, token = entry.get("id"), entry.get("content")
        if isinstance(id, bool) or not isinstance(id, int) or not isinstance(token, str) or not token:
            raise InputError(f"{label} has the added token {shown(entry)}, which lacks an id or a text")
        if taken.setdefault(id, token) != token or known.get(token, id) != id:
            raise InputError(f"{label} gives the id {id} to {shown(token)}, but it is taken by {shown(taken[id])}")


def tried(tokenizer: Any, label: str) -> Any:
    """The same `Tokenizer` after it has read and written ordinary texts, with ids of its own vocabulary."""
    for probe in PROBES:
        for special in (True, False):
            ids = tokenizer.backend.encode(probe, add_special_tokens=special).ids
            if ids and max(ids) >= tokenizer.vocab_size:
                raise InputError(
                    f"{label} makes the token id {max(ids)}, and its own end at {tokenizer.vocab_size - 1}"
                )
        tokenizer.backend.decode(ids, skip_special_tokens=False)
    return tokenizer

"""A smaller vocabulary: embedding, head and tokenizer cut together, every text still encodable."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from fisher_jax._support.errors import InputError
from fisher_jax.models.functions import from_config
from fisher_jax.models.loading import LanguageModel
from fisher_jax.models.tokenizer import Tokenizer, byte_alphabet, is_byte

__all__ = ["Vocabulary", "cut_model", "cut_tokenizer", "kept_tokens", "read_vocabulary"]

BY_VOCABULARY = ("embedding", "head", "head_bias")


class Vocabulary(NamedTuple):
    """What a byte-pair tokenizer needs of its own tokens.

    Attributes:
        size: token ids, 0 to ``size - 1``.
        known: those of them that a token has; some vocabularies have gaps.
        required: ids that stay: single bytes, the space of SentencePiece, added tokens.
        parts: for every id the tokens that byte-pair encoding passes through to make it; without them the token
            would never be made. Empty for tokens that the merges do not make at all.
    """

    size: int
    known: frozenset[int]
    required: frozenset[int]
    parts: tuple[tuple[int, ...], ...]


def read_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The structure of a byte-level tokenizer, or of one with byte fallback; an ``InputError`` for other kinds."""
    content = json.loads(tokenizer.to_json())
    model = content["model"]
    if model["type"] != "BPE":
        raise InputError(f"a tokenizer of the kind {model['type']} cannot be cut; only byte-pair encoding (BPE) can")
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise InputError(f"a tokenizer with {option} {model[option]!r} cannot be cut")
    ids: dict[str, int] = model["vocab"]
    required = {entry["id"] for entry in content["added_tokens"]}
    if tokenizer.bytes_of is not None:
        required |= {ids[symbol] for symbol in byte_alphabet() if symbol in ids}
    else:
        required |= {id for token, id in ids.items() if is_byte(token)} | {ids[t] for t in ("\u2581",) if t in ids}
        if not model.get("byte_fallback") or sum(map(is_byte, ids)) < 256:
            raise InputError(
                "this tokenizer has no token for each byte, so a smaller one could not encode every text"
            )
    if model.get("unk_token") in ids:
        required.add(ids[model["unk_token"]])
    ranks = {tuple(pair): rank for rank, pair in enumerate(map(split_merge, model["merges"]))}
    parts: list[tuple[int, ...]] = [()] * tokenizer.vocab_size
    for token, id in ids.items():
        parts[id] = tuple(ids[piece] for piece in derivation(token, ranks))
    known = frozenset(ids.values()) | required
    return Vocabulary(tokenizer.vocab_size, known, frozenset(required), tuple(parts))


def split_merge(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def derivation(token: str, ranks: dict[tuple[str, ...], int]) -> set[str]:
    """The pieces that byte-pair encoding passes through on its way to this token, single symbols included.

    A text whose tokens are all kept is cut into the same tokens after trimming: at every step the merge of lowest
    rank is the same one, since all merges of the old way are still there.
    """
    pieces, passed = list(token), set(token)
    while len(pieces) > 1:
        rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(pieces)))
        if rank == len(ranks):
            return set()  # the merges end before this token
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        passed.add(pieces[i])
    return passed - {token}


def kept_tokens(vocabulary: Vocabulary, order: Iterable[int | np.integer], keep: int) -> Int[np.ndarray, " kept"]:
    """Exactly ``keep`` ids, ascending: the required ones, then by ``order`` (most important first).

    Ids without a token are passed over.
    A token comes with the tokens that it is made from; one that with these would be too many is left out.

    Raises:
        InputError: ``keep`` is smaller than what is required, or not smaller than the vocabulary.
    """
    if not len(vocabulary.required) <= keep < len(vocabulary.known):
        raise InputError(
            f"{keep:,} tokens cannot be kept of {len(vocabulary.known):,}: give a number from "
            f"{len(vocabulary.required):,} (single bytes and special tokens) to {len(vocabulary.known) - 1:,}"
        )
    kept = set(vocabulary.required)
    for id in order:
        if len(kept) == keep:
            break
        if int(id) not in vocabulary.known:
            continue  # a row of the head without a token
        wanted = {int(id), *vocabulary.parts[id]} - kept
        if len(kept) + len(wanted) <= keep:
            kept |= wanted
    return np.array(sorted(kept))


def cut_tokenizer(tokenizer: Tokenizer, kept: Int[np.ndarray, " kept"]) -> Tokenizer:
    """The tokenizer of these ids, renumbered from 0 in their order."""
    new = {int(old): i for i, old in enumerate(kept)}
    content = json.loads(tokenizer.to_json())
    model = content["model"]
    model["vocab"] = {token: new[id] for token, id in model["vocab"].items() if id in new}
    pairs = [(merge, split_merge(merge)) for merge in model["merges"]]
    model["merges"] = [merge for merge, pair in pairs if {*pair, "".join(pair)} <= model["vocab"].keys()]
    for entry in content["added_tokens"]:
        entry["id"] = new[entry["id"]]
    renumber(content.get("post_processor"), new)
    return Tokenizer.from_json(json.dumps(content, ensure_ascii=False))


def renumber(processor: Any, new: dict[int, int]) -> None:
    """Ids inside a post-processor, in place: templates and pairs of a token and its id."""
    if not processor:
        return
    for inner in processor.get("processors", ()):
        renumber(inner, new)
    for special in processor.get("special_tokens", {}).values():
        special["ids"] = [new[id] for id in special["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name] = [processor[name][0], new[processor[name][1]]]


def cut_model(model: LanguageModel, kept: Int[np.ndarray, " kept"]) -> LanguageModel:
    """The model of these token ids: rows of embedding and head, and the tokenizer; the rest is shared."""
    rows = jnp.asarray(kept)
    params = {name: leaf[rows] if name in BY_VOCABULARY else leaf for name, leaf in model.params.items()}
    config = dataclasses.replace(model.config, vocab_size=len(kept))
    return dataclasses.replace(
        model,
        config=config,
        graphdef=from_config(config).graphdef,
        params=jax.tree.map(jnp.asarray, params),
        tokenizer=cut_tokenizer(model.tokenizer, kept),
        fingerprint="",  # of no file yet
    )

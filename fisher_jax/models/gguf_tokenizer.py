"""The tokenizer inside a GGUF file: byte-level BPE from its tokens, merges and kind of pre-tokenizer."""

from typing import NamedTuple

import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.gguf_file import GgufFile
from fisher_jax.models.optional_packages import optional
from fisher_jax.models.tokenizer import Tokenizer
from fisher_jax.models.tokenizer_errors import refusing_panics, silence
from fisher_jax.models.tokenizer_file import tried

__all__ = ["PRE_TOKENIZERS", "tokenizer_from_gguf", "too_many_tokens"]

# How words are cut before BPE, as published with these models; None is GPT-2's pattern, built into ByteLevel.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Pre(NamedTuple):
    """A pre-tokenizer of GGUF files, with llama.cpp's defaults for what the file does not say."""

    pattern: str | None
    adds_bos: bool = False
    ignores_merges: bool = False  # a word that is a token is not built from merges


PRE_TOKENIZERS = {
    "gpt-2": Pre(None),
    "smollm": Pre(None),
    "llama-bpe": Pre(LLAMA3, adds_bos=True, ignores_merges=True),
    "qwen2": Pre(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
}
CONTROL, USER_DEFINED, LAST_TYPE = 3, 4, 6
KEY = "tokenizer.ggml."
# Llama 3 has 280,147 merges for 128,256 tokens.
MOST_MERGES = 8


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """The file's tokenizer; an ``InputError`` that names its kind where that is not supported."""
    tokenizers, read = optional("tokenizers", "a tokenizer"), file.settings
    model = read.text(f"{KEY}model")
    if model != "gpt2":
        raise InputError(
            f"{file.label} has a tokenizer of the kind {shown(model)}; only byte-level BPE ('gpt2') is read "
            "from GGUF files, so load the model's Hugging Face folder with its tokenizer.json instead"
        )
    kind = read.text(f"{KEY}pre")
    if kind not in PRE_TOKENIZERS:
        raise InputError(
            f"{file.label} has the pre-tokenizer {shown(kind)}; supported: {', '.join(PRE_TOKENIZERS)}; "
            "load the model's Hugging Face folder with its tokenizer.json instead"
        )
    pre, (tokens, types, merges) = PRE_TOKENIZERS[kind], vocabulary_of(file)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError(f"{file.label} names {len(tokens) - len(vocabulary)} of its tokens twice")
    with refusing_panics(f"the merges of {file.label} do not fit its tokens"), silence():
        bpe = tokenizers.models.BPE(vocabulary, merges, ignore_merges=pre.ignores_merges)
    backend = tokenizers.Tokenizer(bpe)
    if kind == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(tokenizers, kind)
    backend.decoder = tokenizers.decoders.ByteLevel()
    for token, type in zip(tokens, types, strict=True):
        if type in (CONTROL, USER_DEFINED):
            added = tokenizers.AddedToken(token, special=type == CONTROL, normalized=False)
            backend.add_special_tokens([added]) if type == CONTROL else backend.add_tokens([added])
    if frame := frame_of(read, pre, tokens):
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*([frame["bos"]] if "bos" in frame else []), "$A", *([frame["eos"]] if "eos" in frame else [])],
            special_tokens=[(token, vocabulary[token]) for token in frame.values()],
        )
    with refusing_panics(f"the tokenizer of {file.label} fails on ordinary text"), silence():
        return tried(Tokenizer(backend), file.label)


def vocabulary_of(file: GgufFile) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """Tokens, their types and merges, each checked for itself and against the rows of the head."""
    read, rows = file.settings, file.shape("token_embd.weight")[0]
    tokens, joined = read.texts(f"{KEY}tokens"), read.texts(f"{KEY}merges")
    if len(tokens) > rows:
        raise InputError(too_many_tokens(file.label, len(tokens), rows))
    if "" in tokens:
        raise InputError(f"{file.label} has a token without text, id {tokens.index('')}")
    types = read.get(f"{KEY}token_type")
    whole = isinstance(types, np.ndarray) and types.dtype.kind in "iu" and len(types) == len(tokens)
    if not whole or (len(types) and not 0 <= types.min() <= types.max() <= LAST_TYPE):
        raise InputError(f"{file.label} needs a type from 0 to {LAST_TYPE} for each of its {len(tokens):,} tokens")
    merges = [tuple(merge.split(" ")) for merge in joined] if len(joined) <= MOST_MERGES * rows else []
    if len(merges) != len(joined) or any(len(merge) != 2 for merge in merges):
        raise InputError(f"the merges of {file.label} do not fit its tokens: each must be two of them with a space")
    return tokens, types.tolist(), merges


def frame_of(read: Settings, pre: Pre, tokens: list[str]) -> dict[str, str]:
    """The tokens before and after each text."""
    defaults = {"bos": pre.adds_bos, "eos": False}
    ends = [end for end in defaults if read.boolean(f"{KEY}add_{end}_token", defaults[end])]
    return {end: tokens[read.integer(f"{KEY}{end}_token_id", 0, len(tokens) - 1)] for end in ends}


def too_many_tokens(label: str, tokens: int, rows: int) -> str:
    return (
        f"vocabulary mismatch between tokenizer and head of {label}: the tokenizer has {tokens} token ids, the head "
        f"{rows} rows"
    )


def pre_tokenizer(tokenizers, kind: str):
    cut, pattern = tokenizers.pre_tokenizers, PRE_TOKENIZERS[kind].pattern
    bytes_only = cut.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if kind == "smollm":
        return cut.Sequence([cut.Digits(individual_digits=True), bytes_only])
    if pattern is None:
        return bytes_only
    return cut.Sequence([cut.Split(tokenizers.Regex(pattern), "isolated"), bytes_only])

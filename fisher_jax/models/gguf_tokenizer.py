"""The tokenizer inside a GGUF file: byte-level BPE from tokens and merges, SentencePiece from tokens and scores."""

from typing import Any

import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.gguf_file import GgufFile
from fisher_jax.models.optional_packages import optional
from fisher_jax.models.pre_tokenizers import PRE_TOKENIZERS
from fisher_jax.models.sentencepiece import merges_by_score
from fisher_jax.models.tokenizer import Tokenizer
from fisher_jax.models.tokenizer_errors import refusing_panics, silence
from fisher_jax.models.tokenizer_file import tried

__all__ = ["tokenizer_from_gguf", "too_many_tokens"]

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE, LAST_TYPE = 2, 3, 4, 5, 6, 6
KEY = "tokenizer.ggml."
# Llama 3 has 280,147 merges for 128,256 tokens.
MOST_MERGES = 8
WAY_OUT = "load the model's Hugging Face folder with its tokenizer.json instead"
# What llama.cpp calls other kinds of tokenizers.
OTHERS = {"t5": "SentencePiece's unigram model", "bert": "WordPiece", "rwkv": "RWKV's tree of words"}


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """The file's tokenizer; an ``InputError`` that names its kind where that is not supported."""
    tokenizers, model = optional("tokenizers", "a tokenizer"), file.settings.text(f"{KEY}model")
    makers = {"gpt2": byte_level, "llama": sentencepiece}
    if model not in makers:
        name = f"{shown(model)} ({OTHERS[model]})" if model in OTHERS else shown(model)
        raise InputError(
            f"{file.label} has a tokenizer of the kind {name}; read from GGUF files are byte-level BPE ('gpt2') and "
            f"SentencePiece's BPE ('llama'), so {WAY_OUT}"
        )
    tokens, types = vocabulary_of(file)
    with refusing_panics(f"the tokenizer of {file.label} does not fit its tokens"), silence():
        backend = makers[model](tokenizers, file, tokens, types)
    with refusing_panics(f"the tokenizer of {file.label} fails on ordinary text"), silence():
        return tried(Tokenizer(backend), file.label)


def byte_level(tokenizers: Any, file: GgufFile, tokens: list[str], types: list[int]) -> Any:
    kind = file.settings.text(f"{KEY}pre")
    if kind not in PRE_TOKENIZERS:
        raise InputError(
            f"{file.label} has the pre-tokenizer {shown(kind)}; supported: {', '.join(PRE_TOKENIZERS)}; {WAY_OUT}"
        )
    pre, vocabulary = PRE_TOKENIZERS[kind], {token: id for id, token in enumerate(tokens)}
    with refusing_panics(f"the merges of {file.label} do not fit its tokens"):
        bpe = tokenizers.models.BPE(vocabulary, merges_of(file), ignore_merges=pre.ignores_merges)
    backend = tokenizers.Tokenizer(bpe)
    if pre.composes:
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = pre.cut(tokenizers)
    backend.decoder = tokenizers.decoders.ByteLevel()
    add_special(tokenizers, backend, tokens, types, {CONTROL, USER_DEFINED})
    add_frame(tokenizers, backend, frame_of(file.settings, tokens, {"bos": pre.adds_bos, "eos": False}, {}))
    return backend


def sentencepiece(tokenizers: Any, file: GgufFile, tokens: list[str], types: list[int]) -> Any:
    """BPE whose pair with the best score is merged first; a character without a token becomes its bytes."""
    read, vocabulary = file.settings, {token: id for id, token in enumerate(tokens)}
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if f"{KEY}{key}" in read.values and read.values[f"{KEY}{key}"] is not False:
            raise InputError(f"{file.label} changes its text by {KEY}{key}, which is not supported; {WAY_OUT}")
    if absent := [token for token in (f"<0x{byte:02X}>" for byte in range(256)) if token not in vocabulary]:
        raise InputError(
            f"{file.label} lacks the token {absent[0]}; only SentencePiece tokenizers with a token for each byte are "
            f"read, so {WAY_OUT}"
        )
    scores, unknown = scores_of(file, tokens), read.integer(f"{KEY}unknown_token_id", 0, len(tokens) - 1, 0)
    apart = {UNKNOWN, CONTROL, USER_DEFINED}
    pieces = {
        token: score for token, score, type in zip(tokens, scores, types, strict=True) if type not in {*apart, BYTE}
    }
    merges = merges_by_score(pieces, file.label)
    bpe = tokenizers.models.BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    backend, (make, undo) = tokenizers.Tokenizer(bpe), (tokenizers.normalizers, tokenizers.decoders)
    prefix = read.boolean(f"{KEY}add_space_prefix", True)
    backend.normalizer = make.Sequence([*([make.Prepend("\u2581")] if prefix else []), make.Replace(" ", "\u2581")])
    backend.decoder = undo.Sequence(
        [undo.Replace("\u2581", " "), undo.ByteFallback(), undo.Fuse(), *([undo.Strip(" ", 1, 0)] if prefix else [])]
    )
    add_special(tokenizers, backend, tokens, types, apart, rstrip=is_phi3(read))
    add_frame(tokenizers, backend, frame_of(read, tokens, {"bos": True, "eos": False}, {"bos": 1, "eos": 2}))
    return backend


def is_phi3(read: Settings) -> bool:
    """Phi-3's own tokenizer drops the spaces behind its special tokens, which no entry of a file says."""
    name = read.text("general.name", "").lower()
    return "phi-3" in name or "phi3" in name


def vocabulary_of(file: GgufFile) -> tuple[list[str], list[int]]:
    """Tokens and their types, each checked for itself and against the rows of the head."""
    read, rows = file.settings, file.shape("token_embd.weight")[0]
    tokens = read.texts(f"{KEY}tokens")
    if len(tokens) > rows:
        raise InputError(too_many_tokens(file.label, len(tokens), rows))
    if "" in tokens:
        raise InputError(f"{file.label} has a token without text, id {tokens.index('')}")
    if (twice := len(tokens) - len(set(tokens))) > 0:
        raise InputError(f"{file.label} names {twice} of its tokens twice")
    types = read.get(f"{KEY}token_type")
    whole = isinstance(types, np.ndarray) and types.dtype.kind in "iu" and len(types) == len(tokens)
    if not whole or (len(types) and not 0 <= types.min() <= types.max() <= LAST_TYPE):
        raise InputError(f"{file.label} needs a type from 0 to {LAST_TYPE} for each of its {len(tokens):,} tokens")
    return tokens, types.tolist()


def merges_of(file: GgufFile) -> list[tuple[str, ...]]:
    """Pairs of tokens, the first merge first."""
    joined, rows = file.settings.texts(f"{KEY}merges"), file.shape("token_embd.weight")[0]
    merges = [tuple(merge.split(" ")) for merge in joined] if len(joined) <= MOST_MERGES * rows else []
    if len(merges) != len(joined) or any(len(merge) != 2 for merge in merges):
        raise InputError(f"the merges of {file.label} do not fit its tokens: each must be two of them with a space")
    return merges


def scores_of(file: GgufFile, tokens: list[str]) -> list[float]:
    scores = file.settings.get(f"{KEY}scores")
    numbers = isinstance(scores, np.ndarray) and scores.dtype.kind in "iuf" and len(scores) == len(tokens)
    if not numbers or not np.all(np.isfinite(scores)):
        raise InputError(f"{file.label} needs a finite score for each of its {len(tokens):,} tokens")
    return scores.tolist()


def add_special(
    tokenizers: Any, backend: Any, tokens: list[str], types: list[int], apart: set[int], *, rstrip: bool = False
) -> None:
    """Tokens that are found in a text before anything else."""
    for token, type in zip(tokens, types, strict=True):
        if type in apart:
            wide = rstrip and token not in ("<unk>", "<s>", "<|endoftext|>")
            special = type != USER_DEFINED
            added = tokenizers.AddedToken(token, special=special, normalized=False, rstrip=wide)
            backend.add_special_tokens([added]) if special else backend.add_tokens([added])


def add_frame(tokenizers: Any, backend: Any, frame: dict[str, str]) -> None:
    """The tokens that a text begins and ends with."""
    if frame:
        around = ([frame[end]] if end in frame else [] for end in ("bos", "eos"))
        before, after = around
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, backend.token_to_id(token)) for token in frame.values()],
        )


def frame_of(read: Settings, tokens: list[str], adds: dict[str, bool], ids: dict[str, int]) -> dict[str, str]:
    """The tokens before and after each text; what a file does not say is as in llama.cpp."""
    ends = [end for end, default in adds.items() if read.boolean(f"{KEY}add_{end}_token", default)]
    return {
        end: tokens[read.integer(f"{KEY}{end}_token_id", 0, len(tokens) - 1, *([ids[end]] if end in ids else []))]
        for end in ends
    }


def too_many_tokens(label: str, tokens: int, rows: int) -> str:
    return (
        f"vocabulary mismatch between tokenizer and head of {label}: the tokenizer has {tokens} token ids, the head "
        f"{rows} rows"
    )

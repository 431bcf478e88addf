"""Tokenizers of GGUF files against tokenizers that are not ours, on a page of awkward text in ten scripts.

The ids in ``awkward_text.json`` are those of llama.cpp (build 11549) on the vocabularies that `awkward_text` makes;
for gpt-4o and tekken those of tiktoken with the published patterns, since llama.cpp knows the case of ASCII letters
only. Where the models' own tokenizers compose characters (NFC), as llama.cpp never does, it was given composed text.
"""

import dataclasses
import json
from itertools import pairwise

import awkward_text as awkward
import numpy as np
import pytest
import tiny_models as tiny

from fisher_jax import models
from fisher_jax._support.errors import InputError
from fisher_jax.models.gguf_file import GgufFile
from fisher_jax.models.gguf_tokenizer import tokenizer_from_gguf
from fisher_jax.models.pre_tokenizers import PRE_TOKENIZERS
from fisher_jax.models.sentencepiece import merges_by_score
from fisher_jax.models.trimming import cut_tokenizer, kept_tokens, read_vocabulary

IDS = awkward.STORED["ids"]
BYTE_LEVEL, PIECES = awkward.byte_level(), awkward.sentencepiece()
ENDS = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": False}


def expected(kind, base):
    return [IDS[kind].get(str(i), ids) for i, ids in enumerate(IDS[base])] if kind != base else IDS[base]


def of_file(path, tokens, **options):
    config = dataclasses.replace(tiny.LLAMA, vocab_size=len(tokens), num_layers=1)
    params = {"embedding": np.zeros((len(tokens), config.width), np.float32)}
    return tokenizer_from_gguf(GgufFile(tiny.write_gguf(path, config, params, token_list=tokens, **options)))


def byte_level(path, pre, metadata=ENDS):
    tokens, merges = BYTE_LEVEL
    types = [3 if token in awkward.SPECIAL else 1 for token in tokens]
    return of_file(path, tokens, merges=merges, types=types, pre=pre, bos=None, metadata=metadata)


def pieces(path, metadata=None, tokens=None, scores=None, types=None, **options):
    given = dict(zip(("token_list", "scores", "types"), PIECES, strict=True))
    given |= {k: v for k, v in {"token_list": tokens, "scores": scores, "types": types}.items() if v is not None}
    tokens = given.pop("token_list")
    return of_file(path, tokens, model="llama", merges=None, bos=None, metadata=metadata, **given, **options)


@pytest.mark.parametrize("pre", [kind for kind in IDS if not kind.startswith("spm")])
def test_byte_level_tokens_are_those_of_another_tokenizer(tmp_path, pre):
    tokenizer = byte_level(tmp_path / "tiny.gguf", pre)
    assert [tokenizer.encode(line) for line in awkward.PAGE] == expected(pre, "gpt-2")
    if not PRE_TOKENIZERS[pre].composes:
        assert [tokenizer.decode(tokenizer.encode(line)) for line in awkward.PAGE] == awkward.PAGE


def test_every_pre_tokenizer_is_one_that_was_compared():
    compared = {PRE_TOKENIZERS[kind]._replace(adds_bos=False) for kind in IDS if not kind.startswith("spm")}
    assert {pre._replace(adds_bos=False) for pre in PRE_TOKENIZERS.values()} == compared


def test_no_part_of_a_pre_tokenizer_is_without_effect_on_the_page():
    for kind in IDS:
        if not kind.startswith(("spm", "gpt-2")):
            others = [other for other in IDS if not other.startswith("spm") and other != kind]
            assert all(expected(kind, "gpt-2") != expected(other, "gpt-2") for other in others), kind


@pytest.mark.parametrize(
    ("kind", "metadata"),
    [
        ("spm", {}),
        ("spm-noprefix", {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_eos_token": True}),
        ("spm-phi3", {"general.name": "Phi-3-mini"}),
    ],
)
def test_sentencepiece_tokens_are_those_of_llama_cpp(tmp_path, kind, metadata):
    renamed = [token.replace("<|im_start|>x", "<|endoftext|>") for token in PIECES[0]]
    tokenizer = pieces(tmp_path / "tiny.gguf", metadata, renamed if kind == "spm-phi3" else None)
    wanted = expected(kind, "spm")
    assert [tokenizer.encode(line) for line in awkward.PAGE] == wanted
    if texts := IDS.get(f"{kind} text"):
        assert [tokenizer.decode(ids) for ids in wanted] == texts
    bare = [tokenizer.encode(line, special=False) for line in awkward.PAGE]
    assert bare == [ids[1 : -1 if metadata.get("tokenizer.ggml.add_eos_token") else None] for ids in wanted]


def test_a_sentencepiece_model_can_be_trimmed(tmp_path):
    tokenizer = pieces(tmp_path / "tiny.gguf")
    vocabulary = read_vocabulary(tokenizer)
    used = sorted({id for line in awkward.PAGE[:10] for id in tokenizer.encode(line)})
    kept = kept_tokens(vocabulary, used, len(vocabulary.known) - 300)
    cut = cut_tokenizer(tokenizer, kept)
    new = {int(old): i for i, old in enumerate(kept)}
    assert set(used) <= new.keys()
    for line in awkward.PAGE[:10]:
        assert cut.encode(line) == [new[id] for id in tokenizer.encode(line)]
    for line in awkward.PAGE:
        assert cut.decode(cut.encode(line, special=False)) == tokenizer.decode(tokenizer.encode(line, special=False))
    again = models.Tokenizer.from_json(cut.to_json())
    assert [again.encode(line) for line in awkward.PAGE] == [cut.encode(line) for line in awkward.PAGE]


def by_score(pieces, text):
    """SentencePiece's rule, word for word: the best pair of neighbours, the first one among equals, until none is."""
    symbols = list(text)
    while True:
        joined = [first + second for first, second in pairwise(symbols)]
        if not any(piece in pieces for piece in joined):
            return symbols
        _, i = min((-pieces[piece], i) for i, piece in enumerate(joined) if piece in pieces)
        symbols[i : i + 2] = [joined[i]]


def test_random_pieces_are_merged_as_sentencepiece_does():
    import tokenizers

    rng = np.random.default_rng(0)
    for _ in range(60):
        known = list("abc")
        for _ in range(12):
            piece = "".join(rng.choice(known, 2))
            if piece not in known and len(piece) < 7:
                known.append(piece)
        scored = {piece: float(-i) for i, piece in enumerate(known)}
        bpe = tokenizers.models.BPE({piece: i for i, piece in enumerate(known)}, merges_by_score(scored, "tiny"))
        for _ in range(20):
            text = "".join(rng.choice(list("abc"), 24))
            assert tokenizers.Tokenizer(bpe).encode(text).tokens == by_score(scored, text), (known, text)


def test_runs_of_spaces_of_one_score_are_cut_as_by_sentencepiece():
    import tokenizers

    # As in Llama's vocabulary: words before runs of 2 to 16 spaces, which all have one score.
    order = [2, 4, 8, 5, 16, 6, 12, 3, 7, 15, 10, 9, 11, 14, 13]
    scored = {"a": -3.0, "_": -4.0, "_a": -1.0} | {"_" * n: -1e9 for n in order}
    bpe = tokenizers.models.BPE({piece: i for i, piece in enumerate(scored)}, merges_by_score(scored, "tiny"))
    for length in range(50):
        text = "a" + "_" * length + "a"
        assert tokenizers.Tokenizer(bpe).encode(text).tokens == by_score(scored, text)


@pytest.mark.parametrize(
    ("pieces", "sentence"),
    [
        ({"a": 0.0, "b": 0.0, "c": 0.0, "ab": -1.0, "bc": -1.0}, "tiny gives 'bc' and 'ab' one score"),
        # Pairs first would cut four into two of two, the first of the text first into three and one.
        ({"a": 0.0, "aa": -1.0, "aaa": -1.0}, "tiny gives runs of 'a' one score, so how 4 of them are cut"),
    ],
)
def test_pieces_whose_order_is_not_defined_are_refused(pieces, sentence):
    with pytest.raises(InputError, match=sentence):
        merges_by_score(pieces, "tiny")
    merges_by_score(pieces | {piece: -float(i) for i, piece in enumerate(pieces)}, "tiny")


def replaced(values, index, value):
    return [*values[:index], value, *values[index + 1 :]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scores": PIECES[1][:-1]}, "needs a finite score for each of its 971 tokens"),
        ({"scores": replaced(PIECES[1], 300, float("nan"))}, "needs a finite score for each"),
        ({"scores": replaced(PIECES[1], 300, float("inf"))}, "needs a finite score for each"),
        ({"types": replaced(PIECES[2], 5, 7)}, "needs a type from 0 to 6 for each of its 971 tokens"),
        ({"types": PIECES[2][:-1]}, "needs a type from 0 to 6"),
        ({"tokens": replaced(PIECES[0], 300, PIECES[0][301])}, "names 1 of its tokens twice"),
        ({"tokens": replaced(PIECES[0], 300, "")}, "has a token without text, id 300"),
        ({"tokens": replaced(PIECES[0], 300, "a" * 300)}, "token of 300 characters; at most 256"),
        ({"tokens": replaced(PIECES[0], 300, "a\u2603")}, "token 'a\u2603', but none for its character '\u2603'"),
        ({"tokens": replaced(PIECES[0], 20, "<byte>")}, "lacks the token <0x0F>; only SentencePiece.*each byte"),
        ({"metadata": {"tokenizer.ggml.remove_extra_whitespaces": True}}, "remove_extra_whitespaces.*not supported"),
        ({"metadata": {"tokenizer.ggml.precompiled_charsmap": "x"}}, "precompiled_charsmap.*not supported"),
        ({"metadata": {"tokenizer.ggml.unknown_token_id": 5000}}, "unknown_token_id 5000.*from 0 to 970"),
        ({"metadata": {"tokenizer.ggml.bos_token_id": 971}}, "bos_token_id 971.*from 0 to 970"),
        ({"metadata": {"tokenizer.ggml.add_space_prefix": 1}}, "add_space_prefix 1.*true or false"),
    ],
)
def test_pieces_that_contradict_themselves_are_refused(tmp_path, change, sentence):
    with pytest.raises(InputError, match=f"tiny.gguf.*{sentence}"):
        pieces(tmp_path / "tiny.gguf", **change)


@pytest.mark.parametrize(
    ("model", "name"), [("t5", "unigram"), ("bert", "WordPiece"), ("rwkv", "RWKV"), ("plamo2", "plamo2")]
)
def test_other_kinds_are_refused_by_name(tmp_path, model, name):
    with pytest.raises(InputError, match=f"kind '{model}'.*{name}|kind '{name}'"):
        of_file(tmp_path / "tiny.gguf", tiny.TOKENS, model=model)


def test_a_model_with_pieces_is_loaded_and_its_tokenizer_is_kept_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHER_JAX_CACHE", str(tmp_path / "cache"))
    tokens, scores, types = PIECES
    config = dataclasses.replace(tiny.LLAMA, vocab_size=len(tokens))
    file = tiny.write_gguf(
        tmp_path / "tiny.gguf", config, tiny.random_params(config), token_list=tokens, scores=scores, types=types,
        model="llama", merges=None, bos=None,
    )  # fmt: skip
    first, second = models.load(file), models.load(file)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for model in (first, second):
        assert [model.tokenizer.encode(line) for line in awkward.PAGE] == IDS["spm"]
    assert json.loads(first.tokenizer.to_json()) == json.loads(second.tokenizer.to_json())

"""Tokens as people read them, and the pre-tokenizers of GGUF files."""

import pytest
import tiny_models as tiny
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as Backend

from fisher_jax import models as fisher_models
from fisher_jax._support.errors import InputError
from fisher_jax.models import Tokenizer


def test_byte_level_tokens_are_shown_as_real_characters():
    tokenizer = Tokenizer(tiny.tokenizer())
    ids = tokenizer.encode(" the é\n<|im_start|>")
    assert [tokenizer.token_text(id) for id in ids] == [" the", " ", "<0xC3>", "<0xA9>", "\n", "<|im_start|>"]
    assert tokenizer.decode(ids) == " the é\n<|im_start|>"


def test_whole_and_broken_characters_in_one_token():
    word = "".join(tiny.byte_alphabet_inverse()[byte] for byte in "aé".encode() + b"\xe2\x82")
    tokenizer = Tokenizer(tiny.tokenizer([*tiny.TOKENS, word]))
    assert tokenizer.token_text(len(tiny.TOKENS)) == "aé<0xE2><0x82>"


def test_sentencepiece_tokens_are_shown_as_real_characters():
    backend = Backend(models.BPE({"<unk>": 0, "\u2581Paris": 1, "<0xE2>": 2, "<0x0A>": 3, "a": 4}, []))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend)
    assert [tokenizer.token_text(id) for id in range(5)] == ["<unk>", " Paris", "<0xE2>", "\n", "a"]


def test_ids_without_text_are_not_decoded():
    tokenizer = Tokenizer(tiny.tokenizer())
    for id in (-1, len(tiny.TOKENS)):
        assert not tokenizer.has_text(id)
        with pytest.raises(InputError, match=f"token id {id} has no text.*0 to {len(tiny.TOKENS) - 1}"):
            tokenizer.decode([id])


def test_truncation_and_padding_of_the_file_are_switched_off():
    backend = tiny.tokenizer()
    backend.enable_truncation(2)
    backend.enable_padding(length=4)
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert len(tokenizer.encode("abcdefg")) == 7
    assert len(tokenizer.encode("a")) == 1


def test_the_models_own_first_token_is_added_unless_refused():
    backend = tiny.tokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.encode("a", special=False) == tokenizer.encode("a")[1:]


def test_special_tokens_are_recognised_in_text_and_vocabulary_counts_ids():
    backend = tiny.tokenizer()
    backend.add_special_tokens([AddedToken("<|new|>", special=True)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size == len(tiny.TOKENS) + 1
    assert tokenizer.encode("<|new|>") == [len(tiny.TOKENS)]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "in 123 the", ["in", " ", "1", "2", "3", " the"]),
        ("gpt-2", "in 123 the", ["in", " ", "12", "3", " the"]),
        ("llama-bpe", "in 123 the", ["in", " ", "12", "3", " the"]),
        ("qwen2", "in 123 the", ["in", " ", "1", "2", "3", " the"]),
        ("llama-bpe", "x(the", ["x", "(the"]),
        ("qwen2", "x(the", ["x", "(the"]),
        ("smollm", "x(the", ["x", "(", "the"]),
    ],
)
def test_pre_tokenizers_cut_words_as_their_models_do(tmp_path, pre, text, pieces):
    merges = [*tiny.MERGES, "( the", "1 2"]
    tokens = [*tiny.TOKENS, "(the", "12"]
    file = tiny.write_gguf(
        tmp_path / "tiny.gguf", tiny.LLAMA, tiny.random_params(tiny.LLAMA), pre=pre, token_list=tokens, merges=merges
    )
    tokenizer = fisher_models.load(file).tokenizer
    assert [tokenizer.token_text(id) for id in tokenizer.encode(text, special=False)] == pieces


def test_gguf_files_that_ask_for_a_first_token_get_it(tmp_path):
    params, asks = tiny.random_params(tiny.LLAMA), {"tokenizer.ggml.add_bos_token": True}
    tokenizer = fisher_models.load(tiny.write_gguf(tmp_path / "t.gguf", tiny.LLAMA, params, metadata=asks)).tokenizer
    assert tokenizer.encode("the")[0] == 0
    assert len(tokenizer.encode("the", special=False)) == 1

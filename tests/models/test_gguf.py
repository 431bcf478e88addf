"""GGUF files: rotary order, architectures, and every way in which a file can be unusable."""

import dataclasses

import decoder_oracle as oracle
import jax
import numpy as np
import pytest
import tiny_models as tiny

from fisher_jax import models
from fisher_jax._support.errors import InputError
from fisher_jax.models.families import undo_interleaving


def assert_logits(model, config, params, **options):
    tokens = tiny.tokens(config)
    want = oracle.logits(config, params, tokens, **options)
    got = jax.jit(model.apply)(model.params, tokens)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_llama_files_are_read_as_interleaved_rotary(tmp_path):
    params = tiny.random_params(tiny.LLAMA)
    model = models.load(tiny.write_gguf(tmp_path / "tiny.gguf", tiny.LLAMA, params))
    assert model.config == tiny.LLAMA
    assert_logits(model, tiny.LLAMA, params, interleaved=True)


def test_llama_biases_of_q_and_k_are_reordered_with_their_rows(tmp_path):
    config = dataclasses.replace(tiny.LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, tied=False)
    params = tiny.random_params(config)
    model = models.load(tiny.write_gguf(tmp_path / "tiny.gguf", config, params))
    assert model.config == config
    assert_logits(model, config, params, interleaved=True)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_files_are_read_as_half_split_rotary(tmp_path, arch):
    config = dataclasses.replace(tiny.QWEN3, qk_norm=arch == "qwen3", qkv_bias=arch == "qwen2", rope_divisors=None)
    params = tiny.random_params(config)
    model = models.load(tiny.write_gguf(tmp_path / "tiny.gguf", config, params, arch=arch, pre="qwen2"))
    assert model.config == config
    assert_logits(model, config, params)


def test_rotary_factors_of_the_file_divide_the_frequencies(tmp_path):
    params, factors = tiny.random_params(tiny.LLAMA), (1.0, 2.5, 8.0)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    config = dataclasses.replace(tiny.LLAMA, rope_divisors=(2.0, 5.0, 16.0))
    file = tiny.write_gguf(
        tmp_path / "tiny.gguf", config, params, metadata=linear, tensors={"rope_freqs.weight": factors}
    )
    model = models.load(file)
    assert model.config == config
    assert_logits(model, config, params, interleaved=True)


def test_reordering_moves_row_2i_to_i_and_row_2i_plus_1_to_half_plus_i():
    rows = np.arange(12)
    np.testing.assert_array_equal(undo_interleaving(rows, 2), [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11])
    np.testing.assert_array_equal(undo_interleaving(rows[:, None] * [1, 10], 2)[1], [2, 20])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"arch": "gemma"}, "architecture 'gemma'.*llama, qwen2, qwen3"),
        ({"model": "t5"}, "tokenizer of the kind 't5'.*unigram"),
        ({"pre": "bloom"}, "pre-tokenizer 'bloom'.*smollm"),
        ({"metadata": {"llama.rope.scaling.type": "su"}}, "rotary scaling 'su'.*yarn"),
        ({"metadata": {"llama.attention.clamp_kqv": 8.0}}, "not supported: attention.clamp_kqv"),
        ({"metadata": {"llama.expert_count": 8}}, "lacks .*expert_used_count"),
        ({"metadata": {"llama.rope.dimension_count": 4}}, "rope.dimension_count 4.*head size 6"),
        ({"metadata": {"split.count": 2}}, r"one of 2 parts.*its name must say which: NAME-00001-of-00002\.gguf"),
        ({"metadata": {"split.count": 5000}}, "split.count 5000, which cannot be"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": np.ones(3)}}, "holds blk.0.ffn_gate_inp.weight"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "lacks blk.1.ffn_up.weight"),
        ({"tensors": {"token_embd.weight": None}}, "lacks the tensor token_embd.weight"),
        ({"tensors": {"output_norm.weight": np.full(12, np.nan)}}, "output_norm.weight.*12 values.*NaN"),
        ({"tensors": {"blk.0.attn_k.weight": np.ones((12, 6))}}, r"attn_k.weight.*\[6, 12\].*\[12, 12\]"),
        ({"token_list": [*tiny.TOKENS, *"①②③④⑤⑥"]}, "mismatch.*269 token ids.*268 rows"),
        ({"token_list": [*tiny.TOKENS, "the"]}, "names 1 of its tokens twice"),
        ({"token_list": [token for token in tiny.TOKENS if token != "the"]}, "merges.*do not fit"),
    ],
)
def test_files_that_cannot_be_read_exactly_are_refused(tmp_path, options, sentence):
    file = tmp_path / "tiny.gguf"
    arch = options.get("arch", "llama")
    tiny.write_gguf(file, tiny.LLAMA, tiny.random_params(tiny.LLAMA), **{**options, "arch": arch})
    with pytest.raises(InputError, match=sentence):
        models.load(file)


def test_a_sliding_window_is_that_of_every_layer(tmp_path):
    params, window = tiny.random_params(tiny.LLAMA), {"llama.attention.sliding_window": 4}
    model = models.load(tiny.write_gguf(tmp_path / "tiny.gguf", tiny.LLAMA, params, metadata=window))
    config = dataclasses.replace(tiny.LLAMA, window=4)
    assert model.config == config
    assert_logits(model, config, params, interleaved=True)


@pytest.mark.parametrize("kept", [6, 40, 3000, 0.5, 0.999])
def test_cut_off_files_are_refused(tmp_path, kept):
    file = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.LLAMA, tiny.random_params(tiny.LLAMA))
    content = file.read_bytes()
    file.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    with pytest.raises(InputError, match=r"tiny.gguf is cut off or damaged .*fetch"):
        models.load(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"{}"])
def test_foreign_files_are_refused(tmp_path, content):
    file = tmp_path / "foreign.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"foreign\.gguf is not a GGUF file"):
        models.load(file)

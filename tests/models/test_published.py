"""Folders and files as published: padded heads, pre-tokenizers' defaults, files beside the weights, adapters."""

import json

import decoder_oracle as oracle
import numpy as np
import pytest
import tiny_models as tiny
from published_models import llama3_config, llama3_gguf, llama_folder, write_json
from safetensors.numpy import save_file

from fisher_jax import models
from fisher_jax._support.errors import InputError
from fisher_jax.models.beside_weights import read_origin


def test_rows_of_the_head_without_a_token_are_shown_as_such():
    tokenizer = models.Tokenizer(tiny.tokenizer())
    assert tokenizer.token_text(151_700) == "<no text 151700>"
    with pytest.raises(InputError, match="-1"):
        tokenizer.token_text(-1)


@pytest.mark.parametrize(
    ("pre", "adds"), [("llama-bpe", True), ("qwen2", False), ("gpt-2", False), ("smollm", False)]
)
def test_without_a_setting_llama_cpps_default_decides_about_the_first_token(tmp_path, pre, adds):
    params = tiny.random_params(tiny.LLAMA)
    for said, wanted in ({}, adds), ({"tokenizer.ggml.add_bos_token": not adds}, not adds):
        file = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.LLAMA, params, pre=pre, metadata=said)
        assert (models.load(file).tokenizer.encode("the")[0] == 0) == wanted


BESIDE = ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")


def test_other_weights_beside_the_model_are_named_and_not_read(tmp_path):
    folder = llama_folder(tmp_path / "model")
    for name in BESIDE:
        (folder / name).write_bytes(b"not weights at all")
    model = models.load(folder)
    assert sorted(model.unread) == sorted(BESIDE)
    (folder / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(InputError, match=r"no model\.safetensors.*adapter_model\.safetensors.*consolidated"):
        models.load(folder)


def test_links_as_in_the_hubs_cache_are_followed(tmp_path):
    folder = llama_folder(tmp_path / "model", shards=2)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(f"../blobs/{i}")
    assert models.load(folder).config == tiny.LLAMA


def test_only_what_is_read_is_fetched_from_the_hub(tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    there = llama_folder(tmp_path / "hub", shards=2)
    for name in BESIDE:
        (there / name).write_bytes(b"")
    (there / "original").mkdir()
    (there / "original" / "consolidated.00.pth").write_bytes(b"")
    fetched = set()

    def download(name, *, allow_patterns, **options):
        files = [str(file.relative_to(there)) for file in there.rglob("*") if file.is_file()]
        fetched.update(file for file in files if any(fnmatch.fnmatch(file, wish) for wish in allow_patterns))
        return there

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    models.load("someone/tiny")
    shards = {"model-00000.safetensors", "model-00001.safetensors"}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors.index.json"} | shards


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ],
)
def test_quantized_folders_are_called_by_their_name(tmp_path, settings, word):
    with pytest.raises(InputError, match=word):
        models.load(llama_folder(tmp_path / "model", **settings))


def test_rotary_settings_for_each_kind_of_layer_are_refused(tmp_path):
    parts = {kind: {"rope_type": "default", "rope_theta": 100.0} for kind in ("full_attention", "sliding_attention")}
    with pytest.raises(InputError, match=r"kinds of layers.*full_attention"):
        models.load(llama_folder(tmp_path / "model", rope_parameters=parts))


@pytest.mark.parametrize(("inside", "refused"), [(500.0, True), (100.0, False)])
def test_two_bases_of_rotations_must_be_one(tmp_path, inside, refused):
    folder = llama_folder(tmp_path, rope_theta=100.0, rope_parameters={"rope_type": "default", "rope_theta": inside})
    if refused:
        with pytest.raises(InputError, match=r"rope_theta 100\.0, but it must be the 500 of its rope_parameters"):
            models.load(folder)
    else:
        assert models.load(folder).config.rope_base == 100.0


def test_a_lora_adapter_is_called_by_its_name(tmp_path):
    folder = llama_folder(tmp_path / "adapter")  # some come with the settings of their base
    (folder / "model.safetensors").unlink()
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "someone/base"})
    save_file({"base_model.model.lora_A.weight": np.ones((2, 2), np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"LoRA adapter.*someone/base"):
        models.load(folder)


def qwen(folder, kind, config, **settings):
    name = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
    return llama_folder(folder, config, **{"model_type": kind, "architectures": [name], **settings})


def test_qwen3_without_a_head_size_has_128(tmp_path):
    config = models.DecoderConfig(
        vocab_size=len(tiny.TOKENS), width=12, num_layers=1, num_heads=2, num_kv_heads=1, head_size=128, mlp_size=10,
        max_positions=16, qk_norm=True, tied=False,
    )  # fmt: skip
    folder = qwen(tmp_path / "model", "qwen3", config)
    settings = json.loads((folder / "config.json").read_text())
    del settings["head_dim"]
    write_json(folder / "config.json", settings)
    model = models.load(folder)
    assert model.config.head_size == 128
    tokens = tiny.tokens(config)
    want = oracle.logits(config, tiny.random_params(config), tokens)
    np.testing.assert_allclose(model.apply(model.params, tokens), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"max_window_layers": 2}, None),  # the first two of two layers see everything
        ({"max_window_layers": 28}, None),
        ({"layer_types": ["full_attention"] * 2, "max_window_layers": 0}, None),
        ({"max_window_layers": 1}, (False, True)),
        ({"layer_types": ["full_attention", "sliding_attention"]}, (False, True)),
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
    ],
)
def test_a_window_counts_only_where_a_layer_uses_it(tmp_path, settings, layers):
    import dataclasses

    config = dataclasses.replace(tiny.LLAMA, qkv_bias=True)
    folder = qwen(
        tmp_path / "model", "qwen2", config, **{"use_sliding_window": True, "sliding_window": 8, **settings}
    )
    found = models.load(folder).config
    assert (found.window, found.window_layers) == (layers and 8, layers)
    assert found.max_positions == 16


def test_mistral_without_a_window_setting_has_4096_and_null_means_none(tmp_path):
    import dataclasses

    config = dataclasses.replace(tiny.LLAMA, max_positions=8192)
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert models.load(llama_folder(tmp_path / "a", config, **mistral)).config.window == 4096
    without = llama_folder(tmp_path / "b", config, **mistral, sliding_window=None)
    assert models.load(without).config.window is None


def test_a_gguf_with_rotary_factors_of_llama3_is_written_with_its_scaling(tmp_path):
    config = llama3_config()
    model = models.load(llama3_gguf(tmp_path / "tiny.gguf", config))
    models.save(tmp_path / "out", model.config, model.params, model.tokenizer)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_scaling"] == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    np.testing.assert_allclose(models.load(tmp_path / "out").config.rope_divisors, config.rope_divisors, rtol=1e-12)


@pytest.mark.parametrize(("low", "high", "original"), [(1.0, 4.0, 1024), (2.0, 6.0, 4096), (1.0, 2.0, 20_000)])
def test_other_parameters_of_that_scaling_are_found_too(tmp_path, low, high, original):
    from fisher_jax.models.config import llama3_divisors
    from fisher_jax.models.rotary_scaling import llama3_scaling

    divisors = llama3_divisors(
        factor=8.0, low_freq_factor=low, high_freq_factor=high, original_positions=original, base=1e6, head_size=128
    )
    found = llama3_scaling(tuple(float(np.float32(x)) for x in divisors), 1e6)
    again = llama3_divisors(
        factor=found["factor"], low_freq_factor=found["low_freq_factor"], high_freq_factor=found["high_freq_factor"],
        original_positions=found["original_max_position_embeddings"], base=1e6, head_size=128,
    )  # fmt: skip
    np.testing.assert_allclose(again, divisors, rtol=1e-6)


ORIGIN = {
    "bos_token_id": 4, "eos_token_id": [4, 9], "pad_token_id": 5, "hidden_size": 4, "suppress_tokens": [5, 9],
    "begin_suppress_tokens": [1, 5], "bad_words_ids": [[4], [5, 9], [9, 9]], "forced_bos_token_id": 9,
    "forced_decoder_ids": [[1, 9], [2, 5]], "sequence_bias": [[[4, 9], 2.0], [[5], 1.0]],
    "force_words_ids": [[9], [[4], [5]]], "pad_id": 4, "num_hidden_layers": 9,
}  # fmt: skip


def test_every_token_id_in_settings_gets_its_new_number():
    from fisher_jax.models.token_ids import renumbered

    assert renumbered(ORIGIN, {1: 0, 4: 1, 9: 2}) == {
        "bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": None, "hidden_size": 4, "suppress_tokens": [2],
        "begin_suppress_tokens": [0], "bad_words_ids": [[1], [2, 2]], "forced_bos_token_id": 2,
        "forced_decoder_ids": [[1, 2]], "sequence_bias": [[[1, 2], 2.0]], "force_words_ids": [[2], [[1]]],
        "pad_id": 4, "num_hidden_layers": 9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", {"eos_token_id": "x"}),
        ("generation_config.json", {"suppress_tokens": [10**9]}),
        ("generation_config.json", {"bad_words_ids": [1]}),
        ("generation_config.json", ["eos_token_id"]),
        ("tokenizer_config.json", {"eos_token": 7}),
        ("tokenizer_config.json", {"chat_template": 7}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
    ],
)
def test_settings_for_generation_that_mean_nothing_are_refused(tmp_path, file, content):
    folder = llama_folder(tmp_path / "model")
    write_json(folder / file, content)
    models.load(folder)  # nothing of it changes the computation
    with pytest.raises(InputError, match=file):
        read_origin(str(folder))

"""Hugging Face folders: every supported family against the loops, every unsupported switch refused."""

import dataclasses
import json
import math

import decoder_oracle as oracle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models as tiny

from fisher_jax import models
from fisher_jax._support.errors import InputError
from fisher_jax.models.config import llama3_divisors


def assert_logits(model, config, params):
    tokens = tiny.tokens(config)
    want = oracle.logits(config, params, tokens)
    got = jax.jit(model.apply)(model.params, tokens)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def llama_folder(folder, config=tiny.LLAMA, *, tensors=None, shards=1, token_list=tiny.TOKENS, **settings):
    found = {**tiny.hf_tensors(tiny.random_params(config)), **(tensors or {})}
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    settings = tiny.llama_settings(config, **settings)
    return tiny.write_hf(folder / "tiny", settings, found, shards=shards, token_list=token_list)


@pytest.mark.parametrize("shards", [1, 3])
def test_llama_in_one_file_and_in_shards(tmp_path, shards):
    model = models.load(llama_folder(tmp_path, shards=shards))
    assert model.config == tiny.LLAMA
    assert (model.name, model.tokenizer.vocab_size) == ("tiny", tiny.LLAMA.vocab_size - 5)
    assert_logits(model, tiny.LLAMA, tiny.random_params(tiny.LLAMA))


FAMILIES = {
    "biases": (
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied": False},
        {"attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ({}, {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}),
    "qwen2": (
        {"qkv_bias": True},
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4,
         "use_sliding_window": False},
    ),
    "qwen3": ({"qk_norm": True}, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}),
    "linear": ({"rope_divisors": (4.0,) * 3}, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "base of transformers 5": (
        {"rope_base": 50.0},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
    ),
    "window": ({"window": 4}, {"model_type": "mistral", "architectures": None, "sliding_window": 4}),
}  # fmt: skip


@pytest.mark.parametrize(("change", "settings"), FAMILIES.values(), ids=FAMILIES.keys())
def test_the_llama_family(tmp_path, change, settings):
    config = dataclasses.replace(tiny.LLAMA, **change)
    model = models.load(llama_folder(tmp_path, config, **{"max_position_embeddings": 16, **settings}))
    assert model.config == config
    assert_logits(model, config, tiny.random_params(config))


def test_llama3_scaling_divides_long_wavelengths_only(tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    divisors = llama3_divisors(**scaling, original_positions=8192, base=500_000.0, head_size=128)
    for i, divisor in enumerate(divisors):  # the three cases as Llama 3.1 was published
        frequency = 500_000.0 ** (-i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            scaled = frequency
        elif wavelength > 8192 / 1:
            scaled = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            scaled = (1 - smooth) * frequency / 8 + smooth * frequency
        assert frequency / divisor == pytest.approx(scaled, rel=1e-12)
    rope = {"rope_type": "llama3", "original_max_position_embeddings": 16, **scaling}
    config = dataclasses.replace(
        tiny.LLAMA, rope_divisors=llama3_divisors(**scaling, original_positions=16, base=100.0, head_size=6)
    )
    assert len(set(config.rope_divisors)) > 1
    model = models.load(llama_folder(tmp_path, config, rope_scaling=rope))
    assert model.config == config


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_with_and_without_prefix(tmp_path, prefix):
    params = tiny.random_params(tiny.GPT2)
    tensors = tiny.gpt2_tensors(params, prefix)
    tensors[f"{prefix}h.0.attn.bias"] = np.tri(16, dtype=np.float32)  # the causal mask of old checkpoints
    model = models.load(tiny.write_hf(tmp_path / "tiny", tiny.gpt2_settings(tiny.GPT2), tensors))
    assert model.config == tiny.GPT2
    assert_logits(model, tiny.GPT2, params)


def test_bfloat16_files_load_exactly_in_both_dtypes(tmp_path):
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in tiny.hf_tensors(tiny.random_params(tiny.LLAMA)).items()}
    folder = llama_folder(tmp_path, tensors=tensors)
    full, half = models.load(folder), models.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(full.params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, full.params, half.params)
    assert full.fingerprint == half.fingerprint


def test_a_head_that_equals_the_tied_embedding_is_accepted_and_another_refused(tmp_path):
    embedding = tiny.hf_tensors(tiny.random_params(tiny.LLAMA))["model.embed_tokens.weight"]
    assert models.load(llama_folder(tmp_path, tensors={"lm_head.weight": embedding})).config.tied
    with pytest.raises(InputError, match=r"tie_word_embeddings.*lm_head\.weight differs"):
        models.load(llama_folder(tmp_path, tensors={"lm_head.weight": embedding + 1}))


def test_without_the_setting_a_head_in_the_files_decides_about_tying(tmp_path):
    assert models.load(llama_folder(tmp_path, tie_word_embeddings=None)).config.tied
    untied = dataclasses.replace(tiny.LLAMA, tied=False)
    assert not models.load(llama_folder(tmp_path, untied, tie_word_embeddings=None)).config.tied


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}, "FalconForCausalLM.*LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'.*llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn.k_proj.bias"),
        ({"num_hidden_layers": 1}, "holds model.layers.1.input_layernorm.weight.* and 4 more"),
        ({"intermediate_size": 11}, r"mlp.down_proj.*\[10, 12\].*\[11, 12\]"),
        ({"tensors": {"model.norm.weight": np.full(12, np.inf, np.float32)}}, "model.norm.weight.*12 values"),
        ({"tensors": {"model.norm.weight": np.ones(12, np.int8)}}, "stored as I8"),
        ({"tensors": {"extra": np.ones(1, np.float32)}}, "holds extra"),
        ({"token_list": [*tiny.TOKENS, *"①②③④⑤⑥"]}, "mismatch.*269 token ids.*268 rows"),
    ],
)
def test_switches_and_files_that_are_not_supported_are_refused(tmp_path, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        models.load(llama_folder(tmp_path, **settings))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"activation_function": "relu"}, "activation_function 'relu'.*'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 5}, "n_embd 12.*n_head 5"),
    ],
)
def test_gpt2_switches_that_are_not_supported_are_refused(tmp_path, settings, sentence):
    tensors = tiny.gpt2_tensors(tiny.random_params(tiny.GPT2))
    with pytest.raises(InputError, match=sentence):
        models.load(tiny.write_hf(tmp_path / "tiny", tiny.gpt2_settings(tiny.GPT2, **settings), tensors))


def test_incomplete_folders_are_refused(tmp_path):
    folder = llama_folder(tmp_path, shards=2)
    (folder / "model-00001.safetensors").rename(tmp_path / "kept")
    with pytest.raises(InputError, match=r"lacks model-00001\.safetensors"):
        models.load(folder)
    (tmp_path / "kept").rename(folder / "model-00001.safetensors")
    (folder / "tokenizer.json").rename(tmp_path / "kept")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        models.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer: it has no model"):
        models.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        models.load(folder)


def test_a_folder_without_safetensors_and_a_cut_off_file_are_refused(tmp_path):
    folder = llama_folder(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="cut off or damaged"):
        models.load(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        models.load(folder)


def test_fingerprint_follows_weights_and_configuration(tmp_path):
    folder = llama_folder(tmp_path)
    first = models.load(folder).fingerprint
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rope_theta": 101.0}))
    second = models.load(folder).fingerprint
    tensors = tiny.hf_tensors(tiny.random_params(tiny.LLAMA))
    other = models.load(llama_folder(tmp_path, tensors={"model.norm.weight": tensors["model.norm.weight"] * 2}))
    assert len({first, second, other.fingerprint}) == 3
    assert models.load(llama_folder(tmp_path)).fingerprint == first

"""A saved folder holds the tensors that Hugging Face names, and loads back bit for bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_models as tiny
from safetensors.numpy import load_file

from fisher_jax import models
from fisher_jax._support.errors import InputError

CONFIGS = {
    "llama": tiny.LLAMA,
    "llama with biases": dataclasses.replace(tiny.LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, tied=False),
    "linear rotary scaling": dataclasses.replace(tiny.LLAMA, rope_divisors=(4.0,) * 3),
    "any divisors": dataclasses.replace(tiny.LLAMA, rope_divisors=(1.0, 2.0, 4.0), rope_amplitude=1.5),
    "mistral": dataclasses.replace(tiny.LLAMA, window=4),
    "qwen2": dataclasses.replace(tiny.LLAMA, qkv_bias=True),
    "qwen2 with a window": dataclasses.replace(tiny.LLAMA, qkv_bias=True, window=4, window_layers=(False, True)),
    "qwen3": dataclasses.replace(tiny.QWEN3, qkv_bias=False, rope_divisors=None),
    "gpt2": tiny.GPT2,
}


def saved(folder, config, dtype="float32", **options):
    params = tiny.random_params(config, dtype=dtype)
    models.save(folder, config, params, models.Tokenizer(tiny.tokenizer()), **options)
    return params


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_saved_model_loads_back_bit_for_bit(tmp_path, config):
    params = saved(tmp_path, config)
    model = models.load(tmp_path)
    assert model.config == config
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, params))
    assert model.tokenizer.encode("in the than") == models.Tokenizer(tiny.tokenizer()).encode("in the than")


def test_tensors_have_the_names_and_orientation_of_the_independent_writer(tmp_path):
    for name, expected in {
        "llama": tiny.hf_tensors(tiny.random_params(tiny.LLAMA)),
        "gpt2": tiny.gpt2_tensors(tiny.random_params(tiny.GPT2), "transformer."),
    }.items():
        saved(tmp_path / name, CONFIGS[name])
        written = load_file(tmp_path / name / "model.safetensors")
        assert written.keys() == expected.keys()
        assert all(np.array_equal(written[key], expected[key]) for key in expected)


def test_settings_that_say_another_decoder_are_refused_before_a_file_is_written(tmp_path):
    with pytest.raises(InputError, match=r"LlamaForCausalLM differs in rope_base"):
        saved(tmp_path / "out", tiny.LLAMA, settings={"model_type": "llama", "rope_theta": 7.0})
    assert not (tmp_path / "out").exists()


def test_bfloat16_stays_and_settings_win(tmp_path):
    settings = {"eos_token_id": 1, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    config = CONFIGS["linear rotary scaling"]
    saved(tmp_path, config, "bfloat16", settings=settings, tokenizer_settings={"eos_token": "<|im_start|>"})
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["eos_token_id"], written["dtype"]) == (1, "bfloat16")
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype.name == "bfloat16"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_start|>"
    assert models.load(tmp_path, dtype="bfloat16").config == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logit_soft_cap": 30.0}, "logit_soft_cap=30.0"),
        ({"qkv_bias": True, "mlp_bias": True}, "no family"),
    ],
)
def test_what_no_family_computes_is_refused_before_a_file_is_written(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        saved(tmp_path / "out", dataclasses.replace(tiny.LLAMA, **change))
    assert not (tmp_path / "out").exists()

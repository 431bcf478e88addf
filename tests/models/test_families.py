"""Every family against transformers: logits, each of its switches, and what is written."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import NAMES, reference, token_ids, told, write_folder
from safetensors.numpy import load_file

from fisher_jax import models
from fisher_jax._support.errors import InputError
from fisher_jax.models.beside_weights import read_origin
from fisher_jax.models.families import FAMILIES
from fisher_jax.models.families.gguf_architectures import ARCHITECTURES
from fisher_jax.models.functions import abstract_params, from_config
from fisher_jax.models.hf_config import config_from_hf
from fisher_jax.models.saving import hf_settings
from fisher_jax.models.weight_names import flatten, unflatten

TOLERANCE = 3e-5
SIZES = {field.name for field in dataclasses.fields(models.DecoderConfig) if field.default is dataclasses.MISSING}
PLAIN = {field.name: field.default for field in dataclasses.fields(models.DecoderConfig) if field.name not in SIZES}


def config_of(name):
    content = told(name)
    head = any(tensor.endswith(("lm_head.weight", "embed_out.weight")) for tensor in content["tensors"])
    return config_from_hf(content["settings"], name, has_head=head)


@functools.cache
def loaded(name, folder):
    return models.load(write_folder(folder / name, reference(name).settings, reference(name).tensors))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def logits(config, params):
    """One operation after the other, whose programs all families share."""
    with jax.disable_jit():
        return np.asarray(from_config(config).apply(params, token_ids()))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, folder):
    model, want = loaded(name, folder), reference(name).logits
    assert want.std() == pytest.approx(3.0, rel=0.02)
    np.testing.assert_allclose(logits(model.config, model.params), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "phi4_mini", "smollm3"])
def test_so_are_those_of_scanned_layers(name, folder):
    model = loaded(name, folder)
    got = jax.jit(model.apply)(model.params, token_ids())
    np.testing.assert_allclose(got, reference(name).logits, rtol=0, atol=TOLERANCE)


def used_switches():
    for name in NAMES:
        config = config_of(name)
        for switch, plain in PLAIN.items():
            # Divisors of long rows come with the number of positions, and change nothing in short rows.
            alone = switch not in ("norm_eps", "rope_original_positions") and name != "phi4_mini_short"
            if alone and getattr(config, switch) != plain:
                yield name, switch


def without(config, switch):
    """The decoder with one switch as in Llama, and as few others changed as its validity asks for."""
    changes = {switch: PLAIN[switch]}
    if switch == "num_experts":
        changes["experts_per_token"] = None
    if switch == "experts_per_token":
        changes = {switch: config.experts_per_token - 1}
    if switch == "window":
        changes = {switch: config.max_positions}
    if switch == "rope_divisors_long":
        changes["rope_original_positions"] = None
    if switch == "rope_divisors":
        changes |= {"rope_divisors_long": None, "rope_original_positions": None}
    if switch == "rope_size":
        more = (config.head_size - config.rope_size) // 2 * (1.0,)
        changes |= {x: d + more for x in ("rope_divisors", "rope_divisors_long") if (d := getattr(config, x))}
    return dataclasses.replace(config, **changes)


def refitted(params, config):
    """The parameters that the decoder has; those that there were not are random."""
    rng, there = np.random.default_rng(1), flatten(params)
    found = {}
    for path, leaf in flatten(abstract_params(config)).items():
        fits = path in there and there[path].shape == leaf.shape
        found[path] = there[path] if fits else jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
    return unflatten(found)


@pytest.mark.parametrize(("name", "switch"), list(used_switches()))
def test_every_switch_matters(name, switch, folder):
    config = without(config_of(name), switch)
    off = logits(config, refitted(loaded(name, folder).params, config))
    assert np.abs(off - reference(name).logits).max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_transformers_wrote_say_the_same(name):
    assert config_from_hf(reference(name).saved, name, has_head=False) == config_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_written_folder_holds_the_same_tensors_and_loads_back_bit_for_bit(name, folder, tmp_path):
    model, tensors = loaded(name, folder), reference(name).tensors
    origin = read_origin(str(folder / name))
    models.save(tmp_path, model.config, model.params, model.tokenizer, settings=origin.settings)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
    again = models.load(tmp_path)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))


@pytest.mark.parametrize("name", NAMES)
def test_settings_follow_from_the_decoder_alone(name):
    config, kind = config_of(name), told(name)["settings"]["model_type"]
    written = hf_settings(config)
    # Without LongRoPE, Phi-3 computes what Mistral does.
    assert written["model_type"] == ("mistral" if name == "phi3" else kind)
    assert config_from_hf(hf_settings(config, {"model_type": kind}), name, has_head=False) == config


@pytest.mark.parametrize("name", ["llama3", "gemma3", "granite"])
def test_an_attention_scale_that_says_the_default_is_written(name):
    config = config_of(name)
    plain = dataclasses.replace(config, attention_scale=None)
    said = dataclasses.replace(config, attention_scale=config.head_size**-0.5)
    assert hf_settings(said) == hf_settings(plain)
    with pytest.raises(InputError, match="attention_scale"):
        hf_settings(dataclasses.replace(config, attention_scale=0.3), {"model_type": "llama"})


def test_the_page_of_families_lists_each_of_them_and_its_architecture_of_gguf():
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", page, re.M)[1:]
    assert {kind for kind, _ in rows} == FAMILIES.keys()
    assert set(re.findall(r"`(\w+)`", " ".join(gguf for _, gguf in rows))) == ARCHITECTURES.keys()

"""GGUF files of every architecture hold the decoder and the parameters of the Hugging Face folder they come from."""

import dataclasses

import gguf_families
import jax
import numpy as np
import pytest
from reference_models import reference, told, write_folder

from fisher_jax import models
from fisher_jax._support.errors import InputError
from fisher_jax.models.gguf_file import GgufFile
from fisher_jax.models.hf_folder import HfFolder

HEADS = {"attention.key_length": 16, "attention.value_length": 16}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
PHI4 = {"rope.dimension_count": 12, "rope.scaling.attn_factor": 1.5, "attention.sliding_window": 0}
GEMMA3 = HEADS | {"attention.sliding_window": 7}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
METADATA = {
    "gemma2": HEADS | CAPS | {"attention.sliding_window": 7},
    "gemma3": GEMMA3,
    "gemma3_linear": GEMMA3 | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    "qwen2_yarn": YARN,
    "olmo2": {},
    "phi3": {"rope.dimension_count": 16, "attention.sliding_window": 9},
    "phi4_mini": PHI4 | {"rope.scaling.original_context_length": 16},
    "smollm3": {"rope.dimension_count": 16},
    "granite": {"attention.scale": 0.1, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0},
    "gpt_neox": {"rope.dimension_count": 4, "use_parallel_residual": True},
    "gpt_neox_sequential": {"rope.dimension_count": 16, "use_parallel_residual": False},
}
# Not in the metadata: llama.cpp takes it from the size of the model.
SAID = {
    "qwen2_yarn": {"window": None, "window_layers": None},
    "gemma2": {"attention_scale": None},
    "gemma3": {"attention_scale": None},
    "gemma3_linear": {"attention_scale": None},
}


def factors(name):
    scaling = told(name)["settings"].get("rope_scaling") or {}
    ends = ("short", "long") if "short_factor" in scaling else ()
    return {f"rope_factors_{end}.weight": np.asarray(scaling[f"{end}_factor"]) for end in ends}


@pytest.mark.parametrize("name", METADATA)
def test_decoder_and_parameters_are_those_of_the_folder(name, tmp_path):
    path = gguf_families.write_reference(tmp_path / "tiny.gguf", name, metadata=METADATA[name], tensors=factors(name))
    folder = HfFolder(write_folder(tmp_path / "folder", reference(name).settings, reference(name).tensors))
    file, config = GgufFile(path), dataclasses.replace(folder.config(), **SAID.get(name, {}))
    found = file.config()
    for field in dataclasses.fields(config):
        want, got = getattr(config, field.name), getattr(found, field.name)
        numbers = isinstance(want, float) or (isinstance(want, tuple) and isinstance(want[0], float))
        assert got == (pytest.approx(want, rel=1e-6) if numbers else want), field.name
    params, wanted = file.params(found, np.float32), folder.params(config, np.float32)
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-7)  # one is added to scales, and taken off


@pytest.mark.parametrize(
    ("name", "metadata", "sentence"),
    [
        ("olmo2", {"attention.sliding_window": 9}, "attention.sliding_window 9"),
        ("smollm3", {"attention.sliding_window": 9}, "not supported: attention.sliding_window"),
        ("granite", {"logit_scale": 0.0}, "logit_scale 0"),
        ("gpt_neox", {"rope.dimension_count": 18}, "rope_size is 18.*at most 16"),
        ("phi3", {"rope.scaling.type": "su"}, "rotary scaling 'su'"),
        ("qwen2_yarn", {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ("qwen2_yarn", {"rope.scaling.yarn_beta_slow": 64.0}, "beta_fast 32, beta_slow 64"),
    ],
)
def test_metadata_that_are_not_honoured_are_refused(name, metadata, sentence, tmp_path):
    path = gguf_families.write_reference(tmp_path / "tiny.gguf", name, metadata=METADATA[name] | metadata)
    with pytest.raises(InputError, match=sentence):
        models.load(path)


@pytest.mark.parametrize(
    ("missing", "sentence"), [("short", "holds rope_factors_long"), ("long", "lacks the tensor rope_factors_long")]
)
def test_one_of_two_tensors_of_rotary_factors_is_not_enough(missing, sentence, tmp_path):
    tensors = {name: x for name, x in factors("phi4_mini").items() if missing not in name}
    metadata = METADATA["phi4_mini"] | {"rope.scaling.attn_factor": 1.0}
    path = gguf_families.write_reference(tmp_path / "tiny.gguf", "phi4_mini", metadata=metadata, tensors=tensors)
    file = GgufFile(path)
    with pytest.raises(InputError, match=sentence):
        file.params(file.config(), np.float32)

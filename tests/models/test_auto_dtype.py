"""Weights stay in the dtype of their files where they are asked to; logits are float32 in any case."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models as tiny

from fisher_jax import models

WIDE = dataclasses.replace(tiny.LLAMA, width=32, head_size=8, mlp_size=32)
PARAMS = tiny.random_params(WIDE)


def folder(path, dtype, head=None):
    tensors = {name: np.asarray(x, dtype) for name, x in tiny.hf_tensors(PARAMS).items()}
    if head is not None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(head)
    return tiny.write_hf(path / "model", tiny.llama_settings(WIDE), tensors)


def dtypes(model):
    return {leaf.dtype.name for leaf in jax.tree.leaves(model.params)}


@pytest.mark.parametrize(
    ("stored", "head", "wanted"),
    [
        (ml_dtypes.bfloat16, None, "bfloat16"),
        (np.float32, None, "float32"),
        (np.float16, None, "float32"),  # three more bits after the point than bfloat16 has
        (ml_dtypes.bfloat16, np.float32, "float32"),
    ],
)
def test_a_folder_keeps_its_dtype(tmp_path, stored, head, wanted):
    model = models.load(folder(tmp_path, stored, head), dtype="auto")
    assert dtypes(model) == {wanted}
    exact = models.load(tmp_path / "model", dtype="float32")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), b), model.params, exact.params)
    assert model.fingerprint == exact.fingerprint
    logits = model.apply(model.params, tiny.tokens(WIDE))
    assert logits.dtype == jnp.float32
    # Of bfloat16 the logits have only eight bits, of float32 all.
    assert np.any(np.asarray(logits) != np.asarray(logits.astype(jnp.bfloat16), np.float32))


@pytest.mark.parametrize(
    ("kind", "wanted", "said"),
    [(None, "float32", "F32"), ("F16", "float32", "F16"), ("BF16", "bfloat16", "BF16"), ("Q8_0", "bfloat16", "Q8_0")],
)
def test_a_gguf_file_keeps_its_dtype_and_quantised_ones_become_bfloat16(tmp_path, monkeypatch, kind, wanted, said):
    monkeypatch.setenv("FISHER_JAX_CACHE", str(tmp_path / "cache"))
    quantized = None if kind is None else gguf.GGMLQuantizationType[kind]
    file = tiny.write_gguf(tmp_path / "tiny.gguf", WIDE, PARAMS, quantized=quantized)
    for _ in range(2):  # the second from the cache
        model = models.load(file, dtype="auto")
        assert dtypes(model) == {wanted}
        assert said in model.stored
        assert dtypes(models.load(file, dtype="float32")) == {"float32"}

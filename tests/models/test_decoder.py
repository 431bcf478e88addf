"""The decoder against slow references, and what every causal decoder must satisfy."""

import dataclasses
import json

import decoder_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny

from fisher_jax._support.errors import InputError
from fisher_jax.models import DecoderConfig, from_config, init_params
from fisher_jax.models.decoder import causal_attention

CONFIGS = {
    "llama": tiny.LLAMA,
    "llama, all biases": dataclasses.replace(tiny.LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen3": tiny.QWEN3,
    "gpt2": tiny.GPT2,
    "soft cap": dataclasses.replace(tiny.LLAMA, logit_soft_cap=2.0),
}
MIXED = dataclasses.replace(tiny.LLAMA, num_experts=3, experts_per_token=2)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@every_config
def test_logits_equal_those_of_plain_loops(config):
    params, tokens = tiny.random_params(config), tiny.tokens(config)
    want = oracle.logits(config, params, tokens)
    got = jax.jit(from_config(config).apply)(params, tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@every_config
def test_works_where_mixed_dtypes_and_ranks_are_errors(config):
    params, tokens = tiny.random_params(config, dtype="bfloat16"), jnp.asarray(tiny.tokens(config))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.make_jaxpr(jax.grad(lambda p: jnp.sum(from_config(config).apply(p, tokens))))(params)


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2], ids=["llama", "gpt2"])
def test_right_padding_never_changes_earlier_positions(config):
    hidden, params, row = jax.jit(from_config(config).hidden), tiny.random_params(config), tiny.tokens(config)[0]
    lengths = (1, 4, 8)
    padded = [np.where(np.arange(len(row)) < n, row, (row + 1) % config.vocab_size) for n in lengths]
    full, *others = np.asarray(hidden(params, np.stack([row, *padded])))
    for n, other in zip(lengths, others, strict=True):
        np.testing.assert_array_equal(other[:n], full[:n])
        assert np.abs(other[n:] - full[n:]).max(axis=-1).min() > 1e-3
    np.testing.assert_allclose(hidden(params, row[None, :4])[0], full[:4], atol=1e-5)


@pytest.mark.parametrize("length", [1, 128, 129, 300, 1100])
def test_attention_in_blocks_equals_one_dense_softmax(length):
    rng = np.random.default_rng(length)
    q, k, v = (rng.normal(size=(2, length, heads, 4)) for heads in (4, 2, 2))
    scores = np.einsum("bqnh,bsnh->bnqs", q, np.repeat(k, 2, axis=2)) / 2.0
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bnqs,bsnh->bqnh", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
    got = jax.jit(causal_attention)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_windows_and_soft_caps_hold_across_blocks():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 300, heads, 4)) for heads in (4, 2, 2))
    scores = 1.5 * np.tanh(0.7 * np.einsum("bqnh,bsnh->bnqs", q, np.repeat(k, 2, axis=2)) / 1.5)
    seen = np.tri(300, dtype=bool) & ~np.tri(300, k=-40, dtype=bool)
    weights = np.exp(np.where(seen, scores, -np.inf))
    want = np.einsum("bnqs,bsnh->bqnh", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    for window in (40, jnp.int32(40)):  # of all layers, or of one in a loop
        got = causal_attention(*arrays, scale=0.7, soft_cap=1.5, window=window)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_attention_survives_logits_far_beyond_the_range_of_exp():
    q = jnp.full((1, 3, 1, 2), 100.0)
    v = jnp.arange(6.0).reshape(1, 3, 1, 2)
    np.testing.assert_allclose(causal_attention(q, q, v)[0, :, 0], [[0, 1], [1, 2], [2, 3]], rtol=1e-6)


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.QWEN3, tiny.GPT2], ids=["llama", "qwen3", "gpt2"])
def test_gradients_equal_finite_differences_of_the_loops(config):
    params, tokens = tiny.random_params(config), tiny.tokens(config, rows=1, length=5)
    direction = tiny.random_params(config, seed=1)
    out = np.random.default_rng(2).normal(size=(1, 5, config.vocab_size))

    def moved(step):
        return jax.tree.map(lambda p, d: np.float64(p) + step * np.float64(d), params, direction)

    ends = [np.sum(out * oracle.logits(config, moved(step), tokens)) for step in (1e-5, -1e-5)]
    functions = from_config(config)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.asarray(out, jnp.float32) * functions.apply(p, tokens))))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    got = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.float64(g) * np.float64(d)), grads, direction)))
    scale = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    assert got == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=float(1e-4 * scale))


def test_head_is_what_hidden_states_are_multiplied_with():
    for config in (tiny.LLAMA, tiny.QWEN3):
        functions, params, tokens = from_config(config), tiny.random_params(config), tiny.tokens(config)
        head = functions.head(params)
        assert head.shape == (config.vocab_size, config.width)
        assert functions.head_bias(params) is None
        logits = functions.hidden(params, tokens) @ head.T
        np.testing.assert_allclose(functions.apply(params, tokens), logits, atol=1e-5)


def test_logits_ask_for_full_precision_where_products_default_to_less():
    params = init_params(tiny.LLAMA, jax.random.key(0))
    jaxpr = str(jax.make_jaxpr(from_config(tiny.LLAMA).apply)(params, tiny.tokens(tiny.LLAMA)))
    assert jaxpr.count("HIGHEST") == 2  # both sides of the one product with the head


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2, MIXED], ids=["llama", "gpt2", "experts"])
def test_weights_in_bfloat16_are_computed_with_in_float32(config):
    half = tiny.random_params(config, dtype="bfloat16")
    full = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    functions, tokens = from_config(config), tiny.tokens(config)
    assert jax.eval_shape(functions.hidden, half, tokens).dtype == jnp.float32
    got, want = jax.jit(functions.apply)(half, tokens), jax.jit(functions.apply)(full, tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5 * jnp.abs(want).max())


def test_parameters_are_a_plain_dict_stacked_by_layer():
    params = init_params(tiny.LLAMA, jax.random.key(0))
    assert type(params["layers"]["attention"]["q"]) is dict
    assert params["layers"]["attention"]["q"]["kernel"].shape == (2, 12, 24)
    assert params["layers"]["mlp"]["down"]["kernel"].shape == (2, 10, 12)
    assert params["layers"]["mlp_norm"]["scale"].shape == (2, 12)
    assert float(jnp.std(params["embedding"])) == pytest.approx(0.02, rel=0.1)
    assert (np.asarray(params["final_norm"]["scale"]) == 1).all()
    kernels = params["layers"]["attention"]["q"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])


def test_one_layer_is_compiled_however_many_there_are():
    def equations(num_layers):
        config = dataclasses.replace(tiny.LLAMA, num_layers=num_layers)
        params = init_params(config, jax.random.key(0))
        return str(jax.make_jaxpr(from_config(config).apply)(params, tiny.tokens(config))).count("dot_general")

    assert equations(2) == equations(7)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (np.zeros((1, 17), np.int32), "17 tokens.*16 positions"),
        (np.array([[0, 9999]]), "from 0 to 9999.*0 to 267"),
        (np.array([[-1, 3]]), "from -1 to 3"),
        (np.zeros((1, 3), np.float32), "float32"),
        (np.zeros((3,), np.int32), r"\(3,\).*\[rows, positions\]"),
    ],
)
def test_unusable_tokens_are_refused(tokens, sentence):
    functions, params = from_config(tiny.LLAMA), init_params(tiny.LLAMA, jax.random.key(0))
    with pytest.raises(InputError, match=sentence):
        functions.hidden(params, tokens)


def test_too_large_ids_spoil_their_row_inside_jit_rather_than_pass_for_another_token():
    functions, params = from_config(tiny.LLAMA), init_params(tiny.LLAMA, jax.random.key(0))
    hidden = jax.jit(functions.hidden)(params, np.array([[5, 6], [5, 9999]]))
    assert np.isfinite(hidden[0]).all()
    assert np.isnan(hidden[1, 1]).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_kv_heads": 3}, "4 query heads.*3 key"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"head_size": 5}, "even head size, found 5"),
        ({"rope_divisors": (1.0,)}, "found 1 rotary divisors.*3"),
        ({"norm": "group"}, "'group'.*rms, layer"),
        ({"rope_size": 5}, "rope_size is 5.*even"),
        ({"rope_size": 8}, "rope_size is 8.*at most 6"),
        ({"window_layers": (True, False)}, "window_layers needs a window"),
        ({"window": 4, "window_layers": (True,)}, "window_layers has 1 layers.*2"),
        ({"rope_layers": (True,)}, "rope_layers has 1 layers.*2"),
        ({"local_rope_base": 10.0}, "local_rope_base needs a window"),
        ({"rope_divisors_long": (1.0, 1.0, 2.0)}, "given together"),
        ({"rope_amplitude": 0.0}, "rope_amplitude is 0.0"),
        ({"attention_soft_cap": -1.0}, "attention_soft_cap is -1.0"),
        ({"norm_placement": "after", "residual": "parallel"}, "needs norm_placement 'before'"),
    ],
)
def test_impossible_shapes_are_refused(change, sentence):
    with pytest.raises(InputError, match=sentence):
        dataclasses.replace(tiny.LLAMA, **change)


def test_configuration_survives_json():
    for config in CONFIGS.values():
        assert DecoderConfig.from_json(config.to_json()) == config


def test_a_configuration_of_fewer_switches_opens_with_their_defaults():
    """As checkpoints hold them that were written before a switch existed."""
    sizes = {field.name for field in dataclasses.fields(DecoderConfig) if field.default is dataclasses.MISSING}
    old = sizes | {"norm", "norm_eps", "rope_base", "rope_divisors", "qk_norm", "qkv_bias", "tied"}
    fields = {name: value for name, value in json.loads(tiny.QWEN3.to_json()).items() if name in old}
    assert DecoderConfig.from_json(json.dumps(fields)) == tiny.QWEN3

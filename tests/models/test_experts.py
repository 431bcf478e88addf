"""Mixtures of experts: what a configuration says, routing against a loop in float64, files, memory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax.models.experts import Experts
from fisher_jax.models.families import FAMILIES
from fisher_jax.models.gguf_file import GgufFile
from fisher_jax.models.hf_config import config_from_hf
from fisher_jax.models.saving import hf_settings, hf_tensors

SIZES = {
    "vocab_size": 13, "width": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_size": 4, "mlp_size": 6,
    "max_positions": 8, "tied": False,
}  # fmt: skip
CONFIG = fj.models.DecoderConfig(**SIZES, num_experts=5, experts_per_token=2, norm_eps=1e-6)
SETTINGS = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 6},
    "qwen3_moe": {
        "num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 99, "moe_intermediate_size": 6,
        "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1,
    },
}  # fmt: skip


def settings(kind, **more):
    shared = {
        "model_type": kind, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 13,
        "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 8, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    return shared | SETTINGS[kind] | more


def read(kind, **more):
    return config_from_hf(settings(kind, **more), "tiny", has_head=True)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_settings_say_how_many_experts_and_are_written_again(kind):
    found = read(kind)
    assert (found.num_experts, found.experts_per_token, found.norm_expert_weights, found.mlp_size) == (5, 2, True, 6)
    written = hf_settings(found)
    assert written["model_type"] == kind
    assert config_from_hf(json.loads(json.dumps(written)), "again", has_head=True) == found
    assert read(kind, router_jitter_noise=0.1, router_aux_loss_coef=0.5, output_router_logits=True) == found


def test_switches_of_qwen3_moe_change_the_decoder():
    assert not read("qwen3_moe", norm_topk_prob=None).norm_expert_weights
    assert read("qwen3_moe", num_experts=None, num_local_experts=7).num_experts == 7
    assert read("qwen3_moe", attention_bias=True).out_bias
    assert read("qwen3_moe", use_sliding_window=True, sliding_window=3).window == 3
    assert read("qwen3_moe", sliding_window=3).window is None
    assert read("mixtral", sliding_window=3).window == 3


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("qwen3_moe", {"shared_expert_intermediate_size": 6}),
        ("qwen3_moe", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts_per_tok": 6}),
        ("mixtral", {"num_experts_per_tok": 6}),
        ("mixtral", {"num_local_experts": 0}),
        ("mixtral", {"hidden_act": "relu"}),
    ],
)
def test_what_would_change_the_computation_is_refused(kind, more):
    with pytest.raises(InputError, match="|".join((*more, "a token goes to 6 experts, but there are 5"))):
        read(kind, **more)


def test_impossible_experts_are_refused():
    for more in ({"num_experts": 3}, {"experts_per_token": 1}, {"num_experts": 2, "experts_per_token": 3},
                 {"num_experts": 2, "experts_per_token": 1, "mlp_bias": True},
                 {"num_experts": 2, "experts_per_token": 1, "gated": False}):  # fmt: skip
        with pytest.raises(InputError, match="expert"):
            fj.models.DecoderConfig(**SIZES, **more)


def drawn(config=CONFIG, seed=0):
    shapes = fj.models.abstract_params(config)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[-2:][0]), x.dtype), shapes)


def mixed(config, params, x):
    """One token in float64, each expert that it is given."""
    shares = np.exp(x @ params["router"]["kernel"])
    shares /= shares.sum()
    given = np.argsort(-shares)[: config.experts_per_token]
    total = shares[given].sum() if config.norm_expert_weights else 1.0
    out = np.zeros_like(x)
    for e in given:
        gate, up, down = (params["experts"][name]["kernel"][e] for name in ("gate", "up", "down"))
        hidden = x @ gate
        out += shares[e] / total * ((hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down)
    return out, np.diff(np.sort(shares)[::-1])[config.experts_per_token - 1]


@pytest.mark.parametrize("normed", [True, False])
def test_experts_are_those_of_a_loop_over_tokens(normed):

    config = fj.models.DecoderConfig(**SIZES, num_experts=5, experts_per_token=2, norm_expert_weights=normed)
    layer = jax.tree.map(lambda x: x[1], drawn(config)["layers"]["mlp"])
    x = np.random.default_rng(3).normal(size=(2, 4, 8))
    model = nnx.eval_shape(lambda: Experts(config, jax.nn.silu, jnp.float32, nnx.Rngs(0)))
    graph = nnx.graphdef(model)
    apply = jax.jit(lambda params, x: nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(x))
    found = apply(layer, jnp.asarray(x, jnp.float32))
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), layer)
    for row, own in zip(x.reshape(-1, 8), np.asarray(found).reshape(-1, 8), strict=True):
        wanted, margin = mixed(config, exact, row)
        assert abs(margin) > 1e-4
        np.testing.assert_allclose(own, wanted, atol=3e-6)


def test_tensors_of_every_expert_have_their_published_names():
    params = drawn()
    for kind, names in {
        "mixtral": ["block_sparse_moe.gate", "block_sparse_moe.experts.4.w1", "block_sparse_moe.experts.4.w2",
                    "block_sparse_moe.experts.4.w3"],
        "qwen3_moe": ["mlp.gate", "mlp.experts.4.gate_proj", "mlp.experts.4.down_proj", "mlp.experts.4.up_proj"],
    }.items():  # fmt: skip
        tensors = hf_tensors(CONFIG, params, FAMILIES[kind])
        mlp = params["layers"]["mlp"]
        own = [mlp["router"], *(mlp["experts"][part] for part in ("gate", "down", "up"))]
        for name, part in zip(names, own, strict=True):
            kernel = part["kernel"][1] if part is mlp["router"] else part["kernel"][1, 4]
            np.testing.assert_array_equal(tensors[f"model.layers.1.{name}.weight"], np.asarray(kernel).T)


def test_memory_of_a_backward_pass_is_that_of_one_expert():
    """As many experts again cost their parameters and gradients, not the activations of every token."""

    def temporary(number):
        config = fj.models.DecoderConfig(
            **SIZES | {"mlp_size": 64, "num_layers": 1}, num_experts=number, experts_per_token=2
        )
        model, tokens = fj.models.from_config(config), jax.ShapeDtypeStruct((16, 8), jnp.int32)
        loss = jax.grad(lambda params, tokens: jnp.sum(model.apply(params, tokens)))
        compiled = jax.jit(loss).lower(fj.models.abstract_params(config), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_expert = 16 * 8 * 64 * 4
    assert temporary(16) - temporary(4) < 12 * (0.5 * one_expert + 3 * 64 * 8 * 4)


def gguf_of(path, arch, params, **metadata):
    """Experts of a layer in one tensor each, as llama.cpp has them."""
    layers, own = params["layers"], {}
    for i in range(CONFIG.num_layers):
        own[f"blk.{i}.ffn_gate_inp.weight"] = layers["mlp"]["router"]["kernel"][i].T
        for part, kernels in layers["mlp"]["experts"].items():
            own[f"blk.{i}.ffn_{part}_exps.weight"] = np.swapaxes(kernels["kernel"][i], -1, -2)
    plain = params | {"layers": {k: v for k, v in layers.items() if k != "mlp"} | {"mlp": {}}}
    numbers = {f"{arch}.expert_count": 5, f"{arch}.expert_used_count": 2, **metadata}
    return tiny.write_gguf(path, CONFIG, plain, arch=arch, metadata=numbers, tensors=own)


@pytest.mark.parametrize("arch", ["qwen3moe", "llama"])
def test_experts_of_a_gguf_file(tmp_path, arch):
    params = drawn()
    more = {"qwen3moe.expert_feed_forward_length": 6} if arch == "qwen3moe" else {}
    file = GgufFile(gguf_of(tmp_path / "moe.gguf", arch, params, **more))
    config = file.config()
    assert (config.num_experts, config.experts_per_token, config.mlp_size, config.norm_expert_weights) == (
        5,
        2,
        6,
        True,
    )
    found = file.params(config, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, found["layers"]["mlp"], params["layers"]["mlp"])
    with pytest.raises(InputError, match="expert_shared_feed_forward_length"):
        GgufFile(
            gguf_of(tmp_path / "b.gguf", arch, params, **{f"{arch}.expert_shared_feed_forward_length": 4})
        ).config()


def test_more_experts_than_the_files_hold_are_refused_before_they_are_listed(tmp_path):
    file = GgufFile(gguf_of(tmp_path / "a.gguf", "llama", drawn(), **{"llama.expert_count": 16000}))
    with pytest.raises(InputError, match=r"16,000 experts in each layer, which are .* but its files hold"):
        file.config()

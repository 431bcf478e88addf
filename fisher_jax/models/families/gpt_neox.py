"""GPT-NeoX and Pythia: layer norms, biases, queries, keys and values fused by head, a parallel residual."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import KERNELS, NORMS, Layout, each
from fisher_jax.models.families.reading import activation, epsilon, sizes, write_activation, write_sizes
from fisher_jax.models.families.rotary import rotary, write_rotary

__all__ = ["GPT_NEOX"]

NAMES = {
    "embedding": "gpt_neox.embed_in.weight",
    "head": "embed_out.weight",
    **each(NORMS, {
        "final_norm": "gpt_neox.final_layer_norm",
        "layers/attention_norm": "gpt_neox.layers.{}.input_layernorm",
        "layers/mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    }),
    **each(KERNELS, {
        "layers/attention/q": "gpt_neox.layers.{}.attention.query_key_value",
        "layers/attention/k": "gpt_neox.layers.{}.attention.query_key_value",
        "layers/attention/v": "gpt_neox.layers.{}.attention.query_key_value",
        "layers/attention/o": "gpt_neox.layers.{}.attention.dense",
        "layers/mlp/up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "layers/mlp/down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    }),
}  # fmt: skip
BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def read_gpt_neox(read: Settings, tied: bool) -> DecoderConfig:
    size = sizes(read)
    read.must("num_key_value_heads", size["num_heads"])
    bias = read.boolean("attention_bias", True)
    outer = ("rotary_emb_base", "rotary_pct")
    return DecoderConfig(
        **size,
        **rotary(read, size["head_size"], size["max_positions"], part=0.25, outer=outer),
        norm="layer",
        norm_eps=epsilon(read, "layer_norm_eps", 1e-5),
        residual="parallel" if read.boolean("use_parallel_residual", True) else "sequential",
        activation=activation(read, "hidden_act", "gelu"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tied=tied,
    )


def write_gpt_neox(config: DecoderConfig) -> dict[str, Any]:
    turns = write_rotary(config)
    sized = {k: v for k, v in write_sizes(config).items() if k not in ("num_key_value_heads", "head_dim")}
    return sized | {
        "rotary_emb_base": turns.pop("rope_theta"),
        "rotary_pct": turns.pop("partial_rotary_factor", 1.0),
        **turns,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.residual == "parallel",
        "hidden_act": write_activation(config),
        "attention_bias": config.qkv_bias,
    }


GPT_NEOX = Family(
    kind="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    read=read_gpt_neox,
    write=write_gpt_neox,
    layout=Layout(names=NAMES, by_head=True, buffers=BUFFERS),
    tied=False,
)

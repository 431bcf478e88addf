"""OLMo 1 (layer norms without parameters) and OLMo 2 (norms of what is added, of queries and of keys)."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, NORMS, Layout, each
from fisher_jax.models.families.llama import write_switches
from fisher_jax.models.families.reading import activation, epsilon, sizes, write_activation
from fisher_jax.models.families.rotary import rotary

__all__ = ["OLMO", "OLMO2"]

OLMO2_NAMES = LLAMA_NAMES | each(NORMS, {
    "layers/attention_post_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
})  # fmt: skip


def shared(read: Settings) -> dict[str, Any]:
    size, bias = sizes(read), read.boolean("attention_bias", False)
    turns = rotary(read, size["head_size"], size["max_positions"])
    act = activation(read, "hidden_act", "silu")
    return {**size, **turns, "activation": act, "qkv_bias": bias, "out_bias": bias}


def read_olmo(read: Settings, tied: bool) -> DecoderConfig:
    if read.get("clip_qkv", None) is not None:
        read.refuse("clip_qkv", "null", "but queries, keys and values that are clipped cannot be read; only {} can")
    return DecoderConfig(**shared(read), norm="layer", norm_bias=False, norm_scale=False, tied=tied)


def read_olmo2(read: Settings, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        **shared(read),
        norm_eps=epsilon(read, default=1e-5),
        norm_placement="after",
        qk_norm=True,
        qk_norm_scope="width",
        tied=tied,
    )


def write_olmo2(config: DecoderConfig) -> dict[str, Any]:
    return write_switches(config) | {
        "hidden_act": write_activation(config),
        "attention_bias": config.qkv_bias,
    }


def write_olmo(config: DecoderConfig) -> dict[str, Any]:
    return {k: v for k, v in write_olmo2(config).items() if k != "rms_norm_eps"} | {"clip_qkv": None}


OLMO = Family(
    kind="olmo",
    architecture="OlmoForCausalLM",
    read=read_olmo,
    write=write_olmo,
    layout=Layout(names=LLAMA_NAMES),
    tied=False,
)
OLMO2 = Family(
    kind="olmo2",
    architecture="Olmo2ForCausalLM",
    read=read_olmo2,
    write=write_olmo2,
    layout=Layout(names=OLMO2_NAMES),
    tied=False,
)

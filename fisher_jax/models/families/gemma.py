"""Gemma 1 and 2: a scaled embedding, norms that multiply by one plus a scale; Gemma 2 has soft caps and windows."""

import math
from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, NORMS, Layout, each
from fisher_jax.models.families.llama import write_switches
from fisher_jax.models.families.reading import (
    epsilon,
    sizes,
    soft_cap,
    window,
    window_layers,
    windows,
    write_layer_types,
)  # fmt: skip
from fisher_jax.models.families.rotary import rotary
from fisher_jax.models.number_ranges import MULTIPLIER

__all__ = ["AROUND_NAMES", "GEMMA", "GEMMA2", "gemma_switches", "query_scale", "write_gemma", "write_gemma2"]

AROUND_NAMES = LLAMA_NAMES | each(NORMS, {
    "layers/attention_post_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
})  # fmt: skip


def gemma_switches(read: Settings, size: dict[str, Any]) -> dict[str, Any]:
    """What all Gemmas have in common, beside rotary positions."""
    read.must("use_bidirectional_attention", False)
    bias = read.boolean("attention_bias", False)
    return {
        "norm_eps": epsilon(read),
        "norm_plus_one": True,
        "embedding_multiplier": math.sqrt(size["width"]),
        "activation": "gelu_tanh",
        "qkv_bias": bias,
        "out_bias": bias,
    }


def read_gemma(read: Settings, tied: bool) -> DecoderConfig:
    # Both names mean the approximation, says transformers.
    read.must("hidden_act", "gelu_pytorch_tanh", "gelu")
    read.must("hidden_activation", "gelu_pytorch_tanh")
    size = sizes(read, num_kv_heads=16, head_size=256)
    turns = rotary(read, size["head_size"], size["max_positions"])
    return DecoderConfig(**size, **gemma_switches(read, size), **turns, tied=tied)


def write_gemma(config: DecoderConfig) -> dict[str, Any]:
    return write_switches(config) | {"hidden_act": "gelu_pytorch_tanh", "attention_bias": config.qkv_bias}


def read_gemma2(read: Settings, tied: bool) -> DecoderConfig:
    read.must("hidden_activation", "gelu_pytorch_tanh")
    size = sizes(read, num_kv_heads=4, head_size=256)
    layers = window_layers(read, size["num_layers"], [i % 2 == 0 for i in range(size["num_layers"])])
    return DecoderConfig(
        **size,
        **gemma_switches(read, size),
        **rotary(read, size["head_size"], size["max_positions"]),
        **windows(window(read, 4096), layers, size["max_positions"]),
        attention_scale=query_scale(read, size["head_size"]),
        attention_soft_cap=soft_cap(read, "attn_logit_softcapping", 50.0),
        logit_soft_cap=soft_cap(read, "final_logit_softcapping", 30.0),
        norm_placement="around",
        tied=tied,
    )


def query_scale(read: Settings, head_size: int) -> float | None:
    """From the number whose root divides the products of queries and keys."""
    number = read.number("query_pre_attn_scalar", 256.0, **MULTIPLIER)
    return None if number == head_size else number**-0.5


def write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    scale = config.attention_scale
    return write_gemma(config) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.head_size if scale is None else round(scale**-2),
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
        "sliding_window": config.window or config.max_positions,
        "layer_types": write_layer_types(config),
    }


GEMMA = Family(
    kind="gemma",
    architecture="GemmaForCausalLM",
    read=read_gemma,
    write=write_gemma,
    layout=Layout(names=LLAMA_NAMES),
    tied=True,
)
GEMMA2 = Family(
    kind="gemma2",
    architecture="Gemma2ForCausalLM",
    read=read_gemma2,
    write=write_gemma2,
    layout=Layout(names=AROUND_NAMES),
    tied=True,
)

"""Qwen 2 (biases of queries, keys and values) and Qwen 3 (norms of queries and keys)."""

from typing import Any

from fisher_jax.models.checked_settings import MOST_INDEX, Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout
from fisher_jax.models.families.llama import llama_switches, write_switches
from fisher_jax.models.families.reading import sizes, window, window_layers, windows, write_layer_types

__all__ = ["QWEN2", "QWEN3", "qwen_windows"]


def read_qwen2(read: Settings, tied: bool) -> DecoderConfig:
    size = sizes(read, num_kv_heads=32)
    return DecoderConfig(**size, **llama_switches(read, size), **qwen_windows(read, size), qkv_bias=True, tied=tied)


def read_qwen3(read: Settings, tied: bool) -> DecoderConfig:
    size = sizes(read, num_kv_heads=32, head_size=128)
    bias = read.boolean("attention_bias", False)
    return DecoderConfig(
        **size,
        **llama_switches(read, size),
        **qwen_windows(read, size),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        tied=tied,
    )


def qwen_windows(read: Settings, size: dict[str, Any]) -> dict[str, Any]:
    """Where they are switched on: in the layers that ``layer_types`` names, else from ``max_window_layers`` on."""
    local = window(read, 4096)
    first, number = read.integer("max_window_layers", 0, MOST_INDEX, 28), size["num_layers"]
    layers = window_layers(read, number, [i >= first for i in range(number)])
    used = read.boolean("use_sliding_window", False)
    return windows(local if used else None, layers, size["max_positions"])


def write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    return write_switches(config) | {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": write_layer_types(config),
    }


def write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return write_qwen2(config) | {"attention_bias": config.qkv_bias}


QWEN2 = Family(
    kind="qwen2",
    architecture="Qwen2ForCausalLM",
    read=read_qwen2,
    write=write_qwen2,
    layout=Layout(names=LLAMA_NAMES),
)
QWEN3 = Family(
    kind="qwen3",
    architecture="Qwen3ForCausalLM",
    read=read_qwen3,
    write=write_qwen3,
    layout=Layout(names=LLAMA_NAMES),
)

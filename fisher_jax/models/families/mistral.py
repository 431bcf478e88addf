"""Mistral: Llama with a window in every layer."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout
from fisher_jax.models.families.llama import llama_switches, write_switches
from fisher_jax.models.families.reading import sizes, window, windows

__all__ = ["MISTRAL"]


def read_mistral(read: Settings, tied: bool) -> DecoderConfig:
    size = sizes(read, num_kv_heads=8)
    everywhere = (True,) * size["num_layers"]
    local = windows(window(read, 4096), everywhere, size["max_positions"])
    return DecoderConfig(**size, **llama_switches(read, size), **local, tied=tied)


def write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return write_switches(config) | {"sliding_window": config.window}


MISTRAL = Family(
    kind="mistral",
    architecture="MistralForCausalLM",
    read=read_mistral,
    write=write_mistral,
    layout=Layout(names=LLAMA_NAMES),
)

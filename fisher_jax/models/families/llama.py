"""Llama: what the defaults of `DecoderConfig` are."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout
from fisher_jax.models.families.reading import epsilon, sizes, write_sizes
from fisher_jax.models.families.rotary import rotary, write_rotary

__all__ = ["LLAMA", "llama_switches", "write_switches"]


def read_llama(read: Settings, tied: bool) -> DecoderConfig:
    size = sizes(read)
    bias = read.boolean("attention_bias", False)
    return DecoderConfig(
        **size,
        **llama_switches(read, size),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=read.boolean("mlp_bias", False),
        tied=tied,
    )


def llama_switches(read: Settings, size: dict[str, Any], *, base: float = 10_000.0) -> dict[str, Any]:
    """What Llama and its closest kin have in common; ``base`` is that of rotary positions where none is said."""
    read.must("hidden_act", "silu")
    return {"norm_eps": epsilon(read), **rotary(read, size["head_size"], size["max_positions"], base=base)}


def write_switches(config: DecoderConfig) -> dict[str, Any]:
    """The settings that `sizes` and `llama_switches` read."""
    switches = {"rms_norm_eps": config.norm_eps, "hidden_act": "silu"}
    return write_sizes(config) | write_rotary(config) | switches


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    return write_switches(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    kind="llama",
    architecture="LlamaForCausalLM",
    read=read_llama,
    write=write_llama,
    layout=Layout(names=LLAMA_NAMES),
)

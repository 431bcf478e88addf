"""Granite: Llama with four multipliers."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout
from fisher_jax.models.families.llama import llama_switches, write_switches
from fisher_jax.models.families.reading import inverse, sizes
from fisher_jax.models.number_ranges import MULTIPLIER

__all__ = ["GRANITE"]


def read_granite(read: Settings, tied: bool) -> DecoderConfig:
    size, bias = sizes(read), read.boolean("attention_bias", False)
    scale = read.number("attention_multiplier", 1.0, **MULTIPLIER)
    return DecoderConfig(
        **size,
        **llama_switches(read, size),
        embedding_multiplier=read.number("embedding_multiplier", 1.0, **MULTIPLIER),
        residual_multiplier=read.number("residual_multiplier", 1.0, **MULTIPLIER),
        attention_scale=None if scale == size["head_size"] ** -0.5 else scale,
        logit_multiplier=1.0 / read.number("logits_scaling", 1.0, **MULTIPLIER),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=read.boolean("mlp_bias", False),
        tied=tied,
    )


def write_granite(config: DecoderConfig) -> dict[str, Any]:
    return write_switches(config) | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "attention_multiplier": config.attention_scale or config.head_size**-0.5,
        "logits_scaling": inverse(config.logit_multiplier),
    }


GRANITE = Family(
    kind="granite",
    architecture="GraniteForCausalLM",
    read=read_granite,
    write=write_granite,
    layout=Layout(names=LLAMA_NAMES),
    tied=False,
)

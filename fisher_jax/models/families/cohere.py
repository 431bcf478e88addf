"""Cohere (Command R): one layer norm before attention and MLP side by side; neighbouring coordinates turn."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout
from fisher_jax.models.families.llama import write_switches
from fisher_jax.models.families.reading import activation, epsilon, sizes, write_activation
from fisher_jax.models.families.rotary import rotary
from fisher_jax.models.number_ranges import MULTIPLIER

__all__ = ["COHERE"]


def read_cohere(read: Settings, tied: bool) -> DecoderConfig:
    size, bias = sizes(read), read.boolean("attention_bias", False)
    return DecoderConfig(
        **size,
        **rotary(read, size["head_size"], size["max_positions"], base=500_000.0),
        norm="layer",
        norm_bias=False,
        norm_eps=epsilon(read, "layer_norm_eps", 1e-5),
        residual="parallel_one_norm",
        activation=activation(read, "hidden_act", "silu"),
        logit_multiplier=read.number("logit_scale", 0.0625, **MULTIPLIER),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=(normed := read.boolean("use_qk_norm", False)),
        qk_norm_scope="heads" if normed else "head",
        tied=tied,
    )


def write_cohere(config: DecoderConfig) -> dict[str, Any]:
    return {k: v for k, v in write_switches(config).items() if k != "rms_norm_eps"} | {
        "layer_norm_eps": config.norm_eps,
        "hidden_act": write_activation(config),
        "logit_scale": config.logit_multiplier,
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm,
    }


COHERE = Family(
    kind="cohere",
    architecture="CohereForCausalLM",
    read=read_cohere,
    write=write_cohere,
    layout=Layout(names=LLAMA_NAMES, interleaved=True),
    tied=True,
)

"""StableLM: Llama with layer norms and a part of each head that turns."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout
from fisher_jax.models.families.llama import write_switches
from fisher_jax.models.families.reading import activation, epsilon, sizes, write_activation
from fisher_jax.models.families.rotary import rotary

__all__ = ["STABLELM"]


def read_stablelm(read: Settings, tied: bool) -> DecoderConfig:
    read.must("qk_layernorm", False)
    size = sizes(read, num_kv_heads=32)
    return DecoderConfig(
        **size,
        **rotary(read, size["head_size"], size["max_positions"], part=0.25),
        norm="layer",
        norm_eps=epsilon(read, "layer_norm_eps", 1e-5),
        residual="parallel_one_norm" if read.boolean("use_parallel_residual", False) else "sequential",
        activation=activation(read, "hidden_act", "silu"),
        qkv_bias=read.boolean("use_qkv_bias", False),
        tied=tied,
    )


def write_stablelm(config: DecoderConfig) -> dict[str, Any]:
    left = ("rms_norm_eps", "head_dim")
    return {"partial_rotary_factor": 1.0} | {k: v for k, v in write_switches(config).items() if k not in left} | {
        "layer_norm_eps": config.norm_eps,
        "hidden_act": write_activation(config),
        "use_qkv_bias": config.qkv_bias,
        "use_parallel_residual": config.residual == "parallel_one_norm",
    }  # fmt: skip


STABLELM = Family(
    kind="stablelm",
    architecture="StableLmForCausalLM",
    read=read_stablelm,
    write=write_stablelm,
    layout=Layout(names=LLAMA_NAMES),
    tied=False,
)

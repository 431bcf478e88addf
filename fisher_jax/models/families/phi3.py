"""Phi-3 and Phi-4-mini: Llama with fused projections, LongRoPE, and a part of each head that turns."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import KERNELS, LLAMA_NAMES, Layout, each
from fisher_jax.models.families.llama import write_switches
from fisher_jax.models.families.reading import activation, epsilon, sizes, window, windows, write_activation
from fisher_jax.models.families.rotary import rotary

__all__ = ["PHI3"]

NAMES = LLAMA_NAMES | each(KERNELS, {
    "layers/attention/q": "model.layers.{}.self_attn.qkv_proj",
    "layers/attention/k": "model.layers.{}.self_attn.qkv_proj",
    "layers/attention/v": "model.layers.{}.self_attn.qkv_proj",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_up_proj",
    "layers/mlp/up": "model.layers.{}.mlp.gate_up_proj",
})  # fmt: skip


def read_phi3(read: Settings, tied: bool) -> DecoderConfig:
    size = sizes(read)
    everywhere = (True,) * size["num_layers"]
    return DecoderConfig(
        **size,
        **rotary(as_longrope(read), size["head_size"], size["max_positions"], part=1.0, original=4096),
        **windows(window(read), everywhere, size["max_positions"]),
        norm_eps=epsilon(read, default=1e-5),
        activation=activation(read, "hidden_act", "silu"),
        tied=tied,
    )


def as_longrope(read: Settings) -> Settings:
    """Early Phi-3 calls LongRoPE ``su`` or ``yarn``."""
    scaling = dict(read.values.get("rope_scaling") or {}) if read.inner("rope_scaling") else None
    if scaling is None or scaling.get("rope_type", scaling.get("type")) not in ("su", "yarn"):
        return read
    return Settings({**read.values, "rope_scaling": scaling | {"rope_type": "longrope"}}, read.label)


def write_phi3(config: DecoderConfig) -> dict[str, Any]:
    switches = {"hidden_act": write_activation(config), "sliding_window": config.window}
    return {k: v for k, v in write_switches(config).items() if k != "head_dim"} | switches


PHI3 = Family(
    kind="phi3",
    architecture="Phi3ForCausalLM",
    read=read_phi3,
    write=write_phi3,
    layout=Layout(names=NAMES),
    tied=False,
)

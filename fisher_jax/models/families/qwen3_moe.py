"""Qwen 3 with a mixture of experts in every layer."""

from typing import Any

from fisher_jax.models.checked_settings import MOST_EXPERTS, Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout
from fisher_jax.models.families.llama import llama_switches, write_switches
from fisher_jax.models.families.reading import sizes, window, windows

__all__ = ["QWEN3_MOE"]

EXPERTS = {
    "layers/mlp/router/kernel": "model.layers.{}.mlp.gate.weight",
    **{
        f"layers/mlp/experts/{part}/kernel": f"model.layers.{{}}.mlp.experts.{{}}.{part}_proj.weight"
        for part in ("gate", "up", "down")
    },
}
NAMES = {path: name for path, name in LLAMA_NAMES.items() if "/mlp/" not in path} | EXPERTS


def read_qwen3_moe(read: Settings, tied: bool) -> DecoderConfig:
    size = sizes(read, num_kv_heads=4)
    # Layers of one kind are stacked: a plain MLP among experts has no place.
    read.must("decoder_sparse_step", 1)
    read.must("mlp_only_layers", [])
    read.must("shared_expert_intermediate_size", 0)
    bias = read.boolean("attention_bias", False)
    local = window(read, 4096) if read.boolean("use_sliding_window", False) else None
    return DecoderConfig(
        **size | {"mlp_size": read.size("moe_intermediate_size", 768)},
        **llama_switches(read, size),
        **windows(local, (True,) * size["num_layers"], size["max_positions"]),
        num_experts=number_of_experts(read),
        experts_per_token=read.integer("num_experts_per_tok", 1, MOST_EXPERTS, 8),
        norm_expert_weights=read.boolean("norm_topk_prob", False),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        tied=tied,
    )


def number_of_experts(read: Settings) -> int:
    """Under its published name, or the one that transformers 5 writes."""
    first = read.integer("num_experts", 1, MOST_EXPERTS, None)
    second = read.integer("num_local_experts", 1, MOST_EXPERTS, first or 128)
    if first not in (None, second):
        read.refuse("num_local_experts", f"{first}, as num_experts")
    return second


def write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    return write_switches(config) | {
        "moe_intermediate_size": config.mlp_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.norm_expert_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": config.qkv_bias,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
    }


QWEN3_MOE = Family(
    kind="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=read_qwen3_moe,
    write=write_qwen3_moe,
    layout=Layout(names=NAMES),
)

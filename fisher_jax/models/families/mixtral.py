"""Mixtral: Mistral with a mixture of experts in every layer."""

from typing import Any

from fisher_jax.models.checked_settings import MOST_EXPERTS, Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout
from fisher_jax.models.families.llama import llama_switches, write_switches
from fisher_jax.models.families.reading import epsilon, sizes, window, windows

__all__ = ["MIXTRAL"]

EXPERTS = {
    "layers/mlp/router/kernel": "model.layers.{}.block_sparse_moe.gate.weight",
    "layers/mlp/experts/gate/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
    "layers/mlp/experts/up/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    "layers/mlp/experts/down/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
}
NAMES = {path: name for path, name in LLAMA_NAMES.items() if "/mlp/" not in path} | EXPERTS


def read_mixtral(read: Settings, tied: bool) -> DecoderConfig:
    size = sizes(read, num_kv_heads=8)
    switches = llama_switches(read, size, base=1_000_000.0) | {"norm_eps": epsilon(read, default=1e-5)}
    return DecoderConfig(
        **size,
        **switches,
        **windows(window(read), (True,) * size["num_layers"], size["max_positions"]),
        num_experts=read.integer("num_local_experts", 1, MOST_EXPERTS, 8),
        experts_per_token=read.integer("num_experts_per_tok", 1, MOST_EXPERTS, 2),
        tied=tied,
    )


def write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    return write_switches(config) | {
        "sliding_window": config.window,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
    }


MIXTRAL = Family(
    kind="mixtral",
    architecture="MixtralForCausalLM",
    read=read_mixtral,
    write=write_mixtral,
    layout=Layout(names=NAMES),
)

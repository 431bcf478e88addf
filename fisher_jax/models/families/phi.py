"""Phi 1 to 2: one layer norm before attention and MLP side by side, biases everywhere, the head's too."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import KERNELS, LLAMA_NAMES, NORMS, Layout, each
from fisher_jax.models.families.llama import write_switches
from fisher_jax.models.families.reading import activation, epsilon, sizes, write_activation
from fisher_jax.models.families.rotary import rotary

__all__ = ["PHI"]

NAMES = LLAMA_NAMES | {
    "head_bias": "lm_head.bias",
    **each(NORMS, {
        "final_norm": "model.final_layernorm",
        "layers/attention/q_norm": "model.layers.{}.self_attn.q_layernorm",
        "layers/attention/k_norm": "model.layers.{}.self_attn.k_layernorm",
    }),
    **each(KERNELS, {
        "layers/attention/o": "model.layers.{}.self_attn.dense",
        "layers/mlp/up": "model.layers.{}.mlp.fc1",
        "layers/mlp/down": "model.layers.{}.mlp.fc2",
    }),
}  # fmt: skip


def read_phi(read: Settings, tied: bool) -> DecoderConfig:
    size = sizes(read)
    return DecoderConfig(
        **size,
        **rotary(read, size["head_size"], size["max_positions"], part=0.5),
        norm="layer",
        norm_eps=epsilon(read, "layer_norm_eps", 1e-5),
        residual="parallel_one_norm",
        activation=activation(read, "hidden_act", "gelu_new"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        qk_norm=read.boolean("qk_layernorm", False),
        tied=tied,
    )


def write_phi(config: DecoderConfig) -> dict[str, Any]:
    left = ("rms_norm_eps", "head_dim")
    return {"partial_rotary_factor": 1.0} | {k: v for k, v in write_switches(config).items() if k not in left} | {
        "layer_norm_eps": config.norm_eps,
        "hidden_act": write_activation(config, "gelu_new"),
        "qk_layernorm": config.qk_norm,
    }  # fmt: skip


PHI = Family(
    kind="phi",
    architecture="PhiForCausalLM",
    read=read_phi,
    write=write_phi,
    layout=Layout(names=NAMES),
    tied=False,
)

"""StarCoder 2: rotary positions, layer norms, an MLP without gate, biases everywhere or nowhere."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import KERNELS, LLAMA_NAMES, Layout, each
from fisher_jax.models.families.llama import write_switches
from fisher_jax.models.families.reading import activation, epsilon, sizes, window, windows, write_activation
from fisher_jax.models.families.rotary import rotary

__all__ = ["STARCODER2"]

NAMES = LLAMA_NAMES | each(KERNELS, {
    "layers/mlp/up": "model.layers.{}.mlp.c_fc",
    "layers/mlp/down": "model.layers.{}.mlp.c_proj",
})  # fmt: skip


def read_starcoder2(read: Settings, tied: bool) -> DecoderConfig:
    size, bias = sizes(read, num_kv_heads=2), read.boolean("use_bias", True)
    everywhere = (True,) * size["num_layers"]
    return DecoderConfig(
        **size,
        **rotary(read, size["head_size"], size["max_positions"]),
        **windows(window(read), everywhere, size["max_positions"]),
        norm="layer",
        norm_eps=epsilon(read, "norm_epsilon", 1e-5),
        activation=activation(read, "hidden_act", "gelu_pytorch_tanh"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied=tied,
    )


def write_starcoder2(config: DecoderConfig) -> dict[str, Any]:
    return {k: v for k, v in write_switches(config).items() if k != "rms_norm_eps"} | {
        "norm_epsilon": config.norm_eps,
        "hidden_act": write_activation(config),
        "sliding_window": config.window,
        "use_bias": config.mlp_bias,
    }


STARCODER2 = Family(
    kind="starcoder2",
    architecture="Starcoder2ForCausalLM",
    read=read_starcoder2,
    write=write_starcoder2,
    layout=Layout(names=NAMES),
    tied=True,
)

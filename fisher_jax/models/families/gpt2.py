"""GPT-2: layer norms, learned positions, biases everywhere, kernels as ``[in, out]``."""

from typing import Any

from fisher_jax.models.checked_settings import MOST_LAYERS, Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import KERNELS, NORMS, Layout, each
from fisher_jax.models.families.reading import epsilon, share

__all__ = ["GPT2"]

NAMES = {
    "embedding": "wte.weight",
    "positions": "wpe.weight",
    "head": "lm_head.weight",
    **each(NORMS, {"final_norm": "ln_f", "layers/attention_norm": "h.{}.ln_1", "layers/mlp_norm": "h.{}.ln_2"}),
    **each(KERNELS, {
        "layers/attention/q": "h.{}.attn.c_attn",
        "layers/attention/k": "h.{}.attn.c_attn",
        "layers/attention/v": "h.{}.attn.c_attn",
        "layers/attention/o": "h.{}.attn.c_proj",
        "layers/mlp/up": "h.{}.mlp.c_fc",
        "layers/mlp/down": "h.{}.mlp.c_proj",
    }),
}  # fmt: skip


def read_gpt2(read: Settings, tied: bool) -> DecoderConfig:
    read.must("activation_function", "gelu_new", "gelu_pytorch_tanh")
    read.must("scale_attn_weights", True)
    read.must("scale_attn_by_inverse_layer_idx", False)
    width, num_heads = read.size("n_embd"), read.size("n_head")
    return DecoderConfig(
        vocab_size=read.size("vocab_size"),
        width=width,
        num_layers=read.integer("n_layer", 1, MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=share(read, "n_embd", width, "n_head", num_heads),
        mlp_size=read.size("n_inner", 4 * width),
        max_positions=read.size("n_positions"),
        norm="layer",
        norm_eps=epsilon(read, "layer_norm_epsilon", 1e-5),
        positions="learned",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=tied,
    )


def write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_size,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
    }


GPT2 = Family(
    kind="gpt2",
    architecture="GPT2LMHeadModel",
    read=read_gpt2,
    write=write_gpt2,
    layout=Layout(names=NAMES, turned=False, prefix="transformer."),
    tied=True,
)

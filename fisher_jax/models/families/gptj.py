"""GPT-J: one layer norm before attention and MLP side by side; pairs of neighbouring coordinates turn."""

from typing import Any

from fisher_jax.models.checked_settings import MOST_LAYERS, Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.gpt2 import write_gpt2
from fisher_jax.models.families.layout import KERNELS, NORMS, Layout, each
from fisher_jax.models.families.reading import activation, epsilon, share, write_activation

__all__ = ["GPTJ"]

NAMES = {
    "embedding": "transformer.wte.weight",
    "head": "lm_head.weight",
    "head_bias": "lm_head.bias",
    **each(NORMS, {"final_norm": "transformer.ln_f", "layers/attention_norm": "transformer.h.{}.ln_1"}),
    **each(KERNELS, {
        "layers/attention/q": "transformer.h.{}.attn.q_proj",
        "layers/attention/k": "transformer.h.{}.attn.k_proj",
        "layers/attention/v": "transformer.h.{}.attn.v_proj",
        "layers/attention/o": "transformer.h.{}.attn.out_proj",
        "layers/mlp/up": "transformer.h.{}.mlp.fc_in",
        "layers/mlp/down": "transformer.h.{}.mlp.fc_out",
    }),
}  # fmt: skip


def read_gptj(read: Settings, tied: bool) -> DecoderConfig:
    width, num_heads = read.size("n_embd"), read.size("n_head")
    head_size = share(read, "n_embd", width, "n_head", num_heads)
    turned = head_size if read.get("rotary_dim", None) is None and "rotary_dim" in read.values else 64
    turned = read.integer("rotary_dim", 2, head_size, min(turned, head_size))
    return DecoderConfig(
        vocab_size=read.size("vocab_size"),
        width=width,
        num_layers=read.integer("n_layer", 1, MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=head_size,
        mlp_size=read.size("n_inner", 4 * width),
        max_positions=read.size("n_positions"),
        norm="layer",
        norm_eps=epsilon(read, "layer_norm_epsilon", 1e-5),
        residual="parallel_one_norm",
        rope_size=None if turned == head_size else turned,
        activation=activation(read, "activation_function", "gelu_new"),
        gated=False,
        mlp_bias=True,
        head_bias=True,
        tied=tied,
    )


def write_gptj(config: DecoderConfig) -> dict[str, Any]:
    changed = {"rotary_dim": config.rotary_size, "activation_function": write_activation(config, "gelu_new")}
    return write_gpt2(config) | changed


GPTJ = Family(
    kind="gptj",
    architecture="GPTJForCausalLM",
    read=read_gptj,
    write=write_gptj,
    layout=Layout(names=NAMES, interleaved=True),
    tied=False,
)

"""Names and order of tensors in GGUF files, by architecture."""

from fisher_jax.models.families.layout import KERNELS, NORMS, Layout, each

__all__ = ["GGUF_LAYOUTS"]

NAMES = {
    "embedding": "token_embd.weight",
    "head": "output.weight",
    **each(NORMS, {
        "final_norm": "output_norm",
        "layers/attention_norm": "blk.{}.attn_norm",
        "layers/attention/q_norm": "blk.{}.attn_q_norm",
        "layers/attention/k_norm": "blk.{}.attn_k_norm",
        "layers/mlp_norm": "blk.{}.ffn_norm",
    }),
    **each(KERNELS, {
        "layers/attention/q": "blk.{}.attn_q",
        "layers/attention/k": "blk.{}.attn_k",
        "layers/attention/v": "blk.{}.attn_v",
        "layers/attention/o": "blk.{}.attn_output",
        "layers/mlp/gate": "blk.{}.ffn_gate",
        "layers/mlp/up": "blk.{}.ffn_up",
        "layers/mlp/down": "blk.{}.ffn_down",
        # Of experts a tensor holds those of a layer.
        "layers/mlp/router": "blk.{}.ffn_gate_inp",
        "layers/mlp/experts/gate": "blk.{}.ffn_gate_exps",
        "layers/mlp/experts/up": "blk.{}.ffn_up_exps",
        "layers/mlp/experts/down": "blk.{}.ffn_down_exps",
    }),
}  # fmt: skip

GGUF_LAYOUTS = {
    "llama": Layout(names=NAMES, interleaved=True),
    "qwen2": Layout(names=NAMES),
    "qwen3": Layout(names=NAMES),
    "qwen3moe": Layout(names=NAMES),
}

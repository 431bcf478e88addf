"""Makes ``references/``: python build_references.py [NAME ...], where torch and transformers are installed.

With ``--open FOLDER ...`` it compares what transformers computes for folders that this library wrote, each named like
its reference, with the stored logits.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from reference_models import FOLDER, VOCABULARY, reference, token_ids, weights, write_folder
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

# Of every published configuration: vocabulary, widths, layers and heads are small, and windows, positions and rotary
# ranges such that rows of 24 tokens exceed them.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 16}
OLD = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
LLAMA = GROUPED | {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "rope_theta": 500000.0,
}  # fmt: skip
GEMMA2 = WIDE | {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 30, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "sliding_window": 7,
}  # fmt: skip
GEMMA3 = WIDE | {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 30, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 7, "sliding_window_pattern": 6, "num_hidden_layers": 7,
}  # fmt: skip
NEOX = SIZES | {
    "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu",
    "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "use_parallel_residual": True,
}  # fmt: skip
PHI3 = SIZES | {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_act": "silu", "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 9,
    "original_max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
PHI4 = PHI3 | {
    "num_key_value_heads": 2, "partial_rotary_factor": 0.75, "sliding_window": None, "tie_word_embeddings": True,
    "original_max_position_embeddings": 16, "max_position_embeddings": 512, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
        "long_factor": [1.0, 1.5, 2.5, 6.0, 17.0, 30.0]},
}  # fmt: skip
QWEN3_MOE = WIDE | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
    "decoder_sparse_step": 1, "hidden_act": "silu", "max_window_layers": 4, "mlp_only_layers": [],
    "moe_intermediate_size": 24, "norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 3,
    "num_hidden_layers": 3, "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False,
}  # fmt: skip
PUBLISHED = {
    "llama3": LLAMA | {"rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}, "tie_word_embeddings": True},
    "llama_yarn": LLAMA | {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0,
        "beta_slow": 0.1, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}},
    "mistral": GROUPED | {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 7, "tie_word_embeddings": False},
    "qwen2_yarn": GROUPED | {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2,
        "tie_word_embeddings": False, "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "qwen3": WIDE | {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "attention_bias": False, "tie_word_embeddings": True, "max_window_layers": 4,
        "sliding_window": None, "use_sliding_window": False},
    "gpt2": OLD | {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "n_ctx": 64},
    "gemma": WIDE | {
        "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "attention_bias": False, "hidden_act": "gelu",
        "hidden_activation": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_linear": GEMMA3 | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "gpt_neox": NEOX,
    "gpt_neox_sequential": NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0},
    "olmo2": GROUPED | {
        "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False},
    "phi3": PHI3,
    "phi4_mini": PHI4,
    "phi4_mini_short": PHI4 | {"original_max_position_embeddings": 32, "max_position_embeddings": 1024},
    "smollm3": GROUPED | {
        "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
        "hidden_act": "silu", "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0],
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
        "use_sliding_window": False},
    "granite": GROUPED | {
        "model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_bias": False,
        "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "hidden_act": "silu", "logits_scaling": 8.0,
        "mlp_bias": False, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": True},
    "olmo": SIZES | {
        "model_type": "olmo", "architectures": ["OlmoForCausalLM"], "attention_bias": False, "clip_qkv": None,
        "hidden_act": "silu", "num_key_value_heads": 4, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": True},
    "stablelm": GROUPED | {
        "model_type": "stablelm", "architectures": ["StableLmForCausalLM"], "hidden_act": "silu",
        "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "qk_layernorm": False, "rope_theta": 10000,
        "tie_word_embeddings": False, "use_parallel_residual": False, "use_qkv_bias": True},
    "cohere": GROUPED | {
        "model_type": "cohere", "architectures": ["CohereForCausalLM"], "attention_bias": False,
        "hidden_act": "silu", "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "rope_theta": 8000000.0,
        "use_qk_norm": True},
    "phi": SIZES | {
        "model_type": "phi", "architectures": ["PhiForCausalLM"], "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
        "num_key_value_heads": 4, "partial_rotary_factor": 0.5, "qk_layernorm": False, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False},
    "starcoder2": GROUPED | {
        "model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5, "rope_theta": 999999.4420358813, "sliding_window": 7, "use_bias": True},
    "gptj": OLD | {
        "model_type": "gptj", "architectures": ["GPTJForCausalLM"], "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "n_inner": None, "rotary": True, "rotary_dim": 8,
        "scale_attn_weights": True, "tie_word_embeddings": False},
    "mixtral": GROUPED | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_act": "silu",
        "num_experts_per_tok": 2, "num_local_experts": 4, "output_router_logits": False, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_plain": QWEN3_MOE | {"norm_topk_prob": False, "attention_bias": True},
}  # fmt: skip
SPREAD = 3.0


def logits(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.numpy()


def build(name):
    settings, ids = PUBLISHED[name] | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}, token_ids()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(settings))
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder / "saved")
        saved = json.loads((folder / "saved" / "config.json").read_text())
        shapes = {k: list(v.shape) for k, v in load_file(folder / "saved" / "model.safetensors").items()}
        gain = 1.0
        for _ in range(6):
            write_folder(folder / "model", settings, weights(settings["model_type"], shapes, gain))
            gain = float(np.float32(gain * SPREAD / logits(folder / "model", ids).std()))
        write_folder(folder / "model", settings, weights(settings["model_type"], shapes, gain))
        found = logits(folder / "model", ids)
    told = {"settings": settings, "saved": saved, "gain": gain, "tensors": shapes}
    text = re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), json.dumps(told, indent=1))
    (FOLDER / f"{name}.json").write_text(text + "\n")
    np.save(FOLDER / f"{name}.npy", found)
    sys.stdout.write(f"{name}: standard deviation {found.std():.2f}, gain {gain:.3g}\n")


def compare(folder):
    error = np.abs(logits(folder, token_ids()) - reference(folder.name).logits).max()
    sys.stdout.write(f"{folder.name}: {error:.1e}\n")


if __name__ == "__main__":
    disable_progress_bar()
    FOLDER.mkdir(exist_ok=True)
    if sys.argv[1:2] == ["--open"]:
        for folder in sys.argv[2:]:
            compare(Path(folder))
    else:
        for name in sys.argv[1:] or PUBLISHED:
            build(name)

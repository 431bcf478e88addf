"""Reference models as GGUF files, by the conventions of llama.cpp's converter."""

import re

import gguf
import numpy as np
import tiny_models as tiny
from reference_models import VOCABULARY, reference

# By the name in a Hugging Face folder, without layer and ending.
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down", "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens": "token_embd", "gpt_neox.embed_in": "token_embd", "model.norm": "output_norm",
    "gpt_neox.final_layer_norm": "output_norm", "lm_head": "output", "embed_out": "output",
}  # fmt: skip
AROUND = ("gemma2", "gemma3", "olmo2")  # where the norm after attention is one of its output
PERMUTED, ADDED = ("granite", "smollm3"), ("gemma2", "gemma3")
ARCHITECTURES = {"gemma3_text": "gemma3", "gpt_neox": "gptneox"}


def gguf_name(arch, name):
    stem, end = name.rsplit(".", 1)
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{end}"
    layer, part = re.fullmatch(r"\w+\.layers\.(\d+)\.(.+)", stem).groups()
    after = "post_attention_norm" if arch in AROUND else "ffn_norm"
    return f"blk.{layer}.{PARTS.get(part, after)}.{end}"


def converted(arch, settings, name, tensor):
    heads, kv_heads = settings["num_attention_heads"], settings.get("num_key_value_heads")
    if arch in ADDED and name.endswith("norm.weight"):
        return tensor + 1
    if (arch in PERMUTED and "q_proj" in name) or (arch in PERMUTED and "k_proj" in name):
        number = heads if "q_proj" in name else kv_heads
        halves = tensor.reshape(number, 2, -1, *tensor.shape[1:])  # first and second half of a head
        return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(tensor.shape)
    if "query_key_value" in name:
        parts = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        return np.concatenate([parts[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)])
    return tensor


def write_reference(path, name, *, metadata=None, tensors=None):
    """A file of the reference with further metadata (named without the architecture) and tensors."""
    settings, _, there, _ = reference(name)
    arch = ARCHITECTURES.get(settings["model_type"], settings["model_type"])
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    if "num_key_value_heads" in settings:
        writer.add_head_count_kv(settings["num_key_value_heads"])
    if "rope_theta" in settings:
        writer.add_rope_freq_base(float(settings["rope_theta"]))
    if arch == "gptneox":
        writer.add_layer_norm_eps(settings["layer_norm_eps"])
    else:
        writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    # As many tokens as there are rows: single bytes, of which some are missing, and no merges.
    writer.add_token_list(tiny.ALPHABET[:VOCABULARY])
    writer.add_token_merges([])
    for key, value in (metadata or {}).items():
        add = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{arch}.{key}", value)
    found = {gguf_name(arch, key): converted(arch, settings, key, tensor) for key, tensor in there.items()}
    for key, tensor in (found | (tensors or {})).items():
        writer.add_tensor(key, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

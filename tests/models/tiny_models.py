"""Tiny models: configurations, random parameters, and their files in both formats."""

import json

import gguf
import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fisher_jax.models import DecoderConfig, init_params
from fisher_jax.models.tokenizer import byte_alphabet
from fisher_jax.models.weight_names import flatten

ALPHABET = sorted(byte_alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>"]
MERGES = ["t h", "th e", "Ġ the", "a n", "i n"]
TOKENS = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]

LLAMA = DecoderConfig(
    vocab_size=len(TOKENS) + 5, width=12, num_layers=2, num_heads=4, num_kv_heads=2, head_size=6, mlp_size=10,
    max_positions=16, rope_base=100.0, tied=True,
)  # fmt: skip
QWEN3 = DecoderConfig(
    vocab_size=len(TOKENS), width=12, num_layers=2, num_heads=3, num_kv_heads=1, head_size=4, mlp_size=10,
    max_positions=16, rope_base=100.0, rope_divisors=(1.0, 3.0), tied=False, qk_norm=True, qkv_bias=True,
)  # fmt: skip
GPT2 = DecoderConfig(
    vocab_size=len(TOKENS), width=12, num_layers=2, num_heads=3, num_kv_heads=3, head_size=4, mlp_size=10,
    max_positions=16, norm="layer", positions="learned", activation="gelu_tanh", gated=False, qkv_bias=True,
    out_bias=True, mlp_bias=True, tied=True,
)  # fmt: skip


def random_params(config, seed=0, dtype="float32"):
    """Parameters large enough that every part matters, scales and biases random as well."""
    params = init_params(config, jax.random.key(seed), dtype)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (leaf + 0.4 * rng.normal(size=leaf.shape)).astype(leaf.dtype), params)


def tokens(config, rows=2, length=9, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length), dtype=np.int32)


def byte_alphabet_inverse():
    return {byte: character for character, byte in byte_alphabet().items()}


def write_gguf(
    path, config, params, *, arch="llama", metadata=None, tensors=None, token_list=TOKENS, merges=MERGES,
    pre="smollm", model="gpt2", types=None, scores=None, bos=0, quantized=None, parts=0,
):  # fmt: skip
    """A GGUF file that holds ``params`` as they are: Q and K rows in whatever order the caller means.

    Matrices whose rows fill blocks of the type ``quantized`` are stored in it. Each part of a split file has so many
    tensors as ``parts`` says.
    """
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=parts)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(token_list)
    writer.add_token_types(types or [3 if token in SPECIAL else 1 for token in token_list])
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    if bos is not None:
        writer.add_bos_token_id(bos)
    for key, value in (metadata or {}).items():
        {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[
            type(value)
        ](key, value)
    for name, tensor in {**gguf_tensors(params), **(tensors or {})}.items():
        if tensor is None:
            continue
        tensor = np.ascontiguousarray(tensor, np.float32)
        if quantized is not None and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PARTS = {
    "attention_norm": ("attn_norm", "input_layernorm"),
    "mlp_norm": ("ffn_norm", "post_attention_layernorm"),
    "attention/q": ("attn_q", "self_attn.q_proj"),
    "attention/k": ("attn_k", "self_attn.k_proj"),
    "attention/v": ("attn_v", "self_attn.v_proj"),
    "attention/o": ("attn_output", "self_attn.o_proj"),
    "attention/q_norm": ("attn_q_norm", "self_attn.q_norm"),
    "attention/k_norm": ("attn_k_norm", "self_attn.k_norm"),
    "mlp/gate": ("ffn_gate", "mlp.gate_proj"),
    "mlp/up": ("ffn_up", "mlp.up_proj"),
    "mlp/down": ("ffn_down", "mlp.down_proj"),
}


def llama_tensors(params, which, names, layer):
    """Tensor names and values, kernels as ``[out, in]``."""
    found = {}
    for path, leaf in flatten(params).items():
        if path in names:
            found[names[path]] = np.asarray(leaf)
            continue
        part, kind = path.removeprefix("layers/").rsplit("/", 1)
        for i, value in enumerate(np.asarray(leaf)):
            name = f"{layer.format(i)}.{PARTS[part][which]}.{'bias' if kind == 'bias' else 'weight'}"
            found[name] = value.T if kind == "kernel" else value
    return found


def gguf_tensors(params):
    names = {"embedding": "token_embd.weight", "head": "output.weight", "final_norm/scale": "output_norm.weight"}
    return llama_tensors(params, 0, names, "blk.{}")


def hf_tensors(params):
    names = {
        "embedding": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        "final_norm/scale": "model.norm.weight",
    }
    return llama_tensors(params, 1, names, "model.layers.{}")


def gpt2_tensors(params, prefix=""):
    """Conv1D kernels as ``[in, out]``, q, k and v side by side."""
    params = jax.tree.map(np.asarray, params)
    found = {"wte.weight": params["embedding"], "wpe.weight": params["positions"]}
    found |= {"ln_f.weight": params["final_norm"]["scale"], "ln_f.bias": params["final_norm"]["bias"]}
    layers = params["layers"]
    for i in range(len(layers["mlp_norm"]["scale"])):
        for theirs, ours in {"ln_1": "attention_norm", "ln_2": "mlp_norm"}.items():
            found[f"h.{i}.{theirs}.weight"] = layers[ours]["scale"][i]
            found[f"h.{i}.{theirs}.bias"] = layers[ours]["bias"][i]
        attention, mlp = layers["attention"], layers["mlp"]
        for theirs, parts in {
            "attn.c_attn": [attention["q"], attention["k"], attention["v"]],
            "attn.c_proj": [attention["o"]],
            "mlp.c_fc": [mlp["up"]],
            "mlp.c_proj": [mlp["down"]],
        }.items():
            found[f"h.{i}.{theirs}.weight"] = np.concatenate([part["kernel"][i] for part in parts], axis=1)
            found[f"h.{i}.{theirs}.bias"] = np.concatenate([part["bias"][i] for part in parts])
    return {prefix + name: tensor for name, tensor in found.items()}


def llama_settings(config, **changes):
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
        "hidden_size": config.width, "num_hidden_layers": config.num_layers, "hidden_act": "silu",
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size, "intermediate_size": config.mlp_size, "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions, "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied,
    }  # fmt: skip
    return settings | changes


def gpt2_settings(config, **changes):
    settings = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_embd": config.width, "n_layer": config.num_layers, "n_head": config.num_heads,
        "n_inner": config.mlp_size, "n_positions": config.max_positions, "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
    }  # fmt: skip
    return settings | changes


def write_hf(folder, settings, tensors, *, shards=1, token_list=TOKENS):
    """A model folder; with several shards, also their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer(token_list).save(str(folder / "tokenizer.json"))
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def tokenizer(token_list=TOKENS):
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(token_list)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend

"""A tiny random Llama model as a Hugging Face folder, and texts to go with it."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

WIDTH, LAYERS, HEADS, MLP = 16, 2, 2, 32
# fmt: off
WORDS = [
    "the", "a", "river", "runs", "past", "old", "mills", "and", "hills", "where",
    "people", "walk", "in", "spring", "rain", "of", "bread", "salt",
]
# fmt: on


def write_model(folder, *, seed=0, poison=False, layers=LAYERS, mlp=MLP):
    """config.json, model.safetensors and tokenizer.json; `poison` makes every logit overflow."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    vocab_size = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "intermediate_size": mlp,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(seed)

    def matrix(*shape):
        return (generator.normal(size=shape) * 0.3).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(vocab_size, WIDTH)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            weights[f"{prefix}self_attn.{name}_proj.weight"] = matrix(WIDTH, WIDTH)
        weights[f"{prefix}mlp.gate_proj.weight"] = matrix(mlp, WIDTH)
        weights[f"{prefix}mlp.up_proj.weight"] = matrix(mlp, WIDTH)
        weights[f"{prefix}mlp.down_proj.weight"] = matrix(WIDTH, mlp)
        weights[f"{prefix}input_layernorm.weight"] = np.ones(WIDTH, np.float32)
        weights[f"{prefix}post_attention_layernorm.weight"] = np.ones(WIDTH, np.float32)
    weights["model.norm.weight"] = np.ones(WIDTH, np.float32)
    if poison:
        weights["model.norm.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors")
    return folder


def _tokenizer():
    """Byte-level, with each known word and its spaced form as one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    merges = []
    for word in WORDS:
        for whole in (word, "Ġ" + word):
            prefix = whole[0]
            for symbol in whole[1:]:
                if prefix + symbol not in vocab:
                    vocab[prefix + symbol] = len(vocab)
                    merges.append((prefix, symbol))
                prefix += symbol
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def prose(number, words=150):
    """A document of known words, different for every number."""
    generator = np.random.default_rng(1000 + number)
    weights = 1.0 / np.arange(1, len(WORDS) + 1)
    chosen = generator.choice(WORDS, size=words, p=weights / weights.sum())
    return " ".join(chosen.tolist()) + ".\n"


def write_texts(folder, count=20, words=150):
    """`count` files of prose, as strings for the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"text{number:02d}.txt"
        path.write_text(prose(number, words))
        paths.append(str(path))
    return paths

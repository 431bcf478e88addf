"""What does loading a model of a billion parameters take in memory beside its weights?

Random weights are written as a Hugging Face folder of 14 shards in float32 and in bfloat16, and as a GGUF file in
Q8_0. A process of its own loads each, while it watches its anonymous memory (what no file stands behind: pages of
mapped files can be dropped at any time, and are not counted). The bound is the weights in their dtype, 64 MiB, and
one block of rows (8 MiB).

    uv run python experiments/loading_memory.py           # five minutes, 8 GiB of disk; writes results/
    uv run python experiments/loading_memory.py --quick   # 30 million parameters: does it run?
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import gguf
import jax
import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from fisher_jax import models

RESULTS = pathlib.Path(__file__).parent / "results"
KERNELS = {
    "self_attn.q_proj": ("attn_q", 2048, 2048), "self_attn.k_proj": ("attn_k", 2048, 2048),
    "self_attn.v_proj": ("attn_v", 2048, 2048), "self_attn.o_proj": ("attn_output", 2048, 2048),
    "mlp.gate_proj": ("ffn_gate", 8192, 2048), "mlp.up_proj": ("ffn_up", 8192, 2048),
    "mlp.down_proj": ("ffn_down", 2048, 8192),
}  # fmt: skip
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
CASES = (
    ("float32", "auto"), ("float32", "bfloat16"), ("bfloat16", "auto"), ("bfloat16", "float32"),
    ("q8_0.gguf", "auto"), ("q8_0.gguf", "auto"),
)  # fmt: skip


def layer(i, scale):
    """Names in both kinds of files, and values, of the tensors of a layer."""
    rng = np.random.default_rng(i)
    for name, (ours, rows, columns) in KERNELS.items():
        shape = rows // scale, columns // scale
        yield f"model.layers.{i}.{name}.weight", f"blk.{i}.{ours}.weight", rng.standard_normal(shape, np.float32)
    for name, ours in NORMS.items():
        yield f"model.layers.{i}.{name}.weight", f"blk.{i}.{ours}.weight", np.ones(2048 // scale, np.float32)


def outside(rows, scale):
    embedding = np.random.default_rng(99).standard_normal((rows, 2048 // scale), np.float32)
    yield "model.embed_tokens.weight", "token_embd.weight", embedding
    yield "model.norm.weight", "output_norm.weight", np.ones(2048 // scale, np.float32)


def tokenizer():
    letters = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "ab"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [("a", "b")])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend, letters


def write(root, layers, scale):
    rows, width, heads = 65_536 // scale, 2048 // scale, 16
    settings = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": rows, "hidden_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads, "hidden_act": "silu",
        "intermediate_size": 4 * width, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }  # fmt: skip
    backend, letters = tokenizer()
    writer = gguf.GGUFWriter(root / "q8_0.gguf", "llama")
    for add, value in (
        (writer.add_block_count, layers), (writer.add_context_length, 2048), (writer.add_embedding_length, width),
        (writer.add_feed_forward_length, 4 * width), (writer.add_head_count, heads),
        (writer.add_head_count_kv, heads), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "gpt-2"),
        (writer.add_token_list, letters), (writer.add_token_types, [1] * len(letters)),
        (writer.add_token_merges, ["a b"]),
    ):  # fmt: skip
        add(value)
    for i in range(layers + 1):
        tensors = list(layer(i, scale) if i < layers else outside(rows, scale))
        for folder, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
            place = root / folder
            place.mkdir(exist_ok=True)
            (place / "config.json").write_text(json.dumps(settings))
            backend.save(str(place / "tokenizer.json"))
            save_file({name: x.astype(dtype) for name, _, x in tensors}, place / f"model-{i:05}.safetensors")
            index = place / "model.safetensors.index.json"
            known = json.loads(index.read_text())["weight_map"] if index.exists() else {}
            known |= {name: f"model-{i:05}.safetensors" for name, _, _ in tensors}
            index.write_text(json.dumps({"weight_map": known}))
        for _, name, x in tensors:
            kind = gguf.GGMLQuantizationType.Q8_0
            if x.ndim == 1:
                writer.add_tensor(name, x)
            else:
                writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def anonymous():
    """MiB of memory without a file behind it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def load(small, path, dtype):
    models.load(small)  # imports, and what they compile
    start, most, done = anonymous(), 0.0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous() - start)

    thread, began = threading.Thread(target=watch), time.monotonic()
    thread.start()
    model = models.load(path, dtype=dtype)
    seconds = time.monotonic() - began
    done.set()
    thread.join()
    held = anonymous() - start
    leaves = jax.tree.leaves(model.params)
    found = {"parameters": sum(leaf.size for leaf in leaves), "kept": model.dtype, "seconds": seconds, "most": most}
    found |= {"weights": sum(leaf.nbytes for leaf in leaves) / 2**20, "held": held}
    sys.stdout.write(json.dumps(found))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    lines = [
        "| file | asked | kept as | weights (MiB) | most beside them while loading | left beside them | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        (root / "small").mkdir()
        write(root / "small", 1, 16)
        write(root, *((2, 4) if quick else (13, 1)))
        for file, dtype in CASES:
            command = [sys.executable, __file__, "load", root / "small" / "float32", root / file, dtype]
            environment = os.environ | {"FISHER_JAX_CACHE": str(root / "cache")}
            done = subprocess.run(
                list(map(str, command)), env=environment, capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout)
            beside, left = found["most"] - found["weights"], found["held"] - found["weights"]
            lines.append(
                f"| {file} | {dtype} | {found['kept']} | {found['weights']:,.0f} | {beside:+.0f} MiB "
                f"| {left:+.0f} MiB | {found['seconds']:.0f} |"
            )
            sys.stdout.write(f"{lines[-1]}\n")
    title = f"{found['parameters']:,} random parameters; the second line of the GGUF file is read from the cache.\n\n"
    if not quick:
        (RESULTS / "loading_memory.md").write_text(title + "\n".join(lines) + "\n")


if __name__ == "__main__":
    load(*sys.argv[2:]) if sys.argv[1:2] == ["load"] else main()

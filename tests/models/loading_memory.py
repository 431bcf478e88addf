"""Two processes: `write FOLDER` writes models whose embedding has 128 MiB in float32, `load FOLDER` loads them.

The second prints, in MiB, the weights, the most anonymous memory above the start, and what is left of it with the
model and without it.
"""

import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import gguf
import jax
import numpy as np
import published_models
import tiny_models as tiny

from fisher_jax import models

CONFIG = models.DecoderConfig(
    vocab_size=2**15, width=1024, num_layers=1, num_heads=2, num_kv_heads=1, head_size=32, mlp_size=64,
    max_positions=16, rope_base=100.0, tied=True,
)  # fmt: skip


def params():
    def values(leaf):
        # Numbers that every type of weights holds to its last bit but the quantised ones.
        found = np.arange(leaf.size, dtype=np.int64) * 2654435761 % 251 - 125
        return (found.astype(np.float32) / 128).reshape(leaf.shape)

    return jax.tree.map(values, models.abstract_params(CONFIG))


def write(folder: Path) -> None:
    tiny.write_hf(folder / "model", tiny.llama_settings(CONFIG), tiny.hf_tensors(params()))
    tiny.write_gguf(folder / "model.gguf", CONFIG, params(), quantized=gguf.GGMLQuantizationType.Q8_0)


def anonymous() -> float:
    """MiB of memory without a file behind it."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def load(folder: Path) -> None:
    models.load(published_models.llama_folder(folder / "small"))  # imports, and what they compile
    # A GGUF file is read a second time from the cache of what was dequantised.
    cases = ("model", "float32"), ("model", "bfloat16"), ("model.gguf", "bfloat16"), ("model.gguf", "bfloat16")
    sys.stdout.write(json.dumps([one(folder / file, dtype) for file, dtype in cases]))


def one(path: Path, dtype: str) -> dict[str, float]:
    start, most, done = anonymous(), 0.0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    model = models.load(path, dtype=dtype)
    done.set()
    thread.join()
    held = anonymous() - start
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 2**20
    rows = np.array([0, 1, 2047, 2048, 2049, 4097, CONFIG.vocab_size - 1])
    error = np.abs(np.asarray(model.params["embedding"][rows], np.float32) - params()["embedding"][rows]).max()
    del model
    jax.block_until_ready(jax.numpy.zeros(3))  # with its next call JAX gives back what it had taken over
    return {"weights": weights, "most": most, "held": held, "left": anonymous() - start, "error": float(error)}


if __name__ == "__main__":
    {"write": write, "load": load}[sys.argv[1]](Path(sys.argv[2]))

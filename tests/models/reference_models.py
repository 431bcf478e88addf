"""Models of every family as transformers computes them: settings, weights from a seed, stored logits.

``references/NAME.json`` holds the settings as they are published, those that transformers writes, and names and shapes
of all tensors; ``references/NAME.npz`` token ids and logits. `build_references` makes both. Weights are drawn here:
tensor by tensor from a generator of its own, so that no order and no framework matters.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import tiny_models as tiny

FOLDER = Path(__file__).parent / "references"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
SEED, VOCABULARY = 16, 64
EMBEDDINGS = ("wte.weight", "wpe.weight", "embed_tokens.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


def weights(kind, shapes, gain, dtype=np.float32):
    """Every tensor: matrices with standard deviation ``1.5 / sqrt(in)``, scales around one (around zero where one is
    added to them), biases of 0.3; ``gain`` times that for the head, or for the embedding where it is the head."""
    head = next((name for name in shapes if name.endswith(HEADS)), None)
    head = head or next(name for name in shapes if name.endswith(EMBEDDINGS))
    found = {}
    for name, shape in shapes.items():
        draws = np.random.default_rng([SEED, zlib.crc32(name.encode())]).standard_normal(shape)
        if name.endswith(".bias"):
            draws = 0.3 * draws
        elif len(shape) == 1 or "norm" in name:
            draws = 0.3 * draws + (0.0 if kind.startswith("gemma") else 1.0)
        elif not name.endswith(EMBEDDINGS):
            inputs = shape[0] if kind == "gpt2" and name not in HEADS else shape[-1]
            draws = 1.5 * draws / np.sqrt(inputs)
        found[name] = (gain * draws if name == head else draws).astype(dtype)
    return found


def token_ids(rows=2, length=24):
    return np.random.default_rng(SEED).integers(0, VOCABULARY, (rows, length), dtype=np.int32)


def reference(name):
    """What is stored: settings, saved settings, tensors by name, and pairs of token ids and logits."""
    told = json.loads((FOLDER / f"{name}.json").read_text())
    tensors = weights(told["settings"]["model_type"], told["tensors"], told["gain"])
    ids = token_ids()
    with np.load(FOLDER / f"{name}.npz") as arrays:
        pairs = [(ids[:, : logits.shape[1]], logits) for logits in arrays.values()]
    return told["settings"], told["saved"], tensors, pairs


def write_folder(folder, settings, tensors):
    """A model folder with a tokenizer of as many tokens."""
    return tiny.write_hf(folder, settings, tensors, token_list=tiny.TOKENS[:VOCABULARY])

"""Models of every family as transformers computes them: settings, weights from a seed, stored logits.

``references/NAME.json`` holds the settings as they are published, those that transformers writes, and names and
shapes of all tensors; ``references/NAME.npy`` logits. `build_references` makes both. Weights are drawn here, each
tensor from a generator of its own, so that no order and no framework matters.
"""

import functools
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

FOLDER = Path(__file__).parent / "references"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
SEED, VOCABULARY = 16, 64
EMBEDDINGS = ("wte.weight", "wpe.weight", "embed_tokens.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


def weights(kind, shapes, gain, dtype=np.float32):
    """Every tensor: matrices with standard deviation ``1.2 / sqrt(in)``, scales around one (around zero where one is
    added to them), biases of 0.3; ``gain`` times that for the head, or for the embedding where it is the head."""
    head = next((name for name in shapes if name.endswith(HEADS)), None)
    head = head or next(name for name in shapes if name.endswith(EMBEDDINGS) and not name.endswith("wpe.weight"))
    found = {}
    for name, shape in shapes.items():
        draws = np.random.default_rng([SEED, zlib.crc32(name.encode())]).standard_normal(shape)
        if name.endswith(".bias"):
            draws = 0.3 * draws
        elif len(shape) == 1 or "norm" in name:
            draws = 0.3 * draws + (0.0 if kind.startswith("gemma") else 1.0)
        elif not name.endswith(EMBEDDINGS):
            inputs = shape[0] if kind == "gpt2" and name not in HEADS else shape[-1]
            draws = 1.2 * draws / np.sqrt(inputs)
        found[name] = (gain * draws if name == head else draws).astype(dtype)
    return found


def token_ids(rows=2, length=24):
    return np.random.default_rng(SEED).integers(0, VOCABULARY, (rows, length), dtype=np.int32)


class Reference(NamedTuple):
    """``saved`` is what transformers made of the settings; logits are those of `token_ids`."""

    settings: dict[str, Any]
    saved: dict[str, Any]
    tensors: dict[str, np.ndarray]
    logits: np.ndarray


def told(name):
    """The content of the JSON file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


@functools.cache
def reference(name):
    content = told(name)
    tensors = weights(content["settings"]["model_type"], content["tensors"], content["gain"])
    return Reference(content["settings"], content["saved"], tensors, np.load(FOLDER / f"{name}.npy"))


def write_folder(folder, settings, tensors):
    """A model folder with a tokenizer of as many words."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    words = WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    Tokenizer(words).save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""Hugging Face folders: ``config.json``, ``*.safetensors`` (in one piece or sharded), ``tokenizer.json``."""

import hashlib
import json
from pathlib import Path

import numpy as np

from fisher_jax.errors import InputError
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.hf_config import config_from_hf
from fisher_jax.models.layout import GPT2_NAMES, HF_NAMES, assemble
from fisher_jax.models.optional import optional
from fisher_jax.models.tokenizer import Tokenizer

__all__ = ["HfFolder"]

FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints carry and that follow from the configuration.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


class HfFolder:
    """An open model folder. Raises ``InputError`` for missing or damaged files and unsupported models."""

    def __init__(self, path: Path):
        self.path, self.label = path, path.name
        self.settings = self.json("config.json")
        self.gpt2 = self.settings.get("model_type") == "gpt2"
        self.files = self.weight_files()
        self.places: dict[str, tuple] = {}
        for file in self.files:
            opened = open_safetensors(file)
            for name in opened.keys():  # noqa: SIM118 - it is a function of the file, not a mapping
                ours = name.removeprefix("transformer.") if self.gpt2 else name
                if ours in self.places:
                    raise InputError(f"{self.label} holds the tensor {name} twice")
                self.places[ours] = (opened, name)
        self.names = frozenset(self.places)

    def json(self, name: str) -> dict:
        file = self.path / name
        if not file.is_file():
            raise InputError(f"{self.path} has no {name}; it is not a complete Hugging Face model folder")
        try:
            return json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is not valid JSON: {error}") from error

    def weight_files(self) -> list[Path]:
        """The shards that the index names, else every safetensors file of the folder."""
        if not (self.path / "model.safetensors.index.json").is_file():
            if found := sorted(self.path.glob("*.safetensors")):
                return found
            raise InputError(f"{self.path} has no *.safetensors; only that weight format is read from folders")
        weight_map = self.json("model.safetensors.index.json")["weight_map"]
        files = [self.path / name for name in sorted(set(weight_map.values()))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{self.path} lacks {', '.join(absent)}, which its model.safetensors.index.json names")
        return files

    def config(self) -> DecoderConfig:
        """The decoder's shape, from ``config.json``."""
        return config_from_hf(self.settings, self.label, has_head="lm_head.weight" in self.names)

    def read(self, name: str) -> np.ndarray:
        """A tensor in the dtype of its file."""
        opened, stored_name = self.places[name]
        if (kind := opened.get_slice(stored_name).get_dtype()) not in FLOATS:
            raise InputError(f"{stored_name} in {self.label} is stored as {kind}; supported: {', '.join(FLOATS)}")
        return opened.get_tensor(stored_name)

    def params(self, config: DecoderConfig, dtype) -> dict:
        """The decoder's parameters as NumPy arrays, layers stacked."""
        ignored = {name for name in self.names if name.endswith(BUFFERS)}
        if config.tied and "lm_head.weight" in self.names:
            embedding = "wte.weight" if self.gpt2 else "model.embed_tokens.weight"
            if embedding in self.names and not np.array_equal(self.read("lm_head.weight"), self.read(embedding)):
                raise InputError(
                    f"{self.label} says tie_word_embeddings, but its lm_head.weight differs from {embedding}"
                )
            ignored.add("lm_head.weight")

        def orient(path: str, tensor: np.ndarray) -> np.ndarray:
            if not self.gpt2:
                return tensor.T if path.endswith("/kernel") else tensor
            if (part := path.removeprefix("layers/attention/")[:2]) in ("q/", "k/", "v/"):
                third = tensor.shape[-1] // 3  # c_attn is [in, 3 out]: q, k and v side by side
                start = third * ("q/", "k/", "v/").index(part)
                return tensor[..., start : start + third]
            return tensor

        return assemble(self, config, GPT2_NAMES if self.gpt2 else HF_NAMES, dtype, orient, ignored)

    def tokenizer(self) -> Tokenizer:
        """From ``tokenizer.json``."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise InputError(
                f"{self.path} has no tokenizer.json; save it there with the fast tokenizer's save_pretrained"
            )
        return Tokenizer.from_json(file.read_text("utf-8"))

    def fingerprint(self) -> str:
        """From the bytes of ``config.json`` and of every weight file."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in self.files:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{file.name} {file.stat().st_size} {content}\n".encode())
        return digest.hexdigest()[:16]


def open_safetensors(file: Path):
    safetensors = optional("safetensors", f"reading {file.name}")
    try:
        return safetensors.safe_open(file, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{file} is cut off or damaged ({error}); fetch the file again") from error

"""Hugging Face folders: ``config.json``, ``*.safetensors`` (in one piece or sharded), ``tokenizer.json``."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Sharding

from fisher_jax._support.errors import InputError, shown
from fisher_jax._support.processes import is_first
from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families import FAMILIES
from fisher_jax.models.hf_config import config_from_hf
from fisher_jax.models.json_files import MOST_BYTES, is_there, read_json, read_text
from fisher_jax.models.safetensors_file import FLOATS, StoredTensor, mapped, read_header
from fisher_jax.models.tokenizer import Tokenizer
from fisher_jax.models.weight_names import assemble, check_entries, same_values
from fisher_jax.models.weight_rows import Rows

__all__ = ["INDEX", "ONLY", "HfFolder", "shards_of"]

INDEX, ONLY = "model.safetensors.index.json", "model.safetensors"
# Endings of files that hold weights.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")


class HfFolder:
    """An open model folder. Raises ``InputError`` for missing or damaged files and unsupported models.

    Attributes:
        unread: names of other files of the folder that look like weights; they are not read.
    """

    def __init__(self, path: Path):
        self.path, self.label = path, path.name
        refuse_adapter(path)
        self.settings = self.json("config.json")
        kind = self.settings.get("model_type")
        # Others are refused when their configuration is asked for; their tokenizer can be read.
        self.family = FAMILIES.get(kind) if isinstance(kind, str) else None
        prefix = self.family.layout.prefix if self.family else ""
        self.files = self.weight_files()
        self.unread = tuple(name for name in weights_in(path) if name not in {file.name for file in self.files})
        self.places: dict[str, tuple[Path, str]] = {}
        self.stored_tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, tensor in read_header(file)[0].items():
                ours = name.removeprefix(prefix)
                if ours in self.places:
                    raise InputError(f"{self.label} holds the tensor {shown(name)} twice")
                self.places[ours], self.stored_tensors[ours] = (file, name), tensor
        self.names = frozenset(self.places)
        self.shapes = {name: tensor.shape for name, tensor in self.stored_tensors.items()}
        self.check_index()

    def json(self, name: str) -> dict:
        """The content of one of the folder's files, which must be an object."""
        file = self.path / name
        if not is_there(file):
            raise InputError(f"{self.path} has no {name}; it is not a complete Hugging Face model folder")
        content = read_json(file)
        if not isinstance(content, dict):
            raise InputError(f"{file} must be an object with named settings, found {shown(content)}")
        return content

    def weight_files(self) -> list[Path]:
        """The shards that the index names, else ``model.safetensors``; no other file is a model's weights."""
        if not is_there(self.path / INDEX):
            if is_there(self.path / ONLY):
                return [self.path / ONLY]
            beside = ", ".join(weights_in(self.path)[:8])
            raise InputError(
                f"{self.path} has no {ONLY} and no {INDEX}; only these are read from folders"
                + (f", not {shown(beside)[1:-1]}" if beside else "")
            )
        self.weight_map = shards_of(self.json(INDEX), str(self.path / INDEX))
        files = [self.path / name for name in sorted(set(self.weight_map.values()))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{self.path} lacks {shown(', '.join(absent))[1:-1]}, which its {INDEX} names")
        return files

    def check_index(self) -> None:
        """Every tensor lies in the shard that the index says."""
        found = {name: file.name for file, name in self.places.values()}
        for name, file in getattr(self, "weight_map", found).items():
            if found.get(name) != file:
                there = f"it lies in {found[name]}" if name in found else "no shard has it"
                raise InputError(f"{self.path / INDEX} says that {shown(name)} lies in {file}, but {there}")

    def config(self) -> DecoderConfig:
        """The decoder's shape, from ``config.json``."""
        config = config_from_hf(self.settings, self.label, has_head=self.head_name() in self.names)
        check_entries(self, config)
        return config

    def stored(self, name: str) -> np.ndarray:
        """A tensor in the dtype of its file."""
        file, stored_name = self.places[name]
        if (kind := self.stored_tensors[name].kind) not in FLOATS:
            raise InputError(
                f"{shown(stored_name)} in {self.label} is stored as {kind}; supported: {', '.join(FLOATS)}"
            )
        return mapped(file, self.stored_tensors[name])

    def values(self, name: str, rows: np.ndarray) -> np.ndarray:
        return rows

    def unit(self, name: str) -> tuple[int, int]:
        return 1, 1

    def kinds_of_matrices(self) -> set[str]:
        """The types that its matrices are stored in."""
        return {tensor.kind for tensor in self.stored_tensors.values() if len(tensor.shape) > 1}

    def head_name(self) -> str:
        return self.family.layout.names["head"] if self.family else "lm_head.weight"

    def params(self, config: DecoderConfig, dtype, shardings: Mapping[str, Sharding] | None = None) -> dict:
        """The decoder's parameters, layers stacked: NumPy arrays, or, with the sharding of every path, on devices.

        With shardings, the first process alone compares the head of a tied model with its embedding.
        """
        layout = FAMILIES[self.settings["model_type"]].layout
        ignored = {name for name in self.names if name.endswith(layout.buffers)}
        embedding, head = layout.names["embedding"], layout.names["head"]
        if config.tied and head in self.names:
            compared = embedding in self.names and (shardings is None or is_first())
            if compared and not same_values(self, head, embedding):
                raise InputError(f"{self.label} says tie_word_embeddings, but its {head} differs from {embedding}")
            ignored.add(head)

        def select(path: str, stored: np.ndarray) -> Rows:
            return layout.selected(config, path, stored)

        return assemble(self, config, layout.names, dtype, select, ignored, shardings)

    def tokenizer(self, rows: int = 2**18) -> Tokenizer:
        """From ``tokenizer.json``, for a head of at most so many rows."""
        file = self.path / "tokenizer.json"
        if not is_there(file):
            raise InputError(
                f"{self.path} has no tokenizer.json; save it there with the fast tokenizer's save_pretrained"
            )
        # Published ones take at most 150 bytes for a token.
        return Tokenizer.from_json(
            read_text(file, most=MOST_BYTES + 256 * rows), f"the tokenizer.json of {self.label}"
        )

    def fingerprint(self) -> str:
        """From the bytes of ``config.json`` and of every weight file."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in self.files:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{file.name} {file.stat().st_size} {content}\n".encode())
        return digest.hexdigest()[:16]


def refuse_adapter(path: Path) -> None:
    """A folder of a LoRA adapter is called by its name."""
    file = path / "adapter_config.json"
    if file.is_file() and not any((path / name).is_file() for name in (INDEX, ONLY)):
        adapter = Settings(read_json(file), str(file))
        kind, base = adapter.text("peft_type", "LORA"), adapter.text("base_model_name_or_path", None)
        name = "LoRA" if kind == "LORA" else shown(kind)
        of = f" of {shown(base)}" if base else ""
        raise InputError(
            f"{path} is a {name} adapter{of}, not a model; merge it into that model first and give the result"
        )


def shards_of(index: Any, label: str) -> dict[str, str]:
    """The file name of every tensor; an ``InputError`` for names that leave the folder."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{label} has no weight_map from tensors to files, found {shown(weight_map)}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not plain(name):
            raise InputError(
                f"{label} says that {shown(tensor)} lies in {shown(name)}, but it must be the name of a .safetensors "
                "file beside it"
            )
    return weight_map


def plain(name: str) -> bool:
    """The name of a file in the same folder."""
    return name.endswith(".safetensors") and not set(name) & set("/\\\0") and name.isprintable() and len(name) < 256


def weights_in(path: Path) -> list[str]:
    """Files of the folder that look like weights, by name; so do those in its subfolder ``original``."""
    found = [*path.iterdir(), *((path / "original").iterdir() if (path / "original").is_dir() else ())]
    return sorted(str(file.relative_to(path)) for file in found if file.name.endswith(WEIGHTS) and file.is_file())

"""What a model's own files say beside its weights: special tokens, chat template, generation settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fisher_jax.models.gguf_file import GgufFile
from fisher_jax.models.hf_folder import HfFolder
from fisher_jax.models.loading import files_of

__all__ = ["Origin", "read_origin"]

NAMED = ("bos", "eos", "pad", "unk")
GGUF_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


class Origin(NamedTuple):
    """Settings for `fisher_jax.models.save`; token ids are those of the model before it was cut.

    Attributes:
        settings: entries of ``config.json``.
        tokenizer_settings: entries of ``tokenizer_config.json``.
        generation: entries of ``generation_config.json``; empty where there is none.
    """

    settings: Mapping[str, Any]
    tokenizer_settings: Mapping[str, Any]
    generation: Mapping[str, Any]

    def renumbered(self, kept: np.ndarray) -> "Origin":
        """With the ids of a vocabulary of which only ``kept`` are left; others become ``None``."""
        new = {int(old): i for i, old in enumerate(kept)}

        def entry(name: str, value: Any) -> Any:
            if not name.endswith("_token_id"):
                return value
            return [new[id] for id in value if id in new] if isinstance(value, list) else new.get(value)

        settings, generation = (
            {name: entry(name, value) for name, value in part.items()} for part in (self.settings, self.generation)
        )
        return Origin(settings, self.tokenizer_settings, generation)


def read_origin(source: str | None) -> Origin:
    """From the same argument as `fisher_jax.models.load`."""
    path = files_of(source)
    return from_folder(path) if path.is_dir() else from_gguf(GgufFile(path))


def from_gguf(file: GgufFile) -> Origin:
    tokens = file.metadata("tokenizer.ggml.tokens")
    ids = {end: file.metadata(f"tokenizer.ggml.{name}_token_id", None) for end, name in GGUF_NAMES.items()}
    settings = {f"{end}_token_id": id for end, id in ids.items() if id is not None and end != "unk"}
    frame = {f"{end}_token": tokens[id] for end, id in ids.items() if id is not None}
    template = file.metadata("tokenizer.chat_template", None)
    return Origin(settings, frame | ({"chat_template": template} if template else {}), {})


def from_folder(path: Path) -> Origin:
    """Everything of ``config.json`` but the size of the vocabulary and the weights' dtype, which `save` knows."""
    folder = HfFolder(path)
    settings = {k: v for k, v in folder.settings.items() if k not in ("vocab_size", "dtype", "torch_dtype")}
    frame = folder.json("tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    named = {name: frame[name] for end in NAMED if frame.get(name := f"{end}_token")}
    template = path / "chat_template.jinja"
    chat = template.read_text("utf-8") if template.is_file() else frame.get("chat_template")
    generation = path / "generation_config.json"
    return Origin(
        settings,
        named | ({"chat_template": chat} if chat else {}),
        json.loads(generation.read_text("utf-8")) if generation.is_file() else {},
    )

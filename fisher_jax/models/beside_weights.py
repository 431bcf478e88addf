"""What a model's own files say beside its weights: special tokens, chat template, generation settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.gguf_file import GgufFile
from fisher_jax.models.hf_folder import HfFolder
from fisher_jax.models.json_files import is_there, read_text
from fisher_jax.models.loading import files_of
from fisher_jax.models.token_ids import check_ids, renumbered

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
        """With the ids of a vocabulary of which only ``kept`` are left; others become ``None`` or are left out."""
        new = {int(old): i for i, old in enumerate(kept)}
        return Origin(*(renumbered(part, new) for part in self))


def read_origin(source: str | None) -> Origin:
    """From the same argument as `fisher_jax.models.load`.

    Raises:
        InputError: a file is damaged, or names tokens that the model does not have.
    """
    path = files_of(source)
    return from_folder(path) if path.is_dir() else from_gguf(GgufFile(path))


def from_gguf(file: GgufFile) -> Origin:
    tokens = file.settings.texts("tokenizer.ggml.tokens")
    ids = {
        end: file.settings.integer(f"tokenizer.ggml.{name}_token_id", 0, len(tokens) - 1, None)
        for end, name in GGUF_NAMES.items()
    }
    settings = {f"{end}_token_id": id for end, id in ids.items() if id is not None and end != "unk"}
    frame = {f"{end}_token": tokens[id] for end, id in ids.items() if id is not None}
    template = file.settings.text("tokenizer.chat_template", None)
    return Origin(settings, frame | ({"chat_template": template} if template else {}), {})


def from_folder(path: Path) -> Origin:
    """Everything of ``config.json`` but the size of the vocabulary and the weights' dtype, which `save` knows."""
    folder = HfFolder(path)
    rows = folder.config().vocab_size
    settings = {k: v for k, v in folder.settings.items() if k not in ("vocab_size", "dtype", "torch_dtype")}
    check_ids(settings, rows, str(path / "config.json"))
    generation = there(folder, "generation_config.json")
    check_ids(generation, rows, str(path / "generation_config.json"))
    return Origin(settings, tokenizer_settings(folder, rows), generation)


def there(folder: HfFolder, name: str) -> dict[str, Any]:
    """The content of a file that need not exist."""
    return folder.json(name) if is_there(folder.path / name) else {}


def tokenizer_settings(folder: HfFolder, rows: int) -> dict[str, Any]:
    """Special tokens by name, added tokens and the chat template."""
    label = str(folder.path / "tokenizer_config.json")
    frame = there(folder, "tokenizer_config.json")
    older = there(folder, "special_tokens_map.json")
    found = {name: value for end in NAMED if (value := frame.get(name := f"{end}_token") or older.get(name))}
    for name, value in found.items():
        if not isinstance(value.get("content") if isinstance(value, dict) else value, str):
            raise InputError(f"{label} has {name} {shown(value)}, but a token is a text")
    if added := Settings(frame, label).inner("added_tokens_decoder"):
        found["added_tokens_decoder"] = dict(added.values)
        check_ids(found, rows, label)
    file = folder.path / "chat_template.jinja"
    chat = read_text(file) if is_there(file) else frame.get("chat_template")
    if not isinstance(chat, str | list | None):
        raise InputError(f"{label} has the chat_template {shown(chat)}, but it must be a text or a list of them")
    return found | ({"chat_template": chat} if chat else {})

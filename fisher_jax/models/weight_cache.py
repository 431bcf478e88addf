"""Dequantised weights in the user's cache folder, so that a second start reads instead of computing."""

import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.optional_packages import optional

__all__ = ["Entry", "folder", "read", "write"]

# Part of every file name: raise it when the parameters' layout or the tokenizer's construction changes.
VERSION = 2


class Entry(NamedTuple):
    """One cached model: flat parameters by path, the configuration, the tokenizer as ``tokenizer.json``."""

    params: dict[str, np.ndarray]
    config: DecoderConfig
    tokenizer: str


def folder() -> Path:
    """``$FISHER_JAX_CACHE``, else ``$XDG_CACHE_HOME/fisher_jax``, else ``~/.cache/fisher_jax``."""
    if chosen := os.environ.get("FISHER_JAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fisher_jax"


def location(fingerprint: str, dtype: str) -> Path:
    return folder() / f"{fingerprint}-{dtype}-v{VERSION}.safetensors"


def read(fingerprint: str, dtype: str) -> Entry | None:
    """What `write` stored under this fingerprint; ``None`` where nothing is or its checksums are wrong."""
    file = location(fingerprint, dtype)
    safetensors = optional("safetensors", "the cache of weights")
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            notes = opened.metadata()
            sums = json.loads(notes["checksums"])
            params = {path: opened.get_tensor(path) for path in sums}
            entry = Entry(params, DecoderConfig.from_json(notes["config"]), notes["tokenizer"])
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    intact = all(checksum(params[path]) == sums[path] for path in sums)
    return entry if intact and checksum(entry.tokenizer) == int(notes["tokenizer_checksum"]) else None


def write(fingerprint: str, dtype: str, entry: Entry) -> None:
    """Store an entry in one step: a reader sees all or nothing. An unwritable folder is no error."""
    from safetensors.numpy import save_file

    notes = {
        "checksums": json.dumps({path: checksum(leaf) for path, leaf in entry.params.items()}),
        "config": entry.config.to_json(),
        "tokenizer": entry.tokenizer,
        "tokenizer_checksum": str(checksum(entry.tokenizer)),
    }
    file = location(fingerprint, dtype)
    safetensors = optional("safetensors", "the cache of weights")
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".part")
        os.close(handle)
        save_file(entry.params, temporary, metadata=notes)
        os.replace(temporary, file)
    except (OSError, safetensors.SafetensorError):
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def checksum(content: np.ndarray | str) -> int:
    if isinstance(content, str):
        return zlib.crc32(content.encode())
    return zlib.crc32(np.ascontiguousarray(content).view(np.uint8).data)

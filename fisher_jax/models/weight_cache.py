"""Dequantised weights in the user's cache folder, so that a second start reads instead of computing."""

import contextlib
import json
import math
import os
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.safetensors_file import mapped, read_header, write_safetensors
from fisher_jax.models.weight_rows import aligned, blocks

__all__ = ["Entry", "Kept", "empty", "folder", "kept", "limit", "read", "write"]

# Part of every file name: raise it when the parameters' layout or the tokenizer's construction changes.
VERSION = 3
LIMIT_GIB = 16.0
TOKENIZER = "tokenizer.json"


class Entry(NamedTuple):
    """One cached model: flat parameters by path, the configuration, the tokenizer as ``tokenizer.json``."""

    params: dict[str, np.ndarray]
    config: DecoderConfig
    tokenizer: str


class Kept(NamedTuple):
    """A file of the cache: the model file it was made from, if that is known, its bytes and when it was last used."""

    file: Path
    source: str
    dtype: str
    size: int
    used: float


def folder() -> Path:
    """``$FISHER_JAX_CACHE``, else ``$XDG_CACHE_HOME/fisher_jax``, else ``~/.cache/fisher_jax``."""
    if chosen := os.environ.get("FISHER_JAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fisher_jax"


def limit() -> int:
    """Bytes that the folder may hold: ``$FISHER_JAX_CACHE_GIB`` GiB, 16 where it is not set; 0 keeps nothing."""
    said = os.environ.get("FISHER_JAX_CACHE_GIB") or LIMIT_GIB
    try:
        number = float(said)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError(f"FISHER_JAX_CACHE_GIB is {shown(said)}, but must be a number of GiB from 0 on")
    return int(number * 2**30)


def kept() -> list[Kept]:
    """What was stored, of this and earlier versions, and what a process that died left; the last one used last."""
    found = []
    for file in [*folder().glob("*-v[0-9]*.safetensors"), *folder().glob("*-v[0-9]*.part")]:
        with contextlib.suppress(OSError):  # gone by now
            about = file.stat()
            found.append(Kept(file, source_of(file), file.name.split("-")[1], about.st_size, about.st_mtime))
    return sorted((one for one in found if one.file.is_file()), key=lambda one: (one.used, one.file.name))


def source_of(file: Path) -> str:
    try:
        return read_header(file)[1].get("source", "of an earlier version")
    except InputError:
        return "incomplete"


def empty() -> None:
    """Removes what was stored, and nothing else of the folder."""
    for one in kept():
        one.file.unlink(missing_ok=True)


def location(fingerprint: str, dtype: str) -> Path:
    return folder() / f"{fingerprint}-{dtype}-v{VERSION}.safetensors"


def read(fingerprint: str, dtype: str) -> Entry | None:
    """What `write` stored under this fingerprint; ``None`` where nothing is or its checksums are wrong."""
    file = location(fingerprint, dtype)
    try:
        tensors, notes = read_header(file)
        sums = {path: int(sum) for path, sum in json.loads(notes["checksums"]).items()}
        stored = {path: mapped(file, tensors[path]) for path in sums}
        copies = {path: checked_copy(values, sums[path]) for path, values in stored.items()}
        config, text = DecoderConfig.from_json(notes["config"]), copies.pop(TOKENIZER).tobytes().decode()
        os.utime(file)
    except (OSError, InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Entry(copies, config, text)


def checked_copy(stored: np.ndarray, wanted: int) -> np.ndarray:
    """A copy in memory, a block at a time; a ``ValueError`` where its checksum is another one."""
    copy, found = aligned(stored.shape, stored.dtype), 0
    for block in blocks(stored.shape):
        copy[block] = stored[block]
        found = zlib.crc32(copy[block].view(np.uint8).data, found)
    if found != wanted:
        raise ValueError("the file is damaged")
    return copy


def write(fingerprint: str, dtype: str, entry: Entry, source: str) -> None:
    """Store an entry in one step: a reader sees all or nothing. An unwritable folder is no error.

    What was not used for the longest time goes, so that the folder stays within its `limit`; what alone is larger is
    not stored.
    """
    file, most = location(fingerprint, dtype), limit()
    tensors = entry.params | {TOKENIZER: np.frombuffer(entry.tokenizer.encode(), np.uint8)}
    if (size := sum(leaf.nbytes for leaf in tensors.values())) > most:
        return
    notes = {
        "checksums": json.dumps({path: checksum(leaf) for path, leaf in tensors.items()}),
        "config": entry.config.to_json(),
        "source": source,
    }
    temporary = None
    try:
        make_room(most - size)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".part")
        os.close(handle)
        write_safetensors(Path(temporary), tensors, notes)
        os.replace(temporary, file)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def make_room(most: int) -> None:
    """Removes what was not used for the longest time, until what is left has at most so many bytes."""
    there = kept()
    total = sum(one.size for one in there)
    for one in there:
        if total <= most:
            break
        one.file.unlink(missing_ok=True)
        total -= one.size


def checksum(content: np.ndarray) -> int:
    return zlib.crc32(content.view(np.uint8).data)

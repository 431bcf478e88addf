"""The header of a safetensors file, checked before the file is opened for reading."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax._support.printable import one_line, printable
from fisher_jax.models.json_files import MOST_BYTES, parse_json

__all__ = ["FLOATS", "StoredTensor", "mapped", "read_header", "write_safetensors"]

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F64": 64,
    "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
KINDS = {
    kind: np.dtype(dtype)
    for kind, dtype in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "U8": "u1",
    }.items()
}  # fmt: skip


class StoredTensor(NamedTuple):
    """What a header says of a tensor: its type, its sizes, and the byte of the file where it begins."""

    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


def mapped(file: Path, tensor: StoredTensor) -> np.ndarray:
    """A tensor of floats or bytes as it lies in the file, mapped into memory."""
    dtype = KINDS[tensor.kind]
    if not tensor.entries:  # nothing cannot be mapped
        return np.empty(tensor.shape, dtype)
    try:
        raw = np.memmap(file, np.uint8, "r", tensor.start, (tensor.entries * dtype.itemsize,))
    except (OSError, ValueError) as error:
        raise damaged(file, one_line(error)) from error
    return raw.view(np.ndarray).view(dtype).reshape(tensor.shape)


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
    """Writes tensors one after the other, without a copy of any of them."""
    kinds = {dtype: kind for kind, dtype in KINDS.items()}
    header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": kinds[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            opened.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Types, sizes and places by name; the notes.

    Raises:
        InputError: the header is larger than 4 MiB or than the file, not JSON, names a tensor twice, or its tensors
            do not fill the file from end to end.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            first = opened.read(8)
            if len(first) < 8:
                raise damaged(file, f"it has {size} bytes, and the header's length alone takes 8")
            (length,) = struct.unpack("<Q", first)
            if length > size - 8:
                raise damaged(file, f"its header would take {length:,} bytes, and the file has {size:,}")
            if length > MOST_BYTES:
                raise damaged(file, f"its header would take {length:,} bytes, and {MOST_BYTES:,} are possible")
            text = opened.read(length)
    except OSError as error:
        raise InputError(f"{printable(file)} cannot be read ({error.strerror}); check the file") from error
    header = parse_json(text, f"the header of {printable(file)}")
    if not isinstance(header, dict):
        raise damaged(file, "its header is not an object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise damaged(file, "its __metadata__ is not a mapping of texts")
    places = {name: place(file, name, entry) for name, entry in header.items()}
    check_filled(file, places, size - 8 - length)
    tensors = {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + places[name][0])
        for name, entry in header.items()
    }
    return tensors, notes


def place(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end; an ``InputError`` where that does not fit its type and sizes."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in BITS:
        raise damaged(file, f"{shown(name)} has the type {shown(kind)}")
    if not whole(shape) or not whole(offsets) or shape is None or offsets is None or len(offsets) != 2:
        raise damaged(file, f"{shown(name)} has the shape {shown(shape)} and the offsets {shown(offsets)}")
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * BITS[kind]:
        raise damaged(file, f"{shown(name)} has {end - start} bytes for the shape {shown(shape)} of {kind}")
    return start, end


def whole(found: Any) -> bool:
    return isinstance(found, list) and len(found) <= 32 and all(type(x) is int and 0 <= x < 2**63 for x in found)


def check_filled(file: Path, places: dict[str, tuple[int, int]], size: int) -> None:
    """Tensors follow each other without gap and overlap, up to the end of the file."""
    due = 0
    for name, (start, end) in sorted(places.items(), key=lambda item: item[1]):
        if start != due:
            raise damaged(file, f"{shown(name)} begins at byte {start:,} of the weights where {due:,} was due")
        due = end
    if due != size:
        raise damaged(file, f"its tensors take {due:,} bytes, and {size:,} are there")


def damaged(file: Path, why: str) -> InputError:
    return InputError(f"{printable(file)} is cut off or damaged ({why}); fetch the file again")

"""The header of a GGUF file, read within the bytes that are there: metadata, and where each tensor lies."""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax._support.printable import printable

__all__ = ["GgufHeader", "GgufTensor", "read_header"]

# Python keeps a list of short texts in seven times their bytes; published headers have up to 20 MB.
MOST_BYTES, MOST_COUNT = 32 * 2**20, 2**16
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
FLOAT32, BOOLEAN, STRING, ARRAY = 6, 7, 8, 9
LENGTH = struct.Struct("<Q")


class GgufTensor(NamedTuple):
    """Where a tensor lies: sizes as NumPy has them (the fastest last), ggml's type, bytes of the file."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


class GgufHeader(NamedTuple):
    """Metadata by key, tensors by name.

    Values are Python's own: floats of 32 bits as their shortest decimal (1e-05), lists for arrays of texts, NumPy
    arrays for arrays of numbers.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(path: Path, block_sizes: dict[int, tuple[int, int]]) -> GgufHeader:
    """The header, checked against the file's size before anything is allocated.

    Tensors must follow each other in the order of their offsets without a gap, as llama.cpp asks too, so that none
    overlaps another one.

    Args:
        path: the file.
        block_sizes: for each type that ggml knows the entries and bytes of one block.

    Raises:
        InputError: the file is not GGUF, cut off, or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                raise InputError(f"{printable(path)} is not a GGUF file: it begins with {magic!r} instead of b'GGUF'")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{printable(path)} cannot be read ({error.strerror})") from error
    try:
        with content:
            return header_of(Cursor(content), block_sizes)
    except DamagedError as error:
        raise InputError(f"{printable(path)} is cut off or damaged ({error}); fetch the file again") from error


class DamagedError(ValueError):
    """What does not fit in a header."""


class Cursor:
    """Reads forwards, never beyond the end."""

    def __init__(self, content: mmap.mmap):
        self.content, self.spot, self.total = content, 4, len(content)

    def bytes(self, number: int, what: str) -> bytes:
        start, end = self.spot, self.spot + number
        if end > min(self.total, MOST_BYTES):
            limit = "the file" if end > self.total else f"the {MOST_BYTES:,} bytes that a header may have"
            raise DamagedError(f"{what} at byte {start:,} would take {number:,} bytes and end beyond {limit}")
        self.spot = end
        return self.content[start:end]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        raw = self.bytes(self.number("<Q", f"the length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedError(f"{what} at byte {self.spot - len(raw):,} is not UTF-8: {error.reason}") from error

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            return self.array(what)
        return scalar(kind, self.bytes(width_of(kind, what), what), what)

    def array(self, what: str) -> Any:
        kind, count = self.number("<I", f"the type of {what}"), self.number("<Q", f"the count of {what}")
        if kind == STRING:
            if count * 8 > self.total - self.spot:
                raise DamagedError(f"{what} would have {count:,} texts, more than the rest of the file can hold")
            return self.texts(count, what)
        width = width_of(kind, what)
        raw = self.bytes(width * count, what)
        if kind == BOOLEAN and raw.strip(b"\0\1"):
            raise DamagedError(f"{what} has values that are neither true nor false")
        return np.frombuffer(raw, SCALARS[kind].replace("<?", "?").replace("<B", "u1").replace("<b", "i1"))

    def texts(self, count: int, what: str) -> list[str]:
        """`text` so many times; in one loop, since a vocabulary has hundreds of thousands."""
        found, content, end = [], self.content, min(self.total, MOST_BYTES)
        for _ in range(count):
            start = self.spot + 8
            length = LENGTH.unpack_from(content, self.spot)[0] if start <= end else end
            if start + length > end:
                self.bytes(8 + length, f"a text of {what}")  # says what is wrong
            self.spot = start + length
            try:
                found.append(content[start : self.spot].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DamagedError(f"text {len(found):,} of {what} is not UTF-8: {error.reason}") from error
        return found


def width_of(kind: int, what: str) -> int:
    if kind not in SCALARS:
        raise DamagedError(f"{what} has a type {kind} that no value has")
    return struct.calcsize(SCALARS[kind])


def scalar(kind: int, raw: bytes, what: str) -> Any:
    if kind == BOOLEAN and raw not in (b"\0", b"\1"):
        raise DamagedError(f"{what} is neither true nor false but {raw[0]}")
    value = struct.unpack(SCALARS[kind], raw)[0]
    return float(str(np.float32(value))) if kind == FLOAT32 else value


def header_of(cursor: Cursor, block_sizes: dict[int, tuple[int, int]]) -> GgufHeader:
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise DamagedError("it is written for machines with the other byte order, which is not supported")
        raise DamagedError(f"it says version {version}, and versions 2 and 3 are known")
    num_tensors, num_entries = (cursor.number("<Q", f"the count of {what}") for what in ("tensors", "entries"))
    if max(num_tensors, num_entries) > MOST_COUNT:
        raise DamagedError(
            f"it claims {num_tensors:,} tensors and {num_entries:,} entries; {MOST_COUNT:,} are possible"
        )
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.text("a key")
        if key in metadata:
            raise DamagedError(f"the entry {shown(key)} is there twice")
        metadata[key] = cursor.value(cursor.number("<I", f"the type of {shown(key)}"), shown(key))
    found = [tensor_of(cursor, block_sizes) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise DamagedError(f"general.alignment is {shown(alignment)} but must be a power of two")
    return GgufHeader(metadata, placed(found, cursor, alignment))


def tensor_of(cursor: Cursor, block_sizes: dict[int, tuple[int, int]]) -> tuple[str, GgufTensor]:
    """Name, sizes, type, bytes, and the offset as the file gives it."""
    name = cursor.text("a tensor's name")
    rank = cursor.number("<I", f"the rank of {shown(name)}")
    if not 1 <= rank <= MOST_DIMENSIONS:
        raise DamagedError(f"{shown(name)} would have {rank:,} dimensions; 1 to {MOST_DIMENSIONS} are possible")
    shape = tuple(cursor.number("<Q", f"a dimension of {shown(name)}") for _ in range(rank))[::-1]
    kind = cursor.number("<I", f"the type of {shown(name)}")
    if kind not in block_sizes:
        raise DamagedError(f"{shown(name)} has a type {kind} that ggml does not have")
    entries, size = block_sizes[kind]
    if math.prod(shape) < 1 or shape[-1] % entries:
        raise DamagedError(f"{shown(name)} has the sizes {list(shape)}, which rows of {entries} entries do not fill")
    start = cursor.number("<Q", f"the offset of {shown(name)}")
    return name, GgufTensor(shape, kind, start, math.prod(shape) // entries * size)


def placed(found: list[tuple[str, GgufTensor]], cursor: Cursor, alignment: int) -> dict[str, GgufTensor]:
    """The tensors by name, with their place in the file."""
    begin, due, tensors = padded(cursor.spot, alignment), 0, {}
    for name, tensor in found:
        if name in tensors:
            raise DamagedError(f"the tensor {shown(name)} is there twice")
        if tensor.start != due:
            raise DamagedError(f"{shown(name)} begins at offset {tensor.start:,} where {due:,} was due")
        if begin + due + tensor.size > cursor.total:
            raise DamagedError(
                f"{shown(name)} would end at byte {begin + due + tensor.size:,}, and the file has {cursor.total:,}"
            )
        tensors[name] = tensor._replace(start=begin + due)
        due = padded(due + tensor.size, alignment)
    return tensors


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment

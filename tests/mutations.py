"""Seeded mutations of files: JSON at random paths, binary headers field by field, bytes anywhere.

A mutation is *malformed* if no reader may accept it with another result: a value of another type or outside its
domain, a key given twice, a length that does not fit the file. Deleting a setting, `null`, or another number that is
as good as the first (`rope_theta` 20000 for 10000, a flipped bit in a float or in the text of a token) makes another
file, not a malformed one: it must not crash, but results may differ. What is redundant in a file (weights, shapes,
names) must come out equal in any case.
"""

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Mutation", "byte_mutations", "gguf_mutations", "json_mutations", "safetensors_mutations"]


class Mutation(NamedTuple):
    """One mutated file: how it was made, whether it is malformed (see the module), its content."""

    how: str
    malformed: bool
    content: bytes


class Raw(NamedTuple):
    """Text that stands in the JSON as it is, where no Python value gives it."""

    text: str


DEEP = 100_000
WRONG: tuple[Any, ...] = (
    "x", "", "12", "true", "\x1b[31m[/x]\n", "y" * 5_000, [], [1], {}, {"a": 1}, [[[]]], -1, -0.5,
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e400"), 1e30, -(2**63), 2**70, Raw("1" * 5_000),
    Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "0" + "}" * DEEP),
)  # fmt: skip
GOOD_TYPES = {bool: (bool,), int: (int,), float: (int, float), str: (str,), list: (list,), dict: (dict,)}


def json_mutations(content: Any, seed: int) -> Iterator[Mutation]:
    """Without end: one place of the content replaced, deleted, doubled or nested, or the text itself damaged."""
    rng = np.random.default_rng(seed)
    text = json.dumps(content)
    places = list(paths(content))
    while True:
        path = places[rng.integers(len(places))]
        old = at(content, path)
        match rng.integers(10):
            case 0:
                yield Mutation(f"{path} deleted", False, written(replaced(content, path, DELETED)))
            case 1:
                yield Mutation(f"{path} null", False, written(replaced(content, path, None)))
            case 2 if isinstance(old, int | float) and not isinstance(old, bool):
                yield Mutation(f"{path} 0", False, written(replaced(content, path, 0)))
            case 3 if isinstance(old, int) and not isinstance(old, bool):
                huge = (10**9, 2**31, 2**63, 2**64 + 1)[rng.integers(4)]
                yield Mutation(f"{path} {huge}", True, written(replaced(content, path, huge)))
            case 4 if path and isinstance(path[-1], str):
                yield Mutation(f"{path} twice", True, written(doubled(content, path)))
            case 5:
                how, damaged = damaged_text(text, rng)
                yield Mutation(how, True, damaged)
            case _:
                value = WRONG[rng.integers(len(WRONG))]
                if not same_domain(value, old):
                    yield Mutation(f"{path} {shown(value)}", True, written(replaced(content, path, value)))


def damaged_text(text: str, rng: np.random.Generator) -> tuple[str, bytes]:
    raw = text.encode()
    cut = int(rng.integers(1, max(len(raw) - 1, 2)))
    kinds: tuple[tuple[str, bytes], ...] = (
        (f"cut at {cut}", raw[:cut]),
        ("empty", b""),
        ("in a list", b"[" + raw + b"]"),
        ("null", b"null"),
        ("a number", b"7"),
        ("a string", b'"x"'),
        (f"byte 255 at {cut}", raw[:cut] + b"\xff" + raw[cut:]),
        ("UTF-16", text.encode("utf-16")),
        (f"zero byte at {cut}", raw[:cut] + b"\0" + raw[cut:]),
        ("something after it", raw + b" {}"),
    )
    return kinds[rng.integers(len(kinds))]


DELETED = object()


def paths(content: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """The place of every value, the whole excluded; of long lists and mappings the first and last few."""
    items = list(content.items() if isinstance(content, dict) else enumerate(content))
    for key, value in items if len(items) <= 24 else items[:8] + items[-8:]:
        yield (*prefix, key)
        if isinstance(value, dict | list) and value:
            yield from paths(value, (*prefix, key))


def at(content: Any, path: tuple) -> Any:
    for key in path:
        content = content[key]
    return content


def replaced(content: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    inner = replaced(copy[path[0]], path[1:], value)
    if inner is DELETED:
        del copy[path[0]]
    else:
        copy[path[0]] = inner
    return copy


def doubled(content: Any, path: tuple) -> Any:
    """The key of the path a second time beside itself, with another value."""
    parent = at(content, path[:-1])
    body = json.dumps(parent)[1:-1]
    return replaced(content, path[:-1], Raw("{" + body + f", {json.dumps(path[-1])}: 3" + "}"))


def written(content: Any) -> bytes:
    raw: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raw.append(value.text)
            return f"\x00raw{len(raw) - 1}\x00"
        if isinstance(value, dict):
            return {key: marked(inner) for key, inner in value.items()}
        return [marked(inner) for inner in value] if isinstance(value, list) else value

    text = json.dumps(marked(content))
    for i, piece in enumerate(raw):
        text = text.replace(f'"\\u0000raw{i}\\u0000"', piece)
    return text.encode()


def same_domain(value: Any, old: Any) -> bool:
    """Whether the value may be as good as the old one."""
    if isinstance(value, Raw) or old is None:
        return old is None
    if isinstance(old, list | dict):
        return type(value) is type(old)
    return isinstance(value, GOOD_TYPES[type(old)]) and not isinstance(value, bool) and isinstance(old, str)


def shown(value: Any) -> str:
    return repr(value)[:40]


def byte_mutations(content: bytes, seed: int, *, end: int | None = None) -> Iterator[Mutation]:
    """Without end: bits flipped, bytes set, cut out, put in, before ``end`` (the whole file by default); or the file
    cut off there."""
    rng = np.random.default_rng(seed)
    end = len(content) if end is None else end
    while True:
        spot, changed = int(rng.integers(end)), bytearray(content)
        match rng.integers(6):
            case 0 | 1 | 2:
                bit = int(rng.integers(8))
                changed[spot] ^= 1 << bit
                yield Mutation(f"bit {bit} of byte {spot}", False, bytes(changed))
            case 3:
                value = (0, 0xFF, 0x7F, 0x80)[rng.integers(4)]
                changed[spot : spot + 8] = bytes([value]) * 8
                yield Mutation(f"bytes {spot} to {spot + 7} {value}", False, bytes(changed))
            case 4:
                yield Mutation(f"cut at {spot}", True, content[:spot])
            case _:
                number = int(rng.integers(1, 9))
                yield Mutation(
                    f"{number} bytes put in at {spot}", False, content[:spot] + bytes(number) + content[spot:]
                )


class Field(NamedTuple):
    """A number in a binary header."""

    what: str
    start: int
    size: int


NUMBERS = (0, 1, 2, 3, 7, 8, 9, 99, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def gguf_fields(content: bytes) -> tuple[list[Field], int]:
    """Every count, length, type, dimension and offset of a GGUF file's header, and where the header ends."""
    fields: list[Field] = []
    spot = 4

    def number(what: str, size: int) -> int:
        nonlocal spot
        fields.append(Field(what, spot, size))
        spot += size
        return int.from_bytes(content[spot - size : spot], "little")

    def text(what: str) -> str:
        nonlocal spot
        length = number(f"length of {what}", 8)
        spot += length
        return content[spot - length : spot].decode()

    def value(what: str, kind: int) -> None:
        nonlocal spot
        if kind == STRING:
            text(what)
        elif kind == ARRAY:
            inner, count = number(f"element type of {what}", 4), number(f"count of {what}", 8)
            for i in range(count):
                if inner == STRING and 3 <= i < count - 3:
                    spot += 8 + int.from_bytes(content[spot : spot + 8], "little")
                elif inner == STRING:
                    text(f"{what} {i}")
                else:
                    spot += SIZES[inner]
        else:
            spot += SIZES[kind]

    number("version", 4)
    tensors, entries = number("count of tensors", 8), number("count of entries", 8)
    for _ in range(entries):
        key = text("key")
        value(key, number(f"type of {key}", 4))
    for _ in range(tensors):
        name = text("tensor name")
        for i in range(number(f"dimensions of {name}", 4)):
            number(f"dimension {i} of {name}", 8)
        number(f"type of {name}", 4)
        number(f"offset of {name}", 8)
    return fields, spot


def gguf_mutations(content: bytes, seed: int) -> Iterator[Mutation]:
    """Without end: one or two numbers of the header replaced; every fourth time bytes of the header changed."""
    rng = np.random.default_rng(seed)
    fields, end = gguf_fields(content)
    by_bytes = byte_mutations(content, seed, end=end)
    while True:
        if rng.integers(4) == 0:
            yield next(by_bytes)
            continue
        changed, how = bytearray(content), []
        for _ in range(rng.integers(1, 3)):
            what, start, size = fields[rng.integers(len(fields))]
            new = NUMBERS[rng.integers(len(NUMBERS))] % 2 ** (8 * size)
            changed[start : start + size] = new.to_bytes(size, "little")
            how.append(f"{what} {new}")
        yield Mutation(", ".join(how), False, bytes(changed))


def safetensors_mutations(content: bytes, seed: int) -> Iterator[Mutation]:
    """Without end: the header's length, its JSON, or bytes anywhere in it changed."""
    rng = np.random.default_rng(seed)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    by_bytes = byte_mutations(content, seed, end=8 + length)
    by_json = json_mutations(header, seed)
    while True:
        match rng.integers(4):
            case 0:
                new = NUMBERS[rng.integers(len(NUMBERS))]
                yield Mutation(f"header length {new}", True, struct.pack("<Q", new) + content[8:])
            case 1:
                yield next(by_bytes)
            case _:
                found = next(by_json)
                packed = struct.pack("<Q", len(found.content)) + found.content + data
                # A tensor or its metadata left out makes a file that is whole in itself.
                yield found._replace(how=f"header: {found.how}", content=packed)


Maker = Callable[[bytes, int], Iterator[Mutation]]


def of_json(content: bytes, seed: int) -> Iterator[Mutation]:
    """`json_mutations` of a file's bytes."""
    return json_mutations(json.loads(content), seed)

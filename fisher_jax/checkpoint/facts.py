"""The facts of a save: JSON with a SHA-256 of its own beside it, bounded, and checked before it is believed."""

import contextlib
import datetime
import hashlib
import json
import pathlib
import stat
import sys
from collections.abc import Iterator
from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax._support.machine import installed
from fisher_jax._support.printable import first_line

FORMAT = 2
SIZE, DEPTH = 8 * 2**20, 300  # bytes of the file, and levels of lists and dicts in it
_NAME, _DIGEST = "facts.json", "facts.sha256"
_ITEMS = "__items__"  # a dict whose keys are not all strings: [[key, value], ...]
_KEYS = {"format", "versions", "date", "command", "processes", "metadata", "states", "tree", "files"}


class DamagedError(Exception):
    """A save is not what was saved; the message says how, as the end of a sentence."""


def check(holds: bool, reason: str) -> None:
    if not holds:
        raise DamagedError(reason)


@contextlib.contextmanager
def damage(what: str) -> Iterator[None]:
    """What goes wrong inside is one sentence about the file or folder."""
    try:
        yield
    except DamagedError as error:
        raise InputError(f"{what} is damaged: {error}") from error


def common(processes: int) -> dict[str, Any]:
    """Facts of every save."""
    names = ("fisher-jax", "jax", "jaxlib", "orbax-checkpoint", "numpy")
    return {
        "format": FORMAT,
        "versions": {name: installed(name, "unknown") for name in names},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv)[:4096],
        "processes": processes,
    }


def write(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: more, or deeper nested, than `read` accepts.
    """
    try:
        data = json.dumps(facts, indent=1).encode()
        _check_depth(facts)
    except (RecursionError, DamagedError):
        raise ValueError(f"the state or its metadata is nested more than {DEPTH} levels deep") from None
    if len(data) > SIZE:
        raise ValueError(
            f"the state and its metadata take {len(data):,} bytes to describe, at most are {SIZE:,}; join small "
            "arrays to larger ones"
        )
    (folder / _NAME).write_bytes(data)
    (folder / _DIGEST).write_text(_digest_line(data), encoding="ascii")


def read(folder: pathlib.Path) -> dict[str, Any]:
    """
    Raises:
        DamagedError: missing, changed, of another format, or not of the form that `write` gives.
    """
    data = read_small(folder / _NAME, SIZE)
    check(_same(read_small(folder / _DIGEST, 1024), data), f"{_NAME} does not have the SHA-256 that {_DIGEST} states")
    try:
        facts = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{_NAME} is not JSON ({first_line(error, 100)})") from error
    check(isinstance(facts, dict), f"{_NAME} is not a JSON object")
    found = facts.get("format")
    check(type(found) is int and found == FORMAT, f"it has format {str(found)[:40]}, this version reads {FORMAT}")
    check(set(facts) == _KEYS, f"{_NAME} lacks facts, or has others")
    _check_depth(facts)
    for name, kind in (("metadata", dict), ("states", list), ("versions", dict), ("files", dict), ("date", str),
                       ("command", str), ("processes", int)):  # fmt: skip
        check(type(facts[name]) is kind, f"its {name} are not of the type {kind.__name__}")
    check(all(type(x) is str for x in facts["versions"].values()), "its versions are not texts")
    check(all(type(x) is dict for x in facts["states"]), "its states are not described")
    return facts


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it gives a name twice")
    return found


def read_small(file: pathlib.Path, limit: int) -> bytes:
    """A plain file of at most ``limit`` bytes; never what a link points to."""
    try:
        about = file.lstat()
        check(stat.S_ISREG(about.st_mode), f"{file.name} is not a plain file")
        check(about.st_size <= limit, f"{file.name} has {about.st_size:,} bytes, at most are {limit:,}")
        return file.read_bytes()
    except OSError as error:
        raise DamagedError(f"{file.name} cannot be read ({error.strerror})") from error


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_line(data: bytes) -> str:
    return f"{sha256(data)}  {_NAME}\n"  # as sha256sum --check reads it


def _same(digest: bytes, data: bytes) -> bool:
    return digest == _digest_line(data).encode()


def _check_depth(x: Any, depth: int = 0) -> None:
    check(depth <= DEPTH, f"it is nested more than {DEPTH} levels deep")
    for child in x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ():
        _check_depth(child, depth + 1)


def to_json(x: Any) -> Any:
    """JSON-ready facts as JSON that keeps keys that are not strings apart from those that are."""
    if isinstance(x, dict):
        if all(type(key) is str for key in x) and _ITEMS not in x:
            return {key: to_json(value) for key, value in x.items()}
        return {_ITEMS: [[to_json(key), to_json(value)] for key, value in x.items()]}
    return [to_json(value) for value in x] if isinstance(x, list | tuple) else x


def from_json(x: Any) -> Any:
    """
    Raises:
        DamagedError: not what `to_json` gives.
    """
    if isinstance(x, list):
        return [from_json(value) for value in x]
    if not isinstance(x, dict):
        return x
    if _ITEMS not in x:
        return {key: from_json(value) for key, value in x.items()}
    items = x[_ITEMS]
    check(
        len(x) == 1 and type(items) is list and all(type(item) is list and len(item) == 2 for item in items),
        "a dict in its metadata is not a list of keys and values",
    )
    found = {_key(key): from_json(value) for key, value in items}
    check(len(found) == len(items), "a dict in its metadata has a key twice")
    return found


def _key(key: Any) -> Any:
    check(not isinstance(key, dict), "a key of a dict is a dict")
    return tuple(_key(part) for part in key) if isinstance(key, list) else key

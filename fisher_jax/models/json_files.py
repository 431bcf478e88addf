"""JSON from files that anybody may have written: bounded in size, read strictly, refused in one sentence."""

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from fisher_jax._support.errors import InputError, shown
from fisher_jax._support.printable import one_line, printable

__all__ = ["MOST_BYTES", "is_there", "parse_json", "read_bytes", "read_json", "read_text"]

# Python needs up to 24 bytes for one of JSON; published settings and indices have at most some hundred kB.
MOST_BYTES = 4 * 2**20


def is_there(file: Path) -> bool:
    """Whether there is such a file.

    Raises:
        InputError: there is something else of that name.
    """
    if file.is_file():
        return True
    if os.path.lexists(file):
        raise InputError(f"{printable(file)} is not a file; fetch it again")
    return False


def read_json(file: Path, *, most: int = MOST_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: the file cannot be read, has more than ``most`` bytes, is not UTF-8 or not JSON, gives a key
            twice, or is nested deeper than Python reads. NaN and Infinity are not JSON.
    """
    return parse_json(read_bytes(file, most=most), printable(file))


def read_text(file: Path, *, most: int = MOST_BYTES) -> str:
    """A text of bounded size in UTF-8."""
    try:
        return read_bytes(file, most=most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{printable(file)} is not UTF-8: {error}; fetch the file again") from error


def read_bytes(file: Path, *, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file that has at most so many."""
    try:
        with file.open("rb") as opened:
            content = opened.read(most + 1)
    except OSError as error:
        raise InputError(f"{printable(file)} cannot be read ({error.strerror}); check the file") from error
    if len(content) > most:
        raise InputError(f"{printable(file)} has more than {most:,} bytes, too many for such a file; fetch it again")
    return content


def parse_json(content: bytes | str, label: str) -> Any:
    """What the text says; ``label`` names it in errors."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=once)
    except RecursionError as error:
        raise InputError(f"{label} is nested too deeply to be read; fetch the file again") from error
    except ValueError as error:
        raise InputError(f"{label} is not valid JSON ({one_line(error)}); fetch the file again") from error


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it gives {shown(twice)} twice")
    return found

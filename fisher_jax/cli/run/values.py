"""Values of options: numbers and names within bounds that are said; no heavy import, so that help is instant."""

import os
import re
import stat
from argparse import ArgumentTypeError
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from fisher_jax._support.printable import printable, shortened

MOST = 10**12  # more tokens or rows than any machine sees
LONGEST_ROW = 10_000_000  # tokens
LONGEST_RUN = 2**31 - 1  # steps, counted in 32 bits
MOST_PARTS = 1_000_000
_PART = re.compile(r"(\d{1,7})/(\d{1,7})", re.ASCII)
_WHOLE = re.compile(r"[+-]?(\d+(_\d+)*|\d{1,3}(,\d{3})+)", re.ASCII)
_REAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
# What float32 holds with room for squares.
_SMALL, _LARGE = 1e-15, 1e15
_LONGEST_NUMBER = 40
# Bytes, of most file systems; what lies in a folder needs some as well.
_LONGEST_NAME, _LONGEST_FOLDER, _LONGEST_PATH = 255, 200, 3800
_LONGEST_TASK = 120  # bytes: it becomes part of file names


class PartNumber(NamedTuple):
    """One part of a run, numbered from 1, and how many there are."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def count(minimum: int, maximum: int = MOST) -> Callable[[str], int]:
    """Whole numbers from ``minimum`` to ``maximum``, also written 80_000, 80,000 or 8e4."""

    def count(text: str) -> int:
        value = _whole(text)
        if not minimum <= value <= maximum:
            raise ArgumentTypeError(f"must be a whole number from {minimum:,} to {maximum:,}, not {_shown(text)}")
        return value

    return count


# Beyond 32 bits `jax.random.key` drops the upper ones, so that two seeds would be the same.
seed = count(0, 2**32 - 1)


def part(text: str) -> PartNumber:
    """3/16: the third of sixteen parts."""
    found = _PART.fullmatch(text)
    if found is None:
        raise ArgumentTypeError(f"must be a part and how many there are, such as 3/16, not {_shown(text)}")
    number, of = map(int, found.groups())
    if not 1 <= of <= MOST_PARTS:
        raise ArgumentTypeError(f"must be of 1 to {MOST_PARTS:,} parts, not {_shown(text)}")
    if not 1 <= number <= of:
        raise ArgumentTypeError(f"{_shown(text)} is none of the parts 1/{of} to {of}/{of}")
    return PartNumber(number, of)


def seconds(text: str) -> float:
    return _within(text, 0, 1e9, "a number of seconds from 0 to 1e9")


def positive(text: str) -> float:
    return _within(text, _SMALL, _LARGE, f"a number from {_SMALL:g} to {_LARGE:g}")


def not_negative(text: str) -> float:
    value = _real(text)
    return 0.0 if value == 0 else _within(text, _SMALL, _LARGE, f"0, or a number from {_SMALL:g} to {_LARGE:g}")


def finite(text: str) -> float:
    return _within(text, -_LARGE, _LARGE, f"a number from {-_LARGE:g} to {_LARGE:g}")


def fraction(instance: float) -> Callable[[str], float]:
    """Numbers between 0 and 1, such as ``instance``, neither closer than 1e-6."""

    def fraction(text: str) -> float:
        return _within(text, 1e-6, 1 - 1e-6, f"a number between 0 and 1, for example {instance:g},")

    return fraction


def task_name(text: str) -> str:
    if not is_task_name(text):
        raise ArgumentTypeError(
            f"{_shown(text)} is not a name: it begins with a letter or digit, goes on with these, spaces and any "
            f"of _ . + - ( ) [ ] #, and has at most {_LONGEST_TASK} bytes"
        )
    return text


def is_task_name(text: str) -> bool:
    """Whether a task can be called so: in a file name, in a table, and after the colon of FOLDER:TASK."""
    letters = text.replace("_", "a")
    return (
        text.isprintable()
        and text == text.strip()
        and letters[:1].isalnum()
        and all(c.isalnum() or c in " .+-()[]#" for c in letters)
        and len(text.encode()) <= _LONGEST_TASK
    )


def as_task_name(text: str) -> str:
    """The text where it is a task's name, else the same with underscores, and shorter."""
    if is_task_name(text):
        return text
    plain = "".join(c if c.isalnum() or c in " .+-()[]#" else "_" for c in text).strip()
    while len(plain.encode()) > _LONGEST_TASK - 1:
        plain = plain[:-1]
    return plain.strip() if is_task_name(plain.strip()) else f"_{plain.strip()}"


def place(text: str, longest: int = _LONGEST_NAME) -> str:
    """A path that the file system can hold."""
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"{_shown(text)} is not a file name") from None
    if not text.strip():
        raise ArgumentTypeError("is empty; give a name")
    if b"\0" in raw:
        raise ArgumentTypeError(f"{_shown(text)} holds a zero byte, so it names no file")
    if len(raw) > _LONGEST_PATH or any(len(part) > longest for part in raw.split(b"/")):
        raise ArgumentTypeError(
            f"{_shown(text)} is too long: a name has at most {longest} bytes, a path {_LONGEST_PATH}"
        )
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise ArgumentTypeError(f"{_shown(text)} begins with a user who has no home folder here")
    return text


def file_or_folder(text: str) -> str:
    """A model or a state; whether it is there and complete is seen when it is read."""
    path = os.path.expanduser(place(text))
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return text
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ArgumentTypeError(f"{_shown(text)} is neither a plain file nor a folder")
    return text


def file(text: str) -> Path:
    return Path(place(text))


def folder(text: str) -> Path:
    """A folder to read from or to write to, where temporary names are longer than its own."""
    if os.path.exists(place(text, _LONGEST_FOLDER)) and not os.path.isdir(text):
        raise ArgumentTypeError(f"{_shown(text)} is a file; name a folder")
    return Path(text)


def _whole(text: str) -> int:
    if len(text) <= _LONGEST_NUMBER:
        if _WHOLE.fullmatch(text):
            return int(text.replace("_", "").replace(",", ""))
        if _REAL.fullmatch(text) and (value := Decimal(text)) == value.to_integral_value() and abs(value) < 1e30:
            return int(value)
    raise ArgumentTypeError(f"must be a whole number, such as 1000, 1_000 or 1e3, not {_shown(text)}")


def _real(text: str) -> float:
    if len(text) > _LONGEST_NUMBER or not _REAL.fullmatch(text):
        raise ArgumentTypeError(f"must be a number, such as 0.01 or 1e-2, not {_shown(text)}")
    return float(text)


def _within(text: str, low: float, high: float, words: str) -> float:
    value = _real(text)
    if not low <= value <= high:
        raise ArgumentTypeError(f"must be {words} not {text}")
    return value


def _shown(text: str) -> str:
    return f"'{printable(shortened(text))}'"

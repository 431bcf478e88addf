"""Names and tokens as one line of printable characters: what others wrote never reaches a terminal or a page raw."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["few", "first_line", "one_line", "printable", "quoted", "readable", "shortened"]


def printable(text: str | Path) -> str:
    """One line: line breaks, escape sequences, marks of direction, undecodable bytes and the like become `\\x1b`."""
    return "".join(c if c.isprintable() else _escape(c) for c in str(text))


def readable(token: str) -> str:
    """A token on one line with its spaces visible: " Paris" is "␣Paris", a newline "\\n".

    What rows without a token are called, ``<no text 151700>``, stays as it is.
    """
    if _NO_TEXT.fullmatch(token):
        return token
    return printable(token.replace("\\", "\\\\").replace(" ", "␣")) or "∅"


def one_line(said: object, longest: int = 150) -> str:
    """What another library says, for a sentence of ours: on one line, and not too long for it."""
    return shortened(printable(" ".join(str(said).split())), longest)


def first_line(error: BaseException, longest: int = 200) -> str:
    """The beginning of what an error of another library says, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0][:longest]


def few(names: Sequence[str], most: int = 4) -> str:
    """The first few names in a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def quoted(text: str) -> str:
    """The text as a JSON string of printable characters, from which `json.loads` gives it back."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(text, ensure_ascii=False))


def shortened(text: str, longest: int = 120) -> str:
    """The beginning and the end of what is too long for a sentence."""
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]}…{text[-(longest // 3) :]}"


def _escape(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


_NO_TEXT = re.compile(r"<no text \d+>")
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}

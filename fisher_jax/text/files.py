"""Text files, read in pieces and no further than needed."""

import codecs
import io
import os
import stat
import sys
from collections.abc import Iterator
from typing import BinaryIO

from fisher_jax._support.errors import InputError

__all__ = ["MOST_BYTES", "check_text_file", "first_characters", "has_text", "paragraphs", "pieces"]

MOST_BYTES = 2**30  # of one command's text; tokens are kept in memory
_PIECE = 2**20
_BEGINNING = 2**16


def check_text_file(path: str) -> None:
    """What is wrong with a file can mostly be told from its beginning, before a model is loaded.

    Raises:
        InputError: no such file, not a plain one, empty, or a beginning that is not UTF-8 text.
    """
    with _opened(path) as stream:
        beginning = next(_raw(stream, path, _BEGINNING), b"")
        whole = len(beginning) < _BEGINNING
    text = "".join(_decoded(iter([beginning]), path, whole=whole))
    if whole and not has_text(text):
        raise InputError(f"{path} holds no text; give a file with prose in it.")


def has_text(text: str) -> bool:
    return any(character.isalnum() for character in text)


def pieces(source: str, name: str, limit: int = MOST_BYTES) -> Iterator[str]:
    """The text of a file, or of standard input (`-`), a few at a time; line ends are `\\n`.

    Raises:
        InputError: the file cannot be read, is not UTF-8, holds a zero byte, or more than ``limit`` bytes.
    """
    if source == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed; give a file to --text.")
        yield from _decoded(_raw(sys.stdin.buffer, name, limit=limit), name, whole=True)
        return
    with _opened(source) as stream:
        yield from _decoded(_raw(stream, name, limit=limit), name, whole=True)


def first_characters(text: Iterator[str], longest: int | None) -> str:
    """The beginning of a text, which is read no further."""
    found: list[str] = []
    size = 0
    for piece in text:
        found.append(piece)
        size += len(piece)
        if longest is not None and size >= longest:
            break
    return "".join(found)[:longest]


def paragraphs(text: Iterator[str], longest: int | None) -> Iterator[str]:
    """What stands between blank lines, each cut after ``longest`` characters."""
    kept: list[str] = []
    size, after_blank = 0, False
    for line in _lines(text, longest):
        if not line.strip(" \t"):
            after_blank = True
            if kept:
                yield "\n".join(kept)[:longest]
                kept, size = [], 0
            continue
        if after_blank and not kept:
            line = line.lstrip()
        if line and (longest is None or size <= longest):
            kept.append(line)
            size += len(line) + 1
    if kept:
        yield "\n".join(kept)[:longest]


def _lines(text: Iterator[str], longest: int | None) -> Iterator[str]:
    left = ""
    for piece in text:
        *whole, left = (left + piece).split("\n")
        yield from whole
        left = left[:longest]
    yield left


def _opened(path: str) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder; name the text files in it.")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is not a plain file; pipe such a text into standard input and give --text -.")
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"there is no text file {path}.") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _raw(
    stream: BinaryIO | io.BufferedIOBase, name: str, most: int = _PIECE, limit: int = MOST_BYTES
) -> Iterator[bytes]:
    size = 0
    try:
        while piece := stream.read(most):
            size += len(piece)
            if size > limit:
                raise InputError(f"{name} has more than {limit / 2**30:g} GiB; give a part of it.")
            yield piece
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}.") from None


def _decoded(raw: Iterator[bytes], name: str, *, whole: bool) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, told, held, first = 0, 0, "", True
    for piece in raw:
        text = held + _decode(decoder, piece, name, done, final=False)
        done += len(piece)
        if first:
            text, first = text.removeprefix("\ufeff"), False
        # A line end may be cut in two.
        text, held = (text[:-1], "\r") if text.endswith("\r") else (text, "")
        if "\x00" in text:
            place = told + text.index(chr(0))
            raise InputError(f"{name} holds a zero byte at {place}, so it is not plain text.")
        told += len(text)
        yield text.replace("\r\n", "\n")
    if whole:
        yield held + _decode(decoder, b"", name, done, final=True)


def _decode(decoder: codecs.IncrementalDecoder, piece: bytes, name: str, done: int, *, final: bool) -> str:
    waiting = decoder.getstate()[0]
    try:
        return decoder.decode(piece, final)
    except UnicodeDecodeError as error:
        place, byte = done - len(waiting) + error.start, (waiting + piece)[error.start]
        raise InputError(
            f"{name} is not UTF-8: byte {place} is 0x{byte:02x}; convert it to UTF-8 first, for example with iconv."
        ) from None

"""Text to token ids and back."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fisher_jax._support.errors import InputError
from fisher_jax.models.json_files import parse_json
from fisher_jax.models.optional_packages import optional
from fisher_jax.models.tokenizer_errors import refusing_panics, silence
from fisher_jax.models.tokenizer_file import checked_content, tried

__all__ = ["Tokenizer", "byte_alphabet"]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet of byte-level BPE: the printable character that stands for each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """A model's tokenizer around a ``tokenizers.Tokenizer``, which stays at hand as ``backend``.

    ``vocab_size`` is the largest token id plus one. It may be smaller than the head's number of rows, since
    some models pad their vocabulary; such ids have no text.

    Raises ``InputError`` where two tokens have one id, or where it fails on ordinary text.
    """

    def __init__(self, backend: Any):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise InputError("the tokenizer has no tokens")
        if len(set(vocabulary.values())) < len(vocabulary):
            raise InputError("the tokenizer has two tokens with one id; fetch its file again")
        self.vocab_size = max(vocabulary.values()) + 1
        self.added = frozenset(backend.get_added_tokens_decoder())
        # Byte-level BPE writes bytes in its own alphabet, SentencePiece writes "\u2581" for a space.
        self.bytes_of = byte_alphabet() if "ByteLevel" in repr(backend.decoder) else None

    @staticmethod
    def from_json(text: str, label: str = "the tokenizer") -> "Tokenizer":
        """From the text of a ``tokenizer.json``; an ``InputError`` where it is not one, or where it contradicts
        itself. ``label`` names it there."""
        tokenizers = optional("tokenizers", "a tokenizer")
        content = checked_content(parse_json(text, label), label)
        with refusing_panics(f"{label} cannot be read"), silence():
            return tried(Tokenizer(tokenizers.Tokenizer.from_str(content or text)), label)

    def to_json(self) -> str:
        """The text of a ``tokenizer.json`` that `from_json` reads."""
        return self.backend.to_str()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that the model's own tokenizer adds (a Llama begins with its
        beginning-of-text token; SmolLM2 and GPT-2 add nothing), or without them for ``special=False``.

        Special tokens written in the text itself, such as ``<|im_start|>``, are recognised.
        """
        with refusing_panics("the tokenizer fails on this text"):
            return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of token ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        with refusing_panics("the tokenizer fails on these tokens"):
            return self.backend.decode([self.known(id) for id in ids], skip_special_tokens=False)

    def token_text(self, id: int | np.integer) -> str:
        """One token for people to read: its real characters, ``" Paris"`` or ``"\\n"``, and bytes that form
        no character on their own as ``<0xE2>``. Ids without a token, such as the rows that pad a head, are
        ``<no text 151700>``."""
        if not 0 <= int(id) < 2**31:
            raise InputError(f"token id {id} cannot be; ids begin with 0")
        token = self.backend.id_to_token(int(id))
        if token is None:
            return f"<no text {int(id)}>"
        if int(id) in self.added:
            return token
        if self.bytes_of is None:
            return show_bytes(bytes([int(token[3:5], 16)])) if is_byte(token) else token.replace("\u2581", " ")
        if any(character not in self.bytes_of for character in token):
            return token
        return show_bytes(bytes(self.bytes_of[character] for character in token))

    def has_text(self, id: int) -> bool:
        """Whether a token has this id; rows that pad a head have none."""
        return 0 <= int(id) < 2**31 and self.backend.id_to_token(int(id)) is not None

    def known(self, id: int | np.integer) -> int:
        if not 0 <= int(id) < self.vocab_size:
            raise InputError(f"token id {id} has no text; the tokenizer has ids 0 to {self.vocab_size - 1}")
        return int(id)


def is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def show_bytes(raw: bytes) -> str:
    """UTF-8 with each byte that fits no character as ``<0xE2>``."""
    shown, start = [], 0
    while start < len(raw):
        for end in range(min(start + 4, len(raw)), start, -1):
            try:
                text = raw[start:end].decode("utf-8")
            except UnicodeDecodeError:
                continue
            shown.append(text)
            start = end
            break
        else:
            shown.append(f"<0x{raw[start]:02X}>")
            start += 1
    return "".join(shown)

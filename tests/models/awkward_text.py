"""A page of awkward text, and small vocabularies of which every cut between words shows in the ids."""

import collections
import itertools
import json
from pathlib import Path

from fisher_jax.models.tokenizer import byte_alphabet

STORED = json.loads((Path(__file__).parent / "awkward_text.json").read_text())
PAGE: list[str] = STORED["page"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_start|>x"]


def learned(symbols: list[list[str]], number: int) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding on these texts, which are cut nowhere: the most frequent pair first."""
    merges: list[tuple[str, str]] = []
    while len(merges) < number:
        pairs = collections.Counter(pair for text in symbols for pair in itertools.pairwise(text))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        symbols = [merged(text, best) for text in symbols]
    return merges


def merged(text: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for symbol in text:
        # Greedy from the left; a symbol that was just made is not taken again, since it is longer.
        if found and (found[-1], symbol) == pair:
            found[-1] = found[-1] + symbol
        else:
            found.append(symbol)
    return found


# A token that no merge makes: only where merges are ignored is the word that it is taken whole.
WHOLE = "\u0120PascalCase"


def byte_level(number: int = 1_100) -> tuple[list[str], list[str]]:
    """Tokens and merges over GPT-2's alphabet of bytes."""
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    texts = [[letters[byte] for byte in line.encode()] for line in PAGE]
    tokens = dict.fromkeys([*SPECIAL, *sorted(byte_alphabet())])
    merges = []
    for pair in learned(texts, number):
        # A token that another pair makes already is left out; so is what would make the one that no merge makes.
        if (token := "".join(pair)) not in tokens and token != WHOLE:
            tokens[token] = None
            merges.append(" ".join(pair))
    return [*tokens, WHOLE], merges


def sentencepiece(number: int = 700) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a vocabulary of pieces: special ones, bytes, merges, frequent characters."""
    texts = [list(line.replace(" ", "\u2581")) for line in PAGE]
    counts = collections.Counter(letter for text in texts for letter in text)
    letters = sorted(letter for letter in counts if counts[letter] > 1 and letter not in "\n\r\t")
    known = [[letter for letter in text if letter in letters] for text in texts]
    pieces = ["".join(pair) for pair in learned(known, number)]
    pieces = [piece for piece in dict.fromkeys(pieces) if not any(special in piece for special in SPECIAL)]
    special, byte = ["<unk>", *SPECIAL], [f"<0x{i:02X}>" for i in range(256)]
    tokens = [*special, *byte, *pieces, *letters]
    scores = [0.0] * (5 + 256) + [-float(i) for i in range(len(pieces) + len(letters))]
    types = [2, *[3] * len(SPECIAL), *[6] * 256, *[1] * (len(pieces) + len(letters))]
    return tokens, scores, types

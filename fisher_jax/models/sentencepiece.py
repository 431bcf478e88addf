"""SentencePiece's byte-pair encoding, which ranks pieces by score, as a list of merges."""

from collections.abc import Iterator, Mapping
from itertools import groupby, pairwise

from fisher_jax._support.errors import InputError, shown

__all__ = ["merges_by_score"]

# Published pieces have at most some dozens of characters; every place at which one can be cut is looked at.
LONGEST, LONGEST_RUN = 256, 64

Pair = tuple[str, str]


def merges_by_score(pieces: Mapping[str, float], label: str) -> list[Pair]:
    """Pairs of pieces that are a piece together, those with the best score first.

    SentencePiece merges, of all neighbours that are a piece together, those whose piece has the best score, and the
    first of the text among equal ones. A list of merges has an order of pieces, not of places: it is the same where
    pieces of one score never overlap.

    Raises:
        InputError: a piece is too long, or has a character that is not a piece; two pieces of one score can overlap.
    """
    for piece in pieces:
        if len(piece) > LONGEST:
            raise InputError(f"{label} has a token of {len(piece):,} characters; at most {LONGEST} are supported")
        if strange := [letter for letter in piece if letter not in pieces]:
            raise InputError(
                f"{label} has the token {shown(piece)}, but none for its character {shown(strange[0])}, so it "
                "could not be built; convert the model to GGUF again"
            )
    ranked = sorted(pieces, key=lambda piece: -pieces[piece])
    merges: list[Pair] = []
    for _, equal in groupby(ranked, lambda piece: pieces[piece]):
        cuts = {
            piece: [pair for pair in cuts_of(piece) if pair[0] in pieces and pair[1] in pieces] for piece in equal
        }
        check_equal(cuts, label)
        merges.extend(pair for pairs in cuts.values() for pair in pairs)
    return merges


def cuts_of(piece: str) -> Iterator[Pair]:
    return ((piece[:i], piece[i:]) for i in range(1, len(piece)))


def check_equal(cuts: Mapping[str, list[Pair]], label: str) -> None:
    """Raises InputError where pieces of one score compete for the same part of a text.

    Runs of one character do, as Llama's runs of spaces; there it is tried whether the order matters.
    """
    ends = {second: piece for piece, pairs in cuts.items() for _, second in pairs}
    runs: dict[str, list[Pair]] = {}
    for piece, pairs in cuts.items():
        if len(set(piece)) == 1:
            runs.setdefault(piece[0], []).extend(pairs)
            continue
        for first, _ in pairs:
            if (other := ends.get(first, piece)) != piece:
                raise InputError(
                    f"{label} gives {shown(piece)} and {shown(other)} one score, so which of them a text is cut into "
                    "is not defined; convert the model to GGUF again"
                )
    for letter, pairs in runs.items():
        ranks = {pair: rank for rank, pair in enumerate(pairs)}
        longest = max((len(first + second) for first, second in pairs), default=0)
        for length in range(2, 2 * longest + 2):
            run = [letter] * length
            if longest > LONGEST_RUN or merged(run, dict.fromkeys(ranks, 0)) != merged(run, ranks):
                raise InputError(
                    f"{label} gives runs of {shown(letter)} one score, so how {length} of them are cut is not "
                    "defined; convert the model to GGUF again"
                )


def merged(symbols: list[str], ranks: Mapping[Pair, int]) -> list[str]:
    """Merges the pair of neighbours of the lowest rank, the first one among equals, until there is none."""
    while found := [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        i = min(found)[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
    return symbols

"""Token ids inside settings: where they stand, whether the model has them, their numbers in a cut vocabulary."""

from collections.abc import Mapping
from typing import Any

from fisher_jax._support.errors import InputError, shown

__all__ = ["check_ids", "renumbered"]

# Settings of generation whose ids are not under a name that ends with _token_id.
LISTS = ("suppress_tokens", "begin_suppress_tokens")
PHRASES = ("bad_words_ids", "force_words_ids")
FORCED, BIAS, ADDED = "forced_decoder_ids", "sequence_bias", "added_tokens_decoder"


def renumbered(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The settings with ``new[id]`` for every token id.

    An id that is gone becomes ``None``, in a list it is left out; a phrase with such an id cannot occur any more and
    is left out whole.
    """
    return {name: entry(name, value, new) for name, value in settings.items()}


def entry(name: str, value: Any, new: Mapping[int, int]) -> Any:
    if value is None:
        return None
    if name.endswith("_token_id") or name in LISTS:
        return [new[id] for id in value if id in new] if isinstance(value, list) else new.get(value)
    if name in PHRASES:
        return [found for phrase in value if (found := phrase_of(phrase, new))]
    if name == FORCED:
        return [[place, None if id is None else new[id]] for place, id in value if id is None or id in new]
    if name == BIAS:
        return [[found, bias] for phrase, bias in value if (found := phrase_of(phrase, new))]
    if name == ADDED:
        return {str(new[int(id)]): token for id, token in value.items() if int(id) in new}
    return value


def phrase_of(phrase: list, new: Mapping[int, int]) -> list:
    """Its ids, or nothing where one is gone; of a choice of phrases those that are left."""
    if phrase and isinstance(phrase[0], list):
        return [found for one in phrase if (found := phrase_of(one, new))]
    return [new[id] for id in phrase] if all(id in new for id in phrase) else []


def check_ids(settings: Mapping[str, Any], rows: int, label: str) -> None:
    """Raises InputError where a setting for token ids holds something else, or ids that the head does not have.

    -1 is how some files say that there is none.
    """

    def is_id(found: Any) -> bool:
        return isinstance(found, int) and not isinstance(found, bool) and -1 <= found < rows

    def ids(found: Any) -> bool:
        return isinstance(found, list) and all(map(is_id, found))

    def phrases(found: Any) -> bool:
        return isinstance(found, list) and all(ids(x) or phrases(x) for x in found)

    def pairs(found: Any) -> bool:
        return isinstance(found, list) and all(isinstance(x, list) and len(x) == 2 for x in found)

    def fits(name: str, found: Any) -> bool:
        if found is None:
            return True
        if name.endswith("_token_id"):
            return is_id(found) or ids(found)
        if name in LISTS:
            return ids(found)
        if name in PHRASES:
            return phrases(found)
        if name == FORCED:
            return pairs(found) and all(id is None or is_id(id) for _, id in found)
        if name == BIAS:
            return pairs(found) and all(ids(phrase) for phrase, _ in found)
        if name == ADDED:
            return isinstance(found, dict) and all(
                id.isascii() and id.isdecimal() and len(id) < 10 and is_id(int(id)) for id in found
            )
        return True

    for name, found in settings.items():
        if not fits(name, found):
            raise InputError(
                f"{label} has {name} {shown(found)}, but token ids are whole numbers from 0 to {rows - 1}"
            )

"""The errors that a person can act on."""

from typing import Any

__all__ = ["ConflictError", "InputError", "RejectedBatchError", "shown"]


class InputError(ValueError):
    """A model, text, folder or setting that cannot be used; one sentence that names it and the way out.

    The command line prints the sentence and exits with code 2.
    """


class ConflictError(InputError):
    """Another run saved into the same folder meanwhile; replacing its save would drop what was never seen here."""


class RejectedBatchError(ValueError):
    """A batch was rejected inside a compiled step; the state was left as it was before that batch."""


def shown(found: Any, most: int = 120) -> str:
    """A value from a file for a sentence: as Python writes it, hence control characters escaped, and cut to ``most``
    characters.

    >>> shown("a\\x1b[31m")
    "'a\\\\x1b[31m'"
    >>> shown([1] * 1000, 12)
    '[1, 1, 1, 1…'
    """
    # A large value is not written out whole only to be cut.
    part = found[:most] if isinstance(found, str | bytes | list | tuple) else found
    try:
        text = "{…}" if isinstance(found, dict) and len(found) > most else repr(part)
    except RecursionError:
        text = "something nested deeply"
    return text if len(text) <= most else f"{text[: most - 1]}…"

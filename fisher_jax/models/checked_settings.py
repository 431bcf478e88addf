"""Settings of a model, each read with its type and its domain; what is outside is refused by its name."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fisher_jax._support.errors import InputError, shown

__all__ = ["MOST_EXPERTS", "MOST_HEAD", "MOST_INDEX", "MOST_LAYERS", "MOST_SIZE", "REQUIRED", "Settings"]

REQUIRED: Any = object()
# Bounds of what can be a decoder at all: far above every published one, far below what would fill a memory.
MOST_SIZE, MOST_HEAD, MOST_LAYERS, MOST_EXPERTS, MOST_INDEX = 2**24, 2**16, 2**14, 2**14, 2**31 - 1
MOST_FLOAT = sys.float_info.max


class Settings:
    """What a file says, by name; ``null`` counts as absent, and an absent one without a default is refused.

    >>> read = Settings({"width": 12, "eps": "1e-5"}, "the config.json of tiny")
    >>> read.integer("width", 1, 64), read.boolean("tied", True)
    (12, True)
    >>> read.number("eps")
    Traceback (most recent call last):
        ...
    fisher_jax._support.errors.InputError: the config.json of tiny has eps '1e-5', but it must be a finite number
    """

    def __init__(self, values: Any, label: str):
        if not isinstance(values, Mapping):
            raise InputError(f"{label} must be an object with named settings, found {shown(values)}")
        self.values, self.label = values, label

    def integer(self, key: str, low: int, high: int, default: Any = REQUIRED) -> Any:
        """A whole number from ``low`` to ``high``."""

        def fits(x: Any) -> bool:
            return isinstance(x, int) and not isinstance(x, bool) and low <= x <= high

        return self.checked(key, default, fits, f"a whole number from {low:,} to {high:,}")

    def size(self, key: str, default: Any = REQUIRED) -> Any:
        """A number of things of which there is at least one."""
        return self.integer(key, 1, MOST_SIZE, default)

    def number(
        self, key: str, default: Any = REQUIRED, *, low: float = -math.inf, high: float = math.inf
    ) -> float | Any:
        """A finite number from ``low`` to ``high``, as a float."""

        def fits(x: Any) -> bool:
            number = isinstance(x, int | float) and not isinstance(x, bool)
            return number and low <= x <= high and abs(x) <= MOST_FLOAT

        limits = "" if low == -math.inf else f" from {low:g} to {high:g}"
        found = self.checked(key, default, fits, f"a finite number{limits}")
        return found if found is default else float(found)

    def boolean(self, key: str, default: Any = REQUIRED) -> Any:
        """``true`` or ``false``."""
        return self.checked(key, default, lambda x: isinstance(x, bool), "true or false")

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        """A string."""
        return self.checked(key, default, lambda x: isinstance(x, str), "a text")

    def texts(self, key: str, default: Any = REQUIRED) -> Any:
        """A list of strings."""

        def fits(x: Any) -> bool:
            return isinstance(x, list) and all(isinstance(part, str) for part in x)

        return self.checked(key, default, fits, "a list of texts")

    def inner(self, key: str) -> "Settings | None":
        """Settings inside this one; ``None`` where there are none."""
        found = self.checked(key, None, lambda x: isinstance(x, Mapping), "an object with named settings")
        return None if not found else Settings(found, f"{key} in {self.label}")

    def must(self, key: str, *allowed: Any) -> None:
        """Refuse any value but the allowed ones, the first of which is meant where the setting is absent."""
        found = self.get(key, allowed[0])
        if not any(type(found) is type(value) and found == value for value in allowed):
            self.refuse(key, " or ".join(repr(value) for value in allowed), "only {} can be read")

    def checked(self, key: str, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        """The value, which fits, or the default where there is none."""
        found = self.get(key, default)
        if found is not default and not fits(found):
            self.refuse(key, wanted)
        return found

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        if (found := self.values.get(key)) is not None:
            return found
        if default is REQUIRED:
            raise InputError(f"{self.label} has no {key}")
        return default

    def refuse(self, key: str, wanted: str | Sequence[str], sentence: str = "but it must be {}") -> None:
        raise InputError(f"{self.label} has {key} {shown(self.values[key])}, {sentence.format(wanted)}")

"""Facts read back from a file: they are what their types say, or refused, so that later steps can rely on them."""

import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UnreadableError(ValueError):
    """Facts that are not what they should be; the message says which, as the end of a sentence."""


def check(holds: bool, reason: str) -> None:
    """Raises UnreadableError with the reason unless it holds."""
    if not holds:
        raise UnreadableError(reason)


def record(cls: type[T], saved: Any) -> T:
    """An instance of a dataclass from a dict of its fields.

    Types of fields: bool, int, float (finite), str, Any, lists, dicts with names as keys, named tuples, and `None`
    beside one of them.

    Raises:
        UnreadableError: no dict, missing or further fields, or a value of another type.
    """
    check(isinstance(saved, dict), f"it is {_shown(saved)} instead of named facts")
    hints = typing.get_type_hints(cls)
    missing, more = hints.keys() - saved.keys(), saved.keys() - hints.keys()
    check(not missing, f"it has no {', '.join(sorted(missing))}")
    check(not more, f"it has an unknown {', '.join(sorted(map(str, more)))}")
    return cls(**{name: value(hint, saved[name], name) for name, hint in hints.items()})


def value(kind: Any, found: Any, name: str) -> Any:
    """One value of this type.

    Raises:
        UnreadableError: it is another one.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    wrong = f"{name} is {_shown(found)}"
    if kind is Any:
        return found
    if origin in (typing.Union, types.UnionType):
        if found is None and type(None) in parts:
            return None
        return value(next(part for part in parts if part is not type(None)), found, name)
    if kind is float:
        check(type(found) in (int, float) and abs(found) < 1e300 and math.isfinite(found), wrong)
        return float(found)
    if kind in (int, str, bool):
        check(type(found) is kind and (kind is not int or abs(found) < 2**63), wrong)
        return found
    if origin is list:
        check(isinstance(found, list), wrong)
        return [value(parts[0], x, name) for x in found]
    if origin is dict:
        check(isinstance(found, dict) and all(isinstance(key, str) for key in found), wrong)
        return {key: value(parts[1], x, f"{name}[{key!r}]") for key, x in found.items()}
    hints = typing.get_type_hints(kind)
    check(isinstance(found, list | tuple) and len(found) == len(hints), wrong)
    return kind(*(value(hint, x, f"{name}.{part}") for (part, hint), x in zip(hints.items(), found, strict=True)))


def like(reference: Mapping[str, Any], found: Mapping[str, Any], required: Any) -> None:
    """Checks that named values are there and have the types of those in ``reference``.

    Raises:
        UnreadableError: a name is missing, or a value has another type.
    """
    missing = set(required) - found.keys()
    check(not missing, f"it has no {', '.join(sorted(missing))}")
    for name, value in found.items():
        check(name in reference, f"it has an unknown {name}")
        check(type(value) is type(reference[name]), f"{name} is {_shown(value)}")


def _shown(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 40 else f"{text[:40]}..."

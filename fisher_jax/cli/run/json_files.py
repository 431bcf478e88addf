"""JSON that a command keeps in its folder: whole or not at all, and told from what anything else has put there."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fisher_jax.cli.run.folder import read_plain, write_atomically
from fisher_jax.cli.run.records import UnreadableError

_SEAL = "digest"


def digest(facts: Any) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Floats keep all their digits."""
    write_atomically(path, json.dumps(facts) + "\n")


def read_facts(path: Path) -> dict[str, Any] | None:
    """Named facts; None where there is no file.

    Raises:
        UnreadableError: it holds something else.
    """
    try:
        facts = json.loads(read_plain(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableError(str(error)) from None
    if not isinstance(facts, dict):
        raise UnreadableError("it holds no named facts")
    return facts


def write_sealed(path: Path, facts: dict[str, Any]) -> None:
    """With a digest, by which `read_sealed` sees every change."""
    write_atomically(path, json.dumps(facts | {_SEAL: digest(facts)}) + "\n")


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None where there is no file.

    Raises:
        UnreadableError: it holds something else.
    """
    facts = read_facts(path)
    if facts is not None and facts.pop(_SEAL, None) != digest(facts):
        raise UnreadableError("it was changed")
    return facts

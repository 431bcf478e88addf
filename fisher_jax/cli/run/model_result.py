"""A model that an earlier call of the same command wrote: told again where nothing else was asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.earlier_run import refuse_difference
from fisher_jax.cli.run.json_files import read_facts, write_facts
from fisher_jax.cli.run.records import UnreadableError

_MADE_FROM = "made_from"


def write_result(path: Path, result: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """What a model was found to be, and the ``facts`` that decided it."""
    write_facts(path, result | {_MADE_FROM: facts})


def read_result(out: Path, name: str, facts: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """What the model in `out` was found to be when it was made, or None where it is to be made.

    Raises:
        InputError: it was made from something else.
    """
    if overwrite or not (out / "config.json").is_file():
        return None
    try:
        result = read_facts(out / name) or {}
        made_from = dict(result[_MADE_FROM])
    except (UnreadableError, ValueError, KeyError, TypeError):
        raise InputError(f"{out} holds a model; choose another --out, or --overwrite.") from None
    refuse_difference(out, made_from, facts)
    return result if any(out.glob("*.safetensors")) else None

"""A model that an earlier call of the same command wrote: told again where nothing else was asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.earlier_run import refuse_difference
from fisher_jax.cli.run.folder import read_plain

__all__ = ["MADE_FROM", "read_result"]

MADE_FROM = "made_from"  # what a result was made from, beside it in its file


def read_result(out: Path, name: str, facts: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """What the model in `out` was found to be when it was made, or None where it is to be made.

    Raises:
        InputError: it was made from something else.
    """
    if overwrite or not (out / "config.json").is_file():
        return None
    try:
        result = json.loads(read_plain(out / name))
        made_from = dict(result[MADE_FROM])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{out} holds a model; choose another --out, or --overwrite.") from None
    refuse_difference(out, made_from, facts)
    return result if any(out.glob("*.safetensors")) else None

"""What is refused where a folder holds an earlier run, the same for every command."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisher_jax._support.errors import InputError


def refuse_misuse(
    out: Path, *, there: bool, finished: bool, resume: bool, overwrite: bool, run: str = "run", progress: str = "",
    held: str = "",
) -> None:  # fmt: skip
    """What can be refused before anything is loaded: nothing to resume, or an unfinished run that would be lost.

    ``run`` names it ("run of the task 'news'"), ``progress`` says how far it came, ``held`` what else is there.
    """
    if resume and not there:
        name = run.removeprefix("run").replace(" of ", " for ")
        raise InputError(f"there is nothing to resume{name} in {out}{held}; start without --resume.")
    if there and not finished and not (resume or overwrite):
        raise InputError(
            f"{out} holds an unfinished {run}{progress}; add --resume to go on with it, --overwrite to drop it, or "
            "choose another --out."
        )


def refuse_difference(
    out: Path, saved: Mapping[str, Any], now: Mapping[str, Any], *, run: str = "run", instead: str = "another --out"
) -> None:
    """The first setting in which an earlier run differs from this one, as an error."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise InputError(
                f"the {run} in {out} had {name} {saved.get(name)}, and this one has {value}; give the same settings, "
                f"{instead}, or --overwrite to start again."
            )

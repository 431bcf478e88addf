"""What a command takes from the world around it; a test puts its own in its place."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _load(source: str | Path, **options: Any) -> Any:
    from fisher_jax.models import load

    return load(source, **options)


def _made(make: Callable[[], Any], *about: Any) -> Any:
    return make()


def _nothing() -> None:
    pass


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@dataclass(frozen=True)
class Tools:
    """How a command does what takes time or meets the machine.

    Attributes:
        load: `fisher_jax.models.load`.
        program: gives the compiled step that ``make()`` makes; what it depends on follows, so that runs can share it.
        picture: gives the bytes of a picture that ``make()`` draws.
        after_step: called after each step of a loop, before what it did is saved.
        free_bytes: how much a folder's disk still holds.
    """

    load: Callable[..., Any] = _load
    program: Callable[..., Any] = _made
    picture: Callable[[Callable[[], bytes]], bytes] = _made
    after_step: Callable[[], None] = _nothing
    free_bytes: Callable[[Path], int] = _free_bytes


TOOLS = Tools()

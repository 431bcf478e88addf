"""Names of files that are being written, from which the next run sees whether their writer is still there."""

import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from pathlib import Path

from fisher_jax._support.machine import is_alive

_PREFIX = ".fj-"
_NAME = re.compile(rf"{re.escape(_PREFIX)}(?P<host>[0-9a-f]+)-(?P<pid>[0-9]{{1,10}})-[0-9a-f]+")
_LONG_AGO = 24 * 3600.0  # seconds
_LEVELS = 3  # of folders that a command writes in its own


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def temporary_beside(path: Path) -> Path:
    """A new name in the same folder, short whatever the other one is: ``.fj-HOST-PROCESS-RANDOM``."""
    return path.parent / f"{_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def remove_left_over(folder: Path) -> None:
    """Removes what killed runs were writing in a folder and three levels inside; what a living one writes stays."""
    for place, folders, files in os.walk(folder):  # not through links
        for name in [name for name in (*folders, *files) if _is_left_over(Path(place, name))]:
            if name in folders and not os.path.islink(os.path.join(place, name)):
                shutil.rmtree(os.path.join(place, name), ignore_errors=True)
                folders.remove(name)
            else:
                Path(place, name).unlink(missing_ok=True)
        if len(Path(place).relative_to(folder).parts) == _LEVELS:
            folders.clear()


def _is_left_over(path: Path) -> bool:
    name = _NAME.fullmatch(path.name)
    if name is None:
        return False
    if name["host"] == _host() and os.name == "posix":
        return not is_alive(int(name["pid"]))
    try:
        return time.time() - path.lstat().st_mtime > _LONG_AGO
    except OSError:
        return False

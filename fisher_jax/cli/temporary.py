"""Names of files that are being written, from which the next run sees whether their writer is still there."""

import hashlib
import os
import platform
import secrets
import shutil
import time
from pathlib import Path

__all__ = ["remove_left_over", "temporary_beside"]

_PREFIX = ".fj-"
_LONG_AGO = 24 * 3600.0  # seconds


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def temporary_beside(path: Path) -> Path:
    """A new name in the same folder, short whatever the other one is: ``.fj-HOST-PROCESS-RANDOM``."""
    return path.parent / f"{_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def remove_left_over(folder: Path) -> None:
    """Removes what killed runs were writing in a folder and three levels inside; what a living one writes stays."""
    for levels in range(4):
        for path in folder.glob("*/" * levels + f"{_PREFIX}*"):
            if _is_left_over(path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _is_left_over(path: Path) -> bool:
    host, _, rest = path.name.removeprefix(_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if not pid.isdigit():
        return False
    if host == _host() and os.name == "posix":
        return not _is_alive(int(pid))
    try:
        return time.time() - path.stat().st_mtime > _LONG_AGO
    except OSError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True

"""What this machine says of its processes and packages."""

import os
from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed", "is_alive"]


def installed(package: str, otherwise: str) -> str:
    """The version of a package, or what is said instead where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


def is_alive(process: int) -> bool:
    """Whether a process of this host runs; true where that cannot be told."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True

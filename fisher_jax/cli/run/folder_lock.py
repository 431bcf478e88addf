"""One run at a time in a folder: a file that says who writes there, held with `flock` or by renewing it.

The file appears with its content and its `flock` in one step, and whoever holds it touches it every ten seconds. It
is free when nobody holds its `flock`; where the file system has none, when it was not touched for a minute.
Saved states do not depend on it: see `fj.checkpoint.save`.
"""

import errno
import json
import os
import platform
import secrets
import shlex
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from fisher_jax._support.errors import InputError
from fisher_jax._support.machine import is_alive
from fisher_jax.cli.run.temporary import temporary_beside

FILE = ".fisher-jax.lock"
RENEWED_EVERY = 10.0  # seconds
FREE_AFTER = 60.0
_TRIES, _PAUSE = 40, 0.05
_LONGEST = 65536  # bytes

Lock = Callable[[int], None]


class Found(NamedTuple):
    """A lock that somebody left or holds."""

    content: dict[str, Any]
    age: float  # seconds since it was renewed, by the clock of the file system
    locked: bool | None  # None where the file system cannot tell

    @property
    def free(self) -> bool:
        by_age = self.age >= FREE_AFTER
        return by_age if self.locked is None or self.content.get("flock") is False else not self.locked


def flock(file: int) -> None:
    """Locks an open file for this process; raises BlockingIOError where another one has it."""
    try:
        import fcntl
    except ImportError as error:
        raise OSError(errno.ENOSYS, "no flock") from error
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def hold(folder: Path, *, lock: Lock = flock, renewed_every: float = RENEWED_EVERY) -> Iterator[None]:
    """Holds the lock of a folder that exists.

    Args:
        lock: locks an open file; raises BlockingIOError where it is locked, another OSError where it cannot be.
        renewed_every: seconds between signs of life.

    Raises:
        InputError: somebody else holds it; the sentence says who, and since when.
    """
    file = _take(folder / FILE, lock)
    ended = threading.Event()
    threading.Thread(target=_renew, args=(file, ended, renewed_every), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(OSError):
            if os.stat(folder / FILE).st_ino == os.fstat(file).st_ino:  # else it was taken over
                os.unlink(folder / FILE)
        os.close(file)


def _renew(file: int, ended: threading.Event, every: float) -> None:
    while not ended.wait(every):
        with suppress(OSError):
            os.utime(file)


def _take(path: Path, lock: Lock) -> int:
    """The open file that is locked."""
    for _ in range(_TRIES):
        if not _is_plain(path):
            raise InputError(f"{path} is not a file that fisher-jax wrote; remove it, or choose another --out.")
        mine = temporary_beside(path)
        file = os.open(mine, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            has_flock = _locked(file, lock) is not None
            os.write(file, json.dumps(_content(has_flock)).encode())
            if _appears(mine, path):
                return file
            found = _look(path, lock, now=os.fstat(file).st_mtime)
        except BaseException:
            os.close(file)
            raise
        finally:
            mine.unlink(missing_ok=True)
        os.close(file)
        if found is not None and found.free:
            _remove(path, found)
        elif found is not None and not _is_over(found):
            raise InputError(_words(path.parent, found))
        else:  # it has just gone, or another run is removing it
            time.sleep(_PAUSE)
    raise InputError(f"{path} changes all the time; choose another --out.")


def _is_plain(path: Path) -> bool:
    """Whether a lock lies there, or nothing: no folder, link, pipe or device."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return True


def _appears(mine: Path, path: Path) -> bool:
    """Whether the file got its name, which nobody else had."""
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError:  # no links in this file system: not in one step where two start at the same moment
        if path.exists():
            return False
        os.rename(mine, path)
    return True


def _locked(file: int, lock: Lock) -> bool | None:
    """Whether it is locked by us (True) or by another process (False); None where it cannot be told."""
    try:
        lock(file)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _look(path: Path, lock: Lock, now: float) -> Found | None:
    """The lock that is there, or None."""
    try:
        file = os.open(path, os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        ours = _locked(file, lock)
        seen = os.fstat(file)
        content = _read(os.read(file, _LONGEST))
    finally:
        os.close(file)
    return Found(content, now - seen.st_mtime, None if ours is None else not ours)


def _read(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove(path: Path, found: Found) -> None:
    """Takes a free lock away, unless another run did and put its own there."""
    aside = temporary_beside(path)
    with suppress(OSError):
        os.rename(path, aside)
        with open(aside, "rb") as file:
            content = _read(file.read(_LONGEST))
        if content != found.content:
            with suppress(OSError):
                os.link(aside, path)
        os.unlink(aside)


def _is_over(found: Found) -> bool:
    """Whether its process has ended: another run is about to take it over."""
    pid = found.content.get("pid")
    if os.name != "posix" or found.content.get("host") != platform.node() or type(pid) is not int or pid <= 0:
        return False
    return not is_alive(pid) and found.content.get("flock") is not False


def _content(has_flock: bool) -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "flock": has_flock,
        "token": secrets.token_hex(8),
    }


def _words(folder: Path, found: Found) -> str:
    content = found.content
    who = f"process {content.get('pid', '?')} on {content.get('host', 'an unknown host')}"
    until = "wait for it to end"
    if content.get("flock") is False or found.locked is None:
        until += f" (without a sign of life it is taken for dead after {FREE_AFTER:.0f} s)"
    since = content.get("started", "an unknown time")
    return f"{folder} is in use: {who} has been writing there since {since}; {until}, or choose another --out."

"""Numbered saves of one folder: a save is written under a name of its own and committed by one rename.

``path/00000007`` is the seventh save. Its folder is complete before it has that name, and a name is given once:
renaming a folder onto one that is not empty fails, so that of two savers who want the same number one loses, whether
locks work or not. The largest number never falls: a save is removed only while a later one is there.
"""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator

from fisher_jax._support.errors import ConflictError, InputError
from fisher_jax._support.machine import is_alive

_INCOMING, _DROPPED = ".incoming-", ".dropped-"
_STALE = 3600.0  # seconds without a change, after which a save that nobody can be asked about counts as given up
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def revision(path: str | os.PathLike) -> int:
    """The number of the newest save in a folder: 1 for the first, one more for each; 0 where nothing was saved.

    Example:
        >>> import fisher_jax as fj, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     before = fj.checkpoint.revision(folder + "/state")
        ...     fj.checkpoint.save(folder + "/state", {"step": 3})
        ...     before, fj.checkpoint.revision(folder + "/state")
        1
        (0, 1)
    """
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max((int(name) for name in names if re.fullmatch(r"[0-9]{8}", name)), default=0)


def place_of(path: pathlib.Path, number: int) -> pathlib.Path:
    """The folder of one save.

    Raises:
        InputError: ``number`` is 0, nothing was saved.
    """
    if number == 0:
        what = "is not a checkpoint of fisher_jax (it holds no save)" if os.path.lexists(path) else "does not exist"
        raise InputError(f"nothing to restore: {path} {what}")
    return path / f"{number:08d}"


def check_newest(path: pathlib.Path, wanted: int | None) -> int:
    """The newest save.

    Raises:
        ConflictError: it is not the one that is wanted; ``None`` wants any.
    """
    found = revision(path)
    if wanted is not None and found != wanted:
        raise _conflict(path, wanted, found)
    return found


def begin(path: pathlib.Path) -> pathlib.Path:
    """An empty folder for a save, beside the saves that are there; it bears the names of this host and process."""
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError:
        raise InputError(f"cannot save to {path}: it is a file; give the name of a folder") from None
    incoming = path / f"{_INCOMING}{os.getpid()}-{_host()}-{uuid.uuid4().hex}"
    incoming.mkdir()
    return incoming


def commit(
    incoming: pathlib.Path,
    path: pathlib.Path,
    after: int | None = None,
    *,
    rename: Callable[[pathlib.Path, pathlib.Path], None] = os.rename,
) -> int:
    """Make a complete folder the newest save, by one rename; returns its number.

    Args:
        incoming: from `begin`, with everything in it.
        path: the folder of saves.
        after: the save that this one follows. ``None``: whatever is the newest.
        rename: a seam.

    Raises:
        ConflictError: another save than ``after`` is the newest; ``incoming`` is left as it was.
    """
    sync(incoming)
    while True:
        found = check_newest(path, after)
        place = place_of(path, found + 1)
        try:
            rename(incoming, place)
        except OSError as error:
            if error.errno in _TAKEN and os.path.lexists(place):
                continue
            raise
        if revision(path) == found + 1:
            break
        # Two others committed since `found` was read, and the first of them is gone already: this number was taken.
        try:
            os.rename(place, incoming)
        except FileNotFoundError:
            raise _conflict(path, found if after is None else after, revision(path)) from None
    _sync_folder(path)
    _clean(path, found + 1)
    return found + 1


def discard(incoming: pathlib.Path) -> None:
    """Remove what was not committed, and the folder of saves if there are none."""
    shutil.rmtree(incoming, ignore_errors=True)
    with contextlib.suppress(OSError):
        incoming.parent.rmdir()


def remove_left_over(path: pathlib.Path) -> None:
    """Remove earlier saves and what killed savers left, not what living ones write; nothing if nothing is saved."""
    if newest := revision(path):
        _clean(path, newest)


def sync(folder: pathlib.Path) -> None:
    """Everything below a folder on disk, before its name says so."""
    for directory, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(directory, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(directory)


def _sync_folder(folder: str | os.PathLike) -> None:
    if os.name != "posix":
        return  # a folder cannot be opened elsewhere
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _conflict(path: pathlib.Path, wanted: int, found: int) -> ConflictError:
    return ConflictError(
        f"{path} is at save {found}, and this one follows save {wanted}: another run has saved there meanwhile; "
        "nothing was replaced. Restore what is there now, or save to another folder"
    )


def _clean(path: pathlib.Path, keep: int) -> None:
    """Remove earlier saves, and what savers left that are no more; nothing that goes wrong here harms a save."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            entry = path / name
            if (re.fullmatch(r"[0-9]{8}", name) and int(name) < keep) or (
                name.startswith(_INCOMING) and _is_abandoned(entry)
            ):
                _drop(entry)
            elif name.startswith(_DROPPED):
                shutil.rmtree(entry, ignore_errors=True)


def _drop(entry: pathlib.Path) -> None:
    """Renamed first: nobody may read, or commit, a folder that is half removed."""
    dropped = entry.with_name(_DROPPED + uuid.uuid4().hex)
    with contextlib.suppress(OSError):
        os.rename(entry, dropped)
        shutil.rmtree(dropped, ignore_errors=True)


def _is_abandoned(incoming: pathlib.Path) -> bool:
    """Whether its saver is dead, as far as this host can tell, or has done nothing for long."""
    process, host, *_ = (*incoming.name.removeprefix(_INCOMING).split("-"), "", "")
    if host == _host() and re.fullmatch("[0-9]{1,10}", process) and not is_alive(int(process)):
        return True
    return time.time() - max(_times(incoming), default=time.time()) > _STALE


def _times(folder: pathlib.Path) -> Iterator[float]:
    for directory, _, names in os.walk(folder):
        for entry in (directory, *(os.path.join(directory, name) for name in names)):
            with contextlib.suppress(OSError):
                yield os.lstat(entry).st_mtime


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:40]

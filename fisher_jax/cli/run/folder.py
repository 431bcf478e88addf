"""The folder of a report: checked before the work starts, its files replaced in one step each."""

import errno
import os
import stat
from pathlib import Path

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.temporary import temporary_beside
from fisher_jax.cli.run.tools import TOOLS, Tools

_MOST = 2**30  # bytes; pages and their parts hold pictures
_FILES = (".html", ".md", ".csv", ".json", ".png", ".jinja", ".safetensors", ".lock")
_FOLDERS = ("figures", "model", "parts", "state")


def check_writable(folder: Path, *, bytes_needed: int = 0, tools: Tools = TOOLS) -> None:
    """Raises InputError unless files can be written in `folder` and enough space is free; leaves nothing behind."""
    if "[" in str(folder.absolute()):  # orbax takes it for a pattern, saves nothing, and says nothing
        raise InputError(
            f"{folder.absolute()} has a [ in its path, where states cannot be kept; choose another --out."
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder with --out.")
    created = []
    missing = folder
    while not missing.exists():
        created.append(missing)
        missing = missing.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_beside(folder / "probe")
        try:
            with open(probe, "xb") as stream:
                stream.write(b"\0" * 65536)
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)
        free = tools.free_bytes(folder)
    except OSError as error:
        raise disk_error(error, folder) from None
    finally:
        for path in created:
            if path.is_dir():
                path.rmdir()
    if free < bytes_needed:
        raise InputError(
            f"{folder} has {free / 2**20:,.0f} MiB free and this run needs about "
            f"{bytes_needed / 2**20:,.0f} MiB; free some space or choose another --out."
        )


def check_entries(folder: Path) -> None:
    """Raises InputError where something lies in the place of a file or a folder that a command may write.

    Looks at the folder and at the folders of commands in it: for pipes, devices and the like, for folders named as
    files are, and for files named as folders are.
    """
    for place in (folder, *(folder / name for name in _FOLDERS)):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            try:
                mode = path.stat().st_mode
            except OSError:  # a link to nothing; it gives way to a file
                continue
            is_folder, ours = stat.S_ISDIR(mode), place == folder and path.name in _FOLDERS
            if not is_folder and not stat.S_ISREG(mode) and (ours or path.name.endswith(_FILES)):
                raise InputError(f"{path} is neither a file nor a folder; remove it, or choose another --out.")
            if is_folder and path.name.endswith(_FILES):
                raise InputError(f"{path} is a folder in the place of a file; move it, or choose another --out.")
            if ours and not is_folder:
                raise InputError(f"{path} is a file in the place of a folder; move it, or choose another --out.")


def read_plain(path: Path) -> str:
    """What a command wrote earlier.

    Raises:
        OSError: it is no plain file, or has more than 1 GiB.
        ValueError: it is not UTF-8.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > _MOST:
        raise OSError(errno.EINVAL, "not a file of fisher-jax", str(path))
    return path.read_text(encoding="utf-8")


def disk_error(error: OSError, folder: Path) -> InputError:
    """The sentence for a failed write, or for another file that could not be used."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"the disk of {folder} is full; free some space or choose another --out.")
    if isinstance(error.filename, str) and not Path(error.filename).is_relative_to(folder):
        return InputError(f"{error.filename} cannot be used: {error.strerror or error}.")
    return InputError(f"{folder} cannot be written: {error.strerror or error}; choose another --out.")


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Writes beside `path` and renames, so that readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = contents.encode() if isinstance(contents, str) else contents
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

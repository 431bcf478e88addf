"""Arrays on disk, by orbax: each process writes what it holds, and each may read onto another mesh."""

import concurrent.futures
import contextlib
import hashlib
import logging
import os
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fisher_jax._support import processes
from fisher_jax._support.errors import InputError
from fisher_jax._support.printable import first_line
from fisher_jax.checkpoint import sums
from fisher_jax.checkpoint.facts import DamagedError, check
from fisher_jax.checkpoint.nodes import Array

_FOLDER = "arrays"
_FEW = 2**20  # bytes that are hashed before threads would have started


def write(folder: pathlib.Path, arrays: dict[str, Any], token: str) -> None:
    """Every process comes here with the same arrays; ``token`` is one that no other save has."""
    if arrays:
        stored = {name: _storable(x) for name, x in arrays.items()}
        with _checkpointer(token) as checkpointer:
            checkpointer.save(folder / _FOLDER, args=ocp.args.PyTreeSave(stored))


def read(folder: pathlib.Path, nodes: list[Array], places: dict[str, Any], token: str) -> dict[str, Any]:
    """The arrays that ``nodes`` describe, by name; ``places`` are the shardings wanted, ``None`` the default.

    Raises:
        InputError: an array of 64 bits where JAX has none.
        DamagedError: orbax cannot read them, or they are others.
    """
    nodes = [node for node in nodes if node.name is not None]
    wanted = {str(node.name): _restore_args(node, places.get(str(node.name))) for node in nodes}
    if not wanted:
        return {}
    try:
        with _quiet(), _checkpointer(token) as checkpointer:
            _check_described(checkpointer.metadata(folder / _FOLDER).item_metadata.tree, nodes)
            arguments = ocp.args.PyTreeRestore(item=dict.fromkeys(wanted, 0), restore_args=wanted)
            found = checkpointer.restore(folder / _FOLDER, args=arguments)
    except DamagedError:
        raise
    except Exception as error:  # orbax raises bare Exceptions for damaged files
        check(False, first_line(error))
    return found


def _check_described(stored: Any, nodes: list[Array]) -> None:
    """Before anything is allocated: what is stored has the sizes that are claimed."""
    check(isinstance(stored, dict) and set(stored) == {x.name for x in nodes}, "its arrays are not those described")
    for node in nodes:
        x = stored[node.name]
        same = tuple(x.shape) == node.shape and jnp.dtype(x.dtype) == jnp.dtype(node.dtype)
        check(same, f"the array {node.name} is {x.dtype}{list(x.shape)}, described as {node.dtype}{list(node.shape)}")


def sums_of(arrays: dict[str, Any]) -> dict[str, sums.Lanes]:
    """This process's share of the checksum of each array."""
    found = {}
    for name, x in arrays.items():
        if isinstance(x, jax.Array) and not (processes.several() and x.is_fully_addressable):
            found[name] = sums.of_shards(x)
        else:
            found[name] = sums.of_host(np.asarray(x)) if processes.is_first() else (0, 0)
    return found


def _storable(x: Any) -> Any:
    """An array of one process alone is saved as the first process has it."""
    return np.asarray(x) if isinstance(x, jax.Array) and processes.several() and x.is_fully_addressable else x


def _restore_args(node: Array, place: Any) -> Any:
    if node.place != "device" and place is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        sharding=_default_place() if place is None else place, global_shape=node.shape, dtype=jnp.dtype(node.dtype)
    )


def _default_place() -> jax.sharding.Sharding:
    if processes.several():
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _checkpointer(token: str) -> Any:
    # Naming the processes makes barriers that give up in the end; collectives would wait for ever.
    active = set(range(jax.process_count())) if processes.several() else None
    options = ocp.options.MultiprocessingOptions(active_processes=active, barrier_sync_key_prefix=token)
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What orbax's threads log of a damaged file is in the error that is raised."""

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def files_of(folder: pathlib.Path) -> dict[str, list]:
    """{relative path: [bytes, SHA-256]} of those of orbax's files that this process hashes after it has written."""
    own = [(name, size) for name, size in _files(folder) if _writer(name) == jax.process_index()]
    return {name: [size, digest] for (name, size), digest in zip(own, _digests(folder, own), strict=True)}


def check_files(folder: pathlib.Path, files: dict[str, Any]) -> None:
    """Whether the folder holds just these files, before anything in them is believed; each process hashes a share.

    Raises:
        DamagedError: a file is missing, new, another, or no plain file.
    """
    try:
        found = dict(_files(folder))
    except OSError as error:
        check(False, f"its files cannot be listed ({error.strerror})")
    for name, about in files.items():
        check(name in found, f"the file {name[:100]!r} is missing")
        check(type(about) is list and len(about) == 2 and type(about[0]) is int, "its files are not described")
        check(found[name] == about[0], f"{name} has {found[name]:,} bytes, described are {str(about[0])[:40]}")
    extra = sorted(set(found) - set(files))
    check(not extra, f"it holds the file {(extra or [''])[0][:100]!r}, which was not saved")
    own = sorted(found.items())[jax.process_index() :: jax.process_count()]
    for (name, _), digest in zip(own, _digests(folder, own), strict=True):
        check(digest == files[name][1], f"{name} has changed since it was saved")


def _writer(name: str) -> int:
    """The process that wrote a file, where its path says so."""
    found = re.search(r"(?:^|/)(?:ocdbt\.)?process_([0-9]+)(?:/|$)", name)
    number = int(found[1]) if found else 0
    return number if number < jax.process_count() else 0


def _digests(folder: pathlib.Path, files: list[tuple[str, int]]) -> list[str]:
    def digest(file: tuple[str, int]) -> str:
        try:
            with open(folder / file[0], "rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise DamagedError(f"{file[0]} cannot be read ({error.strerror})") from error

    if sum(size for _, size in files) < _FEW:
        return [digest(file) for file in files]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, files))


def _files(folder: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Plain files below the folder of arrays; anything else that is no folder is an error."""
    top = folder / _FOLDER
    if not os.path.lexists(top):
        return
    check(stat.S_ISDIR(top.lstat().st_mode), f"{_FOLDER} is not a folder")
    for directory, folders, names in os.walk(top):
        for name in (*folders, *names):
            file = pathlib.Path(directory, name)
            about = file.lstat()
            if not stat.S_ISDIR(about.st_mode):
                check(stat.S_ISREG(about.st_mode), f"{name} is not a plain file")
                yield file.relative_to(folder).as_posix(), about.st_size


def check_width(nodes: list[Array], path: Any) -> None:
    """Arrays of 64 bits are never narrowed without a word.

    Raises:
        InputError: a JAX array that needs ``jax_enable_x64``.
    """
    for node in nodes:
        dtype = jnp.dtype(node.whole_dtype)
        if node.place == "device" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise InputError(
                f"the checkpoint {path} holds a JAX array of {dtype}; restore it inside `with jax.enable_x64(True):`"
            )

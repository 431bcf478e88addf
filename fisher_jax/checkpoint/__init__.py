"""Save and restore any state: data in numbered saves, committed by one rename, refused where it does not belong."""

import errno
import json
import os
import pathlib
import uuid
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisher_jax._support import processes
from fisher_jax._support.errors import InputError
from fisher_jax.checkpoint import arrays as arrays_room
from fisher_jax.checkpoint import facts as facts_room
from fisher_jax.checkpoint import generations, sums
from fisher_jax.checkpoint.build import build, match
from fisher_jax.checkpoint.describe import describe as describe_state
from fisher_jax.checkpoint.describe import measured
from fisher_jax.checkpoint.facts import check, damage
from fisher_jax.checkpoint.generations import revision
from fisher_jax.checkpoint.nodes import Array, Node, arrays_of, parse

__all__ = ["describe", "metadata", "restore", "revision", "save"]


def save(
    path: str | os.PathLike, state: Any, *, metadata: dict | None = None, dtype: Any = None, after: int | None = None
) -> int:
    """Write ``state`` into the folder ``path`` as its newest save, and remove the earlier ones.

    A save is complete on disk before one rename makes it the newest: one that is interrupted, at any moment, or that
    runs out of space, leaves the last one restorable. With several processes (``jax.distributed``) all of them call
    this with the same tree and path; each writes the shards that it holds, and the first one the facts.

    Args:
        path: a folder; its parent must exist.
        state: a tree of arrays, numbers and strings: dicts, lists, tuples, and the states of this library. Other
            classes (an optax state) are saved too, and need ``like`` to be restored.
        metadata: JSON-ready facts that say where the state belongs (model, groups, settings).
        dtype: ``None`` stores exactly. float32, bfloat16 or float16 store the statistics of Welford states as single
            numbers of that type; they are restored as float32 pairs, without their corrections.
        after: the `revision` that ``state`` was built on. A save that another run has put there meanwhile is not
            replaced. ``None``: the save follows whatever is the newest.

    Returns:
        The number of this save, see `revision`.

    Raises:
        ConflictError: the newest save is not ``after``.
        TypeError: something that cannot be saved, named by its place.
        ValueError: a value that ``dtype`` would turn into zero or infinity.
        OSError: the folder cannot be written.
        RuntimeError: another process did not come here.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp, tempfile
        >>> state = fj.welford.init(jnp.zeros(3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     number = fj.checkpoint.save(folder + "/state", {"wikipedia": state}, metadata={"model": "mine"})
        ...     restored = fj.checkpoint.restore(folder + "/state", metadata={"model": "mine"})
        >>> number, type(restored["wikipedia"]).__name__
        (1, 'State')
    """
    path = pathlib.Path(path).absolute()
    incoming: pathlib.Path | None = None
    described: list[tuple[Node, dict[str, Any]]] = []

    def begin() -> list[str]:
        nonlocal incoming
        described.append(describe_state(state, dtype=None if dtype is None else jnp.dtype(dtype)))
        if processes.is_first():
            generations.check_newest(path, after)  # before anything is written
            incoming = generations.begin(path)
        return [incoming.name if incoming else "", _outline(described[0][0])]

    def commit() -> int:
        if incoming is None:
            return 0
        facts_room.write(incoming, _facts(node, metadata or {}, files))
        return generations.commit(incoming, path, after)

    try:
        begun = processes.together(begin, f"save {path}")
        if len({outline for _, outline in begun}) > 1:
            raise ValueError(f"the processes that save {path} hold states of different forms")
        node, arrays = described[0]
        written = processes.together(lambda: _write(path / begun[0][0], arrays), f"write {path}")
        for array in arrays_of(node):
            if array.name is not None:
                array.sum = sums.add(*(each["sums"][array.name] for each in written))
        files = {name: about for each in written for name, about in each["files"].items()}
        return processes.together(commit, f"commit {path}")[0]
    except BaseException as error:
        if incoming is not None:
            generations.discard(incoming)
        if isinstance(error, Exception) and _is_full(error):
            raise OSError(
                errno.ENOSPC, "no space left to save the state; the former one is intact", str(path)
            ) from error
        raise


def _facts(node: Node, metadata: dict, files: dict[str, list]) -> dict[str, Any]:
    return {
        **facts_room.common(jax.process_count()), "metadata": facts_room.to_json(metadata), "states": measured(node),
        "tree": node.json(), "files": files,
    }  # fmt: skip


def _outline(node: Node) -> str:
    """What all processes must have in common: the tree, but not its values."""
    names = json.dumps([[x.name, x.shape, x.dtype] for x in arrays_of(node)])
    return facts_room.sha256(names.encode())


def _write(incoming: pathlib.Path, arrays: dict[str, Any]) -> dict[str, Any]:
    found = arrays_room.sums_of(arrays)
    arrays_room.write(incoming, arrays, incoming.name)
    if not processes.is_first():
        generations.sync(incoming)
    return {"sums": found, "files": arrays_room.files_of(incoming)}


def _is_full(error: Exception) -> bool:
    return "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC


def restore(path: str | os.PathLike, like: Any = None, *, metadata: dict | None = None) -> Any:
    """Read the newest save of `save`. The bits are those that were saved, or it is refused.

    Args:
        path: the folder.
        like: a tree of arrays or ``jax.ShapeDtypeStruct``s that the state must match, in its keys, types, shapes and
            dtypes; its shardings are used, so a state can be restored onto another mesh. ``None``: the same types
            that were saved, on this process's first device; with several processes each has a copy.
        metadata: facts that the checkpoint must state with these values; others are not looked at.

    Returns:
        The state.

    Raises:
        InputError: nothing to restore, a damaged folder, other metadata, another structure, shape or dtype.
        RuntimeError: another process did not come here.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fj.checkpoint.save(folder + "/state", {"a": jnp.arange(3)}, metadata={"model": "mine"})
        ...     fj.checkpoint.restore(folder + "/state", metadata={"model": "other"})
        Traceback (most recent call last):
        ...
        fisher_jax._support.errors.InputError: the checkpoint ... has model 'mine', wanted 'other'
    """
    path = pathlib.Path(path).absolute()
    return _reading(path, lambda folder, token: _restore(path, folder, token, like, metadata or {}))


def metadata(path: str | os.PathLike) -> dict:
    """The facts that `save` was given, without reading any array.

    Raises:
        InputError: nothing there, or a damaged folder.

    Example:
        >>> import fisher_jax as fj, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fj.checkpoint.save(folder + "/state", {"step": 3}, metadata={"model": "mine"})
        ...     fj.checkpoint.metadata(folder + "/state")
        {'model': 'mine'}
    """
    return describe(path)["metadata"]


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """What is known of the newest save, without reading any array.

    Returns:
        A dict: ``revision``; ``metadata``, what `save` was given; ``states``, of each state of moments its place, and
        what its numbers are (statistic over the group, unit, scale); ``versions``, ``date`` (UTC), ``command`` and
        ``processes`` of the save.

    Raises:
        InputError: nothing there, or a damaged folder.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fj.checkpoint.save(folder + "/state", fj.welford.init(jnp.zeros(3), unit="document"))
        ...     fj.checkpoint.describe(folder + "/state")["states"]
        [{'place': 'state', 'type': 'welford', 'statistic': 'sum', 'unit': 'document', 'scale': 0, 'errors': True}]
    """
    path = pathlib.Path(path).absolute()
    number = generations.revision(path)
    while True:
        try:
            facts, _ = _read(path, generations.place_of(path, number))
            names = ("metadata", "states", "versions", "date", "command", "processes")
            return {"revision": number, **{name: facts[name] for name in names}}
        except InputError:
            before, number = number, generations.revision(path)
            if number == before:
                raise


def _reading(path: pathlib.Path, read: Callable[[pathlib.Path, str], Any]) -> Any:
    """``read`` of the newest save, the same on all processes; of the next one if a saver replaced it meanwhile."""

    def newest() -> list:
        return [generations.revision(path), uuid.uuid4().hex] if processes.is_first() else []

    number, token = processes.together(newest, f"restore {path}")[0]
    while True:
        try:
            return read(generations.place_of(path, number), token)
        except InputError:
            before = number
            number, token = processes.together(newest, f"restore {path}")[0]
            if number == before:
                raise


def _restore(path: pathlib.Path, folder: pathlib.Path, token: str, like: Any, wanted: dict) -> Any:
    described: list[Node] = []
    places: dict[str, Any] = {}
    arrays: dict[str, Any] = {}

    def prepare() -> None:
        facts, node = _read(path, folder)
        _check_metadata(path, facts["metadata"], wanted)
        if like is not None:
            places.update(_fit(node, like, path))
        arrays_room.check_width(arrays_of(node), path)
        described.append(node)

    def read() -> None:
        with damage(f"the checkpoint {path}"):
            arrays.update(arrays_room.read(folder, arrays_of(described[0]), places, token))

    processes.together(prepare, f"restore {path}")
    processes.together(read, f"read {path}")
    with damage(f"the checkpoint {path}"):
        _check_sums(arrays_of(described[0]), arrays)
        return build(described[0], arrays, like, has_like=like is not None, path=path)


def _read(path: pathlib.Path, folder: pathlib.Path) -> tuple[dict[str, Any], Node]:
    with damage(f"the checkpoint {path}"):
        check(not folder.is_symlink() and folder.is_dir(), f"the save {folder.name} is not a folder")
        facts = facts_room.read(folder)
        arrays_room.check_files(folder, facts["files"])
        return {**facts, "metadata": facts_room.from_json(facts["metadata"])}, parse(facts["tree"])


def _check_metadata(path: pathlib.Path, found: Any, wanted: dict) -> None:
    for name, value in wanted.items():
        if facts_room.to_json(found.get(name)) != facts_room.to_json(value):
            raise InputError(f"the checkpoint {path} has {name} {found.get(name)!r}, wanted {value!r}")


def _fit(node: Node, like: Any, path: pathlib.Path) -> dict[str, Any]:
    """The shardings that the template asks for, by the name of the array."""
    template, leaves = describe_state(like, "like")
    places = {}
    for array, wanted in match(node, template, path):
        leaf = leaves.get(str(wanted.name))
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None or not isinstance(leaf, jax.ShapeDtypeStruct):
            array.place = wanted.place
        if sharding is not None and array.name is not None:
            places[array.name] = _of_stored(sharding) if array.pair_of else sharding
    return places


def _of_stored(sharding: Any) -> Any:
    """Without the axis of the pair, which is not stored."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    return sharding.update(spec=jax.sharding.PartitionSpec(*sharding.spec[1:]))


def _check_sums(nodes: list[Array], arrays: dict[str, Any]) -> None:
    shares = processes.together(lambda: arrays_room.sums_of(arrays), "compare checksums")
    for node in nodes:
        if node.name is not None:
            check(
                sums.add(*(share[node.name] for share in shares)) == node.sum,
                f"the values of {node.name} have changed",
            )

"""Save and restore any state with orbax: atomic, self-describing, refused where it does not belong."""

import dataclasses
import errno
import importlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint

from fisher_jax import compensated
from fisher_jax.errors import InputError
from fisher_jax.moments import Fragment
from fisher_jax.welford import State

__all__ = ["metadata", "restore", "save"]

_FORMAT = 1
_PAIRS = {"mean", "m2", "square_mean", "square_m2"}  # what a storage dtype rounds; weights and counts stay exact


def save(path: str | os.PathLike, state: Any, *, metadata: dict | None = None, dtype: Any = None) -> None:
    """Write ``state`` into the folder ``path``, replacing what a former save left there.

    The new checkpoint is complete on disk before the old one is touched: a save that is interrupted, at any moment,
    or that runs out of space, leaves a restorable checkpoint.

    Args:
        path: a folder; its parent must exist.
        state: a tree of arrays, numbers and strings: dicts, lists, tuples, and the states of this library. Other
            classes (an optax state) are saved too, and need ``like`` to be restored.
        metadata: JSON-ready facts that say where the state belongs (model, groups, settings).
        dtype: ``None`` stores exactly. float32, bfloat16 or float16 store the statistics of Welford states as single
            numbers of that type; they are restored as float32 pairs, without their corrections.

    Raises:
        ValueError: a value that ``dtype`` would turn into zero or infinity.
        OSError: the folder cannot be written.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp, tempfile
        >>> state = fj.welford.init(jnp.zeros(3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fj.checkpoint.save(folder + "/state", {"wikipedia": state}, metadata={"model": "mine"})
        ...     restored = fj.checkpoint.restore(folder + "/state", metadata={"model": "mine"})
        >>> type(restored["wikipedia"]).__name__
        'State'
    """
    path = pathlib.Path(path).absolute()
    arrays: dict[str, Any] = {}
    structure = _encode(state, "state", arrays, None if dtype is None else jnp.dtype(dtype))
    description = json.dumps({"format": _FORMAT, "metadata": metadata or {}, "structure": structure}, indent=1)
    incoming, previous = _beside(path)
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        incoming.mkdir()
        if arrays:
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                checkpointer.save(incoming / "arrays", arrays)
        # Written last: an incoming folder with a description is a complete checkpoint.
        with open(incoming / "writing.json", "w", encoding="utf-8") as file:
            file.write(description)
            file.flush()
            os.fsync(file.fileno())
        os.replace(incoming / "writing.json", incoming / "state.json")
    except Exception as error:
        shutil.rmtree(incoming, ignore_errors=True)
        if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, "no space left to save the state; the former one is intact", str(path)
            ) from error
        raise
    shutil.rmtree(previous, ignore_errors=True)
    if path.exists():
        os.replace(path, previous)
    os.replace(incoming, path)
    shutil.rmtree(previous, ignore_errors=True)


def restore(path: str | os.PathLike, like: Any = None, *, metadata: dict | None = None) -> Any:
    """Read what `save` wrote.

    Args:
        path: the folder.
        like: a tree of arrays or ``jax.ShapeDtypeStruct``s that the state must match; its shardings are used, so a
            state can be restored onto another mesh. ``None``: the same types that were saved, on the default device.
        metadata: facts that the checkpoint must state with these values; others are not looked at.

    Returns:
        The state.

    Raises:
        InputError: nothing to restore, a damaged folder, other metadata, another structure, shape or dtype.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fj.checkpoint.save(folder + "/state", {"a": jnp.arange(3)}, metadata={"model": "mine"})
        ...     fj.checkpoint.restore(folder + "/state", metadata={"model": "other"})
        Traceback (most recent call last):
        ...
        fisher_jax.errors.InputError: the checkpoint ... has model 'mine', wanted 'other'
    """
    folder, description = _read(path)
    for name, wanted in (metadata or {}).items():
        found = description["metadata"].get(name)
        if found != wanted:
            raise InputError(f"the checkpoint {path} has {name} {found!r}, wanted {wanted!r}")
    structure = description["structure"]
    targets: dict[str, Any] = {}
    if like is not None:
        _match(path, structure, like)
    _targets(structure, targets)
    if like is not None:
        _reshard(structure, like, targets)
    arrays = {}
    if targets:
        try:
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                arrays = checkpointer.restore(folder / "arrays", targets)
        except Exception as error:  # orbax raises bare Exceptions for damaged files
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"the checkpoint {path} is damaged: {reason}") from error
    leaves: list = []
    state = _decode(structure, arrays, leaves, build=like is None)
    return state if like is None else jax.tree.unflatten(jax.tree.structure(like), leaves)


def metadata(path: str | os.PathLike) -> dict:
    """The facts that `save` was given, without reading any array.

    Raises:
        InputError: nothing there, or a damaged folder.

    Example:
        >>> import fisher_jax as fj, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fj.checkpoint.save(folder + "/state", {"step": 3}, metadata={"model": "mine"})
        ...     fj.checkpoint.metadata(folder + "/state")
        {'model': 'mine'}
    """
    return _read(path)[1]["metadata"]


def _beside(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    return path.with_name(path.name + ".incoming"), path.with_name(path.name + ".previous")


def _read(path: str | os.PathLike) -> tuple[pathlib.Path, dict]:
    path = pathlib.Path(path).absolute()
    # Only a save that was cut off between its two renames leaves the folder away.
    folder = next((x for x in (path, *_beside(path)) if (x / "state.json").is_file()), None)
    if folder is None:
        what = "is not a checkpoint of fisher_jax (no state.json)" if path.exists() else "does not exist"
        raise InputError(f"nothing to restore: {path} {what}")
    try:
        description = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"the checkpoint {path} is damaged: state.json is not JSON ({error})") from error
    if description.get("format") != _FORMAT:
        raise InputError(
            f"the checkpoint {path} has format {description.get('format')}, this version reads {_FORMAT}"
        )
    return folder, description


def _is_ours(x: Any) -> bool:
    return type(x).__module__.split(".")[0] == "fisher_jax"


def _encode(x: Any, where: str, arrays: dict, dtype: Any) -> dict:
    """A JSON description of a tree; its arrays go into ``arrays``."""
    if x is None or isinstance(x, bool | int | float | str):
        return {"value": x}
    if isinstance(x, dict):
        return {"dict": [[key, _encode(v, f"{where}[{key!r}]", arrays, dtype)] for key, v in x.items()]}
    if dataclasses.is_dataclass(x) and _is_ours(x):
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        rounded = _PAIRS if isinstance(x, State | Fragment) else set()
        encoded = {
            k: _encode_pairs(v, f"{where}.{k}", arrays, dtype)
            if dtype is not None and k in rounded
            else _encode(v, f"{where}.{k}", arrays, dtype)
            for k, v in fields.items()
        }
        return {"class": _name(x), "fields": encoded}
    if isinstance(x, tuple) and hasattr(x, "_fields") and _is_ours(x):
        named = zip(x._fields, x, strict=True)
        encoded = {k: _encode(v, f"{where}.{k}", arrays, dtype) for k, v in named}
        return {"class": _name(x), "fields": encoded}
    if type(x) in (list, tuple):
        items = [_encode(v, f"{where}[{i}]", arrays, dtype) for i, v in enumerate(x)]
        return {type(x).__name__: items}
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return _encode_array(x, arrays)
    children = jax.tree.leaves(x)
    if len(children) == 1 and children[0] is x:
        raise TypeError(f"{where} is a {type(x).__name__}, which cannot be saved")
    return {
        "opaque": _name(x),
        "leaves": [_encode(v, f"{where}<{i}>", arrays, dtype) for i, v in enumerate(children)],
    }


def _name(x: Any) -> str:
    return f"{type(x).__module__}:{type(x).__qualname__}"


def _encode_array(x: Any, arrays: dict) -> dict:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return {"key": str(jax.random.key_impl(x)), "data": _encode_array(jax.random.key_data(x), arrays)}
    found = {"shape": list(x.shape), "dtype": str(x.dtype), "host": not isinstance(x, jax.Array)}
    if x.size == 0:
        return {"array": None, **found}
    name = f"a{len(arrays)}"
    arrays[name] = np.asarray(x) if isinstance(x, np.generic) else x
    return {"array": name, **found}


def _encode_pairs(tree: Any, where: str, arrays: dict, dtype: Any) -> dict:
    def leaf(pair):
        exact = np.asarray(compensated.value(pair))
        with np.errstate(over="ignore", under="ignore"):
            stored = exact.astype(dtype)
        for bad, what in (
            ((stored == 0) & (exact != 0), "zero"),
            (np.isinf(stored) & np.isfinite(exact), "infinity"),
        ):
            if bad.any():
                raise ValueError(
                    f"{where}: {int(bad.sum())} of {bad.size} values would become {what} in {dtype} (say, "
                    f"{exact[bad].ravel()[0]:.3g}); use bfloat16 or float32"
                )
        return {**_encode_array(jnp.asarray(stored), arrays), "pair_of": str(pair.dtype), "parts": len(pair)}

    leaves, treedef = jax.tree.flatten(tree)
    return _encode_tree(jax.tree.unflatten(treedef, [_Leaf(leaf(x)) for x in leaves]), where)


@dataclasses.dataclass
class _Leaf:
    node: dict


def _encode_tree(x: Any, where: str) -> dict:
    """Like `_encode`, for a tree whose leaves are described already."""
    if isinstance(x, _Leaf):
        return x.node
    if x is None:
        return {"value": None}
    if isinstance(x, dict):
        return {"dict": [[k, _encode_tree(v, where)] for k, v in x.items()]}
    if type(x) in (list, tuple):
        return {type(x).__name__: [_encode_tree(v, where) for v in x]}
    raise TypeError(
        f"{where} holds a {type(x).__name__}; a storage dtype needs statistics in dicts, lists and tuples"
    )


def _children(node: dict) -> list[dict]:
    if "dict" in node:
        return [v for _, v in node["dict"]]
    if "fields" in node:
        return list(node["fields"].values())
    return node.get("list") or node.get("tuple") or node.get("leaves") or ([node["data"]] if "key" in node else [])


def _array_nodes(node: dict) -> list[dict]:
    """Nodes of arrays in the order of `_encode`."""
    return [node] if "array" in node else [x for child in _children(node) for x in _array_nodes(child)]


def _targets(structure: dict, targets: dict) -> None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for node in _array_nodes(structure):
        if node["array"] is not None:
            # A NumPy target keeps what jax would narrow (int64 without x64).
            targets[node["array"]] = (
                np.empty(node["shape"], node["dtype"])
                if node["host"]
                else jax.ShapeDtypeStruct(node["shape"], jnp.dtype(node["dtype"]), sharding=device)
            )


def _reshard(structure: dict, like: Any, targets: dict) -> None:
    for node, leaf in zip(_leaf_nodes(structure), jax.tree.leaves(like), strict=True):
        sharding = getattr(leaf, "sharding", None)
        if "array" in node and node["array"] is not None and sharding is not None and "pair_of" not in node:
            target = targets[node["array"]]
            targets[node["array"]] = jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=sharding)


def _leaf_nodes(node: dict) -> list[dict]:
    """Nodes in the order of ``jax.tree.leaves`` of the saved tree: dicts by sorted key, static fields left out."""
    if "array" in node or "key" in node:
        return [node]
    if "value" in node:
        return [] if node["value"] is None else [node]
    if "dict" in node:
        return [x for _, v in sorted(node["dict"], key=lambda item: item[0]) for x in _leaf_nodes(v)]
    if "fields" in node:
        static = _static_fields(_find_class(node["class"]))
        return [x for k, v in node["fields"].items() if k not in static for x in _leaf_nodes(v)]
    return [x for child in _children(node) for x in _leaf_nodes(child)]


def _static_fields(cls: type) -> set[str]:
    return (
        {"unit", "scale", "errors", "decay"} & {f.name for f in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else set()
    )


def _find_class(name: str) -> type:
    module, _, qualified = name.partition(":")
    if module.split(".")[0] != "fisher_jax":
        raise InputError(f"the checkpoint holds a {name}; pass like= to restore it")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


def _match(path: Any, structure: dict, like: Any) -> None:
    nodes = _leaf_nodes(structure)
    wanted = jax.tree_util.tree_leaves_with_path(like)
    if len(nodes) != len(wanted):
        raise InputError(f"the checkpoint {path} holds {len(nodes)} arrays, the state wanted has {len(wanted)}")
    for node, (where, leaf) in zip(nodes, wanted, strict=True):
        if "array" not in node:
            continue
        shape = ([node.get("parts", 2)] if "pair_of" in node else []) + node["shape"]
        dtype = node.get("pair_of", node["dtype"])
        if (shape, dtype) != (
            list(jnp.shape(leaf)),
            str(jnp.asarray(leaf).dtype if not hasattr(leaf, "dtype") else leaf.dtype),
        ):
            raise InputError(
                f"the checkpoint {path} does not fit: {jax.tree_util.keystr(where)} is {dtype}{shape} there and "
                f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(jnp.shape(leaf))} in the state wanted"
            )
    for found, expected in zip(_statics(structure), _statics_of(like), strict=False):
        if found != expected:
            raise InputError(f"the checkpoint {path} does not fit: it has {found}, the state wanted has {expected}")


def _statics(node: dict) -> list[dict]:
    own = []
    if "fields" in node:
        names = _static_fields(_find_class(node["class"]))
        own = [{k: v["value"] for k, v in node["fields"].items() if k in names}] if names else []
    return own + [x for child in _children(node) for x in _statics(child)]


def _statics_of(like: Any) -> list[dict]:
    structure = _encode(jax.tree.map(lambda x: np.zeros(0), like), "like", {}, None)
    return _statics(structure)


def _decode(node: dict, arrays: dict, leaves: list, build: bool) -> Any:
    """Rebuild the tree; ``leaves`` collects its leaves in the order of ``jax.tree.leaves``."""
    if not build:
        leaves.extend(_decode(x, arrays, [], True) for x in _leaf_nodes(node))
        return None
    if "value" in node:
        return node["value"]
    if "array" in node:
        empty = node["array"] is None
        array = jnp.zeros(node["shape"], node["dtype"]) if empty else arrays[node["array"]]
        if "pair_of" in node:
            value = array.astype(node["pair_of"])
            return value[None] if node.get("parts", 2) == 1 else compensated.from_value(value)
        return np.asarray(array) if node["host"] else array
    if "key" in node:
        return jax.random.wrap_key_data(_decode(node["data"], arrays, [], True), impl=node["key"])
    if "dict" in node:
        return {k: _decode(v, arrays, leaves, True) for k, v in node["dict"]}
    if "fields" in node:
        cls = _find_class(node["class"])
        return cls(**{k: _decode(v, arrays, leaves, True) for k, v in node["fields"].items()})
    if "opaque" in node:
        raise InputError(f"the checkpoint holds a {node['opaque']}; pass like= to restore it")
    items = [_decode(x, arrays, leaves, True) for x in _children(node)]
    return items if "list" in node else tuple(items)

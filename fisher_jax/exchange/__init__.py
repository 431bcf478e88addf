"""Fisher information as safetensors files, so that other tools can use it, and back to the same bits."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax import welford
from fisher_jax._support.errors import InputError
from fisher_jax.checkpoint.facts import damage
from fisher_jax.exchange import file_header
from fisher_jax.uses import reading
from fisher_jax.uses.trees import check_alike, check_not_negative
from fisher_jax.welford.moments import Fragment
from fisher_jax.welford.per_group import as_state
from fisher_jax.welford.state import state_in

__all__ = ["describe", "load", "save"]

Tree = Any


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one leaf lies in the file: one tensor, or one for each layer of a stack."""

    path: tuple[Any, ...]
    names: tuple[str, ...]
    stacked: bool = False
    transposed: bool = False

    def split(self, x: np.ndarray, lead: int = 0) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors as they are stored; ``lead`` axes stay in front."""
        parts = [np.take(x, i, axis=lead) for i in range(len(self.names))] if self.stacked else [x]
        for name, part in zip(self.names, parts, strict=True):
            turned = self._turned(part, lead)
            yield name, np.ascontiguousarray(turned).reshape(turned.shape)  # a scalar stays one

    def join(self, parts: list[np.ndarray], lead: int = 0) -> Any:
        turned = [self._turned(part, lead) for part in parts]
        return np.stack(turned, axis=lead) if self.stacked else turned[0]

    def _turned(self, x: Any, lead: int) -> Any:
        return np.swapaxes(x, -1, -2) if self.transposed and x.ndim == lead + 2 else x


def save(
    path: str | os.PathLike,
    fisher: Any,
    *,
    names: str | dict[str, str] | Callable[[str], str] | None = None,
    metadata: dict | None = None,
) -> None:
    """Write Fisher information to one safetensors file.

    Other tools find, under each parameter's name, its mean Fisher per weighted token (``sum_t w_t s_t**2 / W``,
    summed within groups), and in the file's metadata what it is. Of a Welford state everything else is stored beside
    it, as ``name:m2`` and the like, so that `load` gives the state back bit for bit.

    Args:
        path: of the file; replaced only once the new one is complete.
        fisher: a tree of arrays that are not negative, a Welford state, moments, or a moving average (whose mean is
            stored).
        names: ``None``: the path of each leaf, joined by dots. ``"huggingface"``: for trees of ``fj.models`` decoders
            of the Llama family, the names, layers and orientation (``[out, in]``) of their checkpoints. Else a dict
            from paths (``"layers/q/kernel"``) to names, or a function of the path, or for a single array its name.
        metadata: JSON-ready facts, such as model, text, kind and groups.

    Raises:
        ValueError: two leaves of one name, a leaf without one, a negative Fisher.
        InputError: the package safetensors is not installed.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp, tempfile
        >>> fisher = {"mlp": {"kernel": jnp.array([[1.0, 2.0]])}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fj.exchange.save(folder + "/fisher.safetensors", fisher, metadata={"model": "mine"})
        ...     fj.exchange.describe(folder + "/fisher.safetensors")["tensors"]
        {'mlp.kernel': [1, 2]}
    """
    safetensors = _package()
    state = _state_of(fisher)
    values = reading.mean(fisher) if state is None else jax.jit(welford.mean)(state)
    check_not_negative(values, "the Fisher")
    flat, _ = jax.tree_util.tree_flatten_with_path(values)
    places = _places(flat, names)
    _check_names(places)
    tensors: dict[str, np.ndarray] = {}
    for place, (_, x) in zip(places, flat, strict=True):
        tensors.update(place.split(np.asarray(x)))
    facts: dict[str, Any] = {"content": "values", "metadata": metadata or {}}
    if state is not None:
        tensors.update(_state_tensors(state, places))
        facts |= {
            "content": "state", "unit": state.unit, "scale": state.scale, "observations": welford.count(state),
            "weight": welford.weight(state), "fractional": state.square_mean is not None,
            "errors": state.errors,
        }  # fmt: skip
    facts["leaves"] = [_saved_place(place) for place in places]
    _write(pathlib.Path(path), safetensors, tensors, facts)


def _package() -> Any:
    from fisher_jax.models.optional_packages import optional  # the models room is slow to import

    return optional("safetensors.numpy", "exchange of Fisher information with other tools")


def _state_of(fisher: Any) -> welford.State | None:
    found = state_in(fisher, welford.State, welford.Moments)
    return None if found is None else as_state(found)


def _keys(path: tuple) -> tuple[Any, ...]:
    return tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path)


def _places(flat: list, names: Any) -> list[_Place]:
    places = []
    for path, x in flat:
        keys = _keys(path)
        ours = "/".join(map(str, keys))
        if names == "huggingface":
            places.append(_hugging_face(keys, ours, np.shape(x)))
        else:
            places.append(_Place(keys, (_name_of(ours, names, len(flat)),)))
    return places


def _name_of(path: str, names: Any, number: int) -> str:
    if names is None:
        return path.replace("/", ".") or "fisher"
    if isinstance(names, str):
        if number != 1:
            raise ValueError(f"names={names!r} is one name for {number} leaves; give a dict, or 'huggingface'")
        return names
    name = names(path) if callable(names) else names.get(path)
    if not isinstance(name, str):
        raise ValueError(f"names has no name for the leaf {path!r}")
    return name


def _hugging_face(keys: tuple, path: str, shape: tuple[int, ...]) -> _Place:
    from fisher_jax.models.families import LLAMA_NAMES

    if path not in LLAMA_NAMES:
        raise ValueError(
            f"{path or 'array'} is no leaf of a Llama decoder of fj.models; leave names=None, or give a dict of names"
        )
    stacked, transposed = path.startswith("layers/"), path.endswith("/kernel")
    if stacked and not shape:
        raise ValueError(f"{path} has no axis of layers, from which names of layers could be given")
    number = shape[0] if stacked else 1
    return _Place(keys, tuple(LLAMA_NAMES[path].format(i) for i in range(number)), stacked, transposed)


def _check_names(places: list[_Place]) -> None:
    seen: set[str] = set()
    for place in places:
        for name in place.names:
            if name in seen:
                raise ValueError(f"two leaves have the name {name!r}; give other names=")
            if ":" in name:
                raise ValueError(f"the name {name!r} has a colon, which sets the parts of a state apart")
            seen.add(name)


def _state_tensors(state: welford.State, places: list[_Place]) -> dict[str, np.ndarray]:
    trees = {field: getattr(state, field) for field in file_header.PAIRS if getattr(state, field) is not None}
    scalars = {field: getattr(state, field) for field in file_header.SCALARS}
    if state.open is not None:
        trees["open.mean"] = state.open.mean
        scalars |= {"open.weight": state.open.weight, "open.unit_id": state.open.unit_id}
    found = {f"state:{name}": np.asarray(x) for name, x in scalars.items()}
    for field, tree in trees.items():
        for place, x in zip(places, jax.tree.leaves(tree), strict=True):
            found |= {f"{name}:{field}": part for name, part in place.split(np.asarray(x), lead=1)}
    return found


def _write(path: pathlib.Path, safetensors: Any, tensors: dict, facts: dict) -> None:
    header = file_header.header(facts, tensors)
    incoming = path.with_name(path.name + f".incoming-{os.getpid()}")
    try:
        safetensors.save_file(tensors, incoming, metadata=header)
        os.replace(incoming, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            incoming.unlink()


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """What is in a safetensors file, without reading its numbers.

    Returns:
        A dict: ``tensors``, the shapes by name (of a state its means); ``content``, ``"state"``, ``"values"`` or, of
        a file of another tool, ``"foreign"``; ``metadata``, what `save` was given (or the foreign file's own); of a
        state ``unit``, ``observations`` and ``weight``.

    Raises:
        InputError: no such file, one that is no safetensors file, one of another version of this format, or one whose
            facts have changed since it was saved.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp, tempfile
        >>> state = fj.welford.observe(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fj.exchange.save(folder + "/head.safetensors", state, names="lm_head.weight")
        ...     found = fj.exchange.describe(folder + "/head.safetensors")
        >>> found["content"], found["unit"], found["observations"], found["tensors"]
        ('state', 'token', 2, {'lm_head.weight': [2]})
    """
    _, shapes, facts = _open(path)
    known = ("content", "metadata", "unit", "observations", "weight")
    return {"tensors": {k: v for k, v in shapes.items() if ":" not in k}} | {k: facts[k] for k in known if k in facts}


def _open(path: str | os.PathLike) -> tuple[Any, dict[str, list[int]], dict[str, Any]]:
    package = _package()
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}")
    with damage(str(path)):
        header, found = file_header.read_header(path)
        shapes = {name: shape for name, (_, shape) in found.items()}
        if not file_header.is_ours(header):
            return package, shapes, {"content": "foreign", "metadata": header}
        return package, shapes, file_header.checked(file_header.read(path, header), found)


def load(path: str | os.PathLike, like: Any = None) -> Any:
    """Read what `save` wrote, or another tool's file.

    Args:
        path: of the file.
        like: a tree (such as the parameters' Fisher, or a state) whose structure and shapes are wanted. ``None``:
            nested dicts as they were saved; of another tool's file a flat dict from names to arrays. Needed where the
            tree that was saved held lists or classes.

    Returns:
        The Welford state, or the tree of NumPy arrays, bit for bit.

    Raises:
        InputError: as `describe`; values that are not those that were saved; a state in float64 without x64.
        ValueError: another tree or other shapes than ``like``.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp, tempfile
        >>> state = fj.welford.observe({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fj.exchange.save(folder + "/fisher.safetensors", state)
        ...     back = fj.exchange.load(folder + "/fisher.safetensors")
        >>> fj.mean(back)["w"].tolist(), fj.welford.count(back)
        ([2.0, 3.0], 2)
    """
    package, _, facts = _open(path)
    with damage(str(path)):
        tensors = file_header.values(package, path, facts)
    if facts["content"] == "foreign":
        if like is not None:
            check_alike(like, tensors, "like", str(path))
        return tensors
    places = [_place(x) for x in facts["leaves"]]
    wanted = None if like is None else _state_of(like)
    shape_like = like if wanted is None else jax.tree.map(lambda x: x[0], wanted.mean)

    def tree(suffix: str, lead: int) -> Tree:
        leaves = [place.join([tensors[name + suffix] for name in place.names], lead) for place in places]
        return _rebuild(places, leaves, shape_like, str(path))

    values = tree("", 0)
    if shape_like is not None:
        check_alike(shape_like, values, "like", str(path))
    return values if facts["content"] == "values" else _load_state(tree, tensors, facts, str(path))


def _saved_place(place: _Place) -> dict[str, Any]:
    if not all(type(key) in (str, int) for key in place.path):
        raise ValueError(f"the leaf {'/'.join(map(str, place.path))} has a key that is not a text or a whole number")
    return dataclasses.asdict(place)


def _place(saved: dict) -> _Place:
    return _Place(tuple(saved["path"]), tuple(saved["names"]), saved["stacked"], saved["transposed"])


def _rebuild(places: list[_Place], leaves: list, like: Tree, path: str) -> Tree:
    if like is not None and [_keys(p) for p, _ in jax.tree_util.tree_leaves_with_path(like)] == [
        place.path for place in places
    ]:
        return jax.tree.unflatten(jax.tree.structure(like), leaves)
    if places and places[0].path == ():
        return leaves[0]
    nested: dict = {}
    for place, leaf in zip(places, leaves, strict=True):
        if not all(isinstance(key, str) for key in place.path):
            raise InputError(f"{path} holds a tree that is not of dicts alone; give its structure as like=")
        *parents, last = place.path
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"{path} is damaged: {parent!r} is a leaf and holds leaves")
        if last in node:
            raise InputError(f"{path} is damaged: the leaf {last!r} is there twice")
        node[last] = leaf
    return nested


def _load_state(tree: Callable, tensors: dict, facts: dict, path: str) -> welford.State:
    def arrays(x: Tree) -> Tree:
        return jax.tree.map(lambda leaf: _array(leaf, path), x)

    scalars: dict[str, Any] = {field: arrays(tensors[f"state:{field}"]) for field in file_header.SCALARS}
    pairs: dict[str, Any] = {
        field: arrays(tree(f":{field}", 1)) if facts["fractional"] or not field.startswith("square") else None
        for field in file_header.PAIRS
    }
    opened = None
    if facts["unit"] == "document":
        opened = Fragment(
            arrays(tree(":open.mean", 1)), arrays(tensors["state:open.weight"]), arrays(tensors["state:open.unit_id"])
        )
    static = {"unit": facts["unit"], "scale": facts["scale"], "errors": facts["errors"]}
    return welford.State(**pairs, **scalars, open=opened, **static)


def _array(x: np.ndarray, path: str) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        raise InputError(f"{path} holds a state in float64; load it inside `with jax.enable_x64(True):`")
    return jnp.asarray(x)

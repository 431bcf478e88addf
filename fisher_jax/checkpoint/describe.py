"""From a state to its description, and the arrays that belong to it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support import compensated
from fisher_jax.checkpoint import uses
from fisher_jax.checkpoint.facts import DamagedError
from fisher_jax.checkpoint.nodes import DTYPES, Array, Dict, Key, Node, Other, Record, Sequence, Value, check_record
from fisher_jax.checkpoint.types import name_of, state_type

Arrays = dict[str, Any]  # of a template: jax.ShapeDtypeStruct too

_ROUNDED = {
    "welford": ("mean", "m2", "square_mean", "square_m2"),
    "fragment": ("mean",),
}  # weights and counts stay exact


def describe(state: Any, what: str = "state", dtype: Any = None) -> tuple[Node, Arrays]:
    """The description of a tree (of a template too) and its arrays by name.

    Args:
        state: see `save`.
        what: its name in messages.
        dtype: of the statistics of Welford states, see `save`.

    Raises:
        TypeError: something that cannot be saved, by its place.
        ValueError: a statistic that ``dtype`` cannot hold.
    """
    arrays: Arrays = {}
    return _describe(state, what, arrays, dtype), arrays


def _describe(x: Any, where: str, arrays: Arrays, dtype: Any) -> Node:
    if x is None or type(x) in (bool, int, float, str):
        return Value(x)
    if type(x) is dict:
        return Dict([(_key(key, where), _describe(v, f"{where}[{key!r}]", arrays, dtype)) for key, v in x.items()])
    if type(x) in (list, tuple):
        items = [_describe(v, f"{where}[{i}]", arrays, dtype) for i, v in enumerate(x)]
        return Sequence(type(x).__name__, items)
    if isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return _array(x, where, arrays)
    name = name_of(x)
    if name is not None:
        return _record(x, name, where, arrays, dtype)
    return _other(x, where, arrays, dtype)


def _key(key: Any, where: str) -> Any:
    if type(key) is tuple:
        return tuple(_key(part, where) for part in key)
    if not (key is None or type(key) in (bool, int, float, str)):
        raise TypeError(
            f"{where} has the key {key!r}, a {type(key).__name__}; keys are texts, numbers, or tuples of them"
        )
    return key


def _array(x: Any, where: str, arrays: Arrays) -> Node:
    if not isinstance(x, np.ndarray | np.generic) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        if isinstance(x, jax.ShapeDtypeStruct):
            return Key(str(x.dtype), "", Array(None, x.shape, "uint32"))
        data = _array(jax.random.key_data(x), where, arrays)
        assert isinstance(data, Array)
        return Key(str(x.dtype), str(jax.random.key_impl(x)), data)
    dtype = x.dtype.newbyteorder("=") if isinstance(x, np.ndarray | np.generic) else x.dtype
    if dtype.name not in DTYPES:
        raise TypeError(f"{where} is an array of {dtype}, which cannot be saved")
    place = "scalar" if isinstance(x, np.generic) else "host" if isinstance(x, np.ndarray) else "device"
    name = f"a{len(arrays)}" if x.size else None
    if name is not None:
        arrays[name] = np.asarray(x, dtype) if place != "device" else x
    return Array(name, tuple(x.shape), dtype.name, place)


def _record(x: Any, name: str, where: str, arrays: Arrays, dtype: Any) -> Record:
    about = state_type(name)
    assert about is not None
    rounded = _ROUNDED.get(name, ()) if dtype is not None else ()
    fields: dict[str, Node] = {}
    values = uses.fields(x) if about.converted else {field: getattr(x, field) for field in about.kinds}
    for field, value in values.items():
        place = f"{where}.{field}"
        if field in rounded:
            fields[field] = _rounded(value, place, arrays, dtype)
        else:
            fields[field] = _describe(value, place, arrays, dtype)
    record = Record(name, fields, about)
    try:
        check_record(record)
    except DamagedError as error:
        raise TypeError(f"{where} cannot be saved: {error}") from None
    return record


def _other(x: Any, where: str, arrays: Arrays, dtype: Any) -> Other:
    children, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda child: child is not x)
    if len(children) == 1 and children[0][1] is x:
        raise TypeError(f"{where} is a {type(x).__name__}, which cannot be saved")
    items = [(jax.tree_util.keystr(path), child) for path, child in children]
    return Other(type(x).__name__, [(key, _describe(child, where + key, arrays, dtype)) for key, child in items])


def _rounded(tree: Any, where: str, arrays: Arrays, dtype: Any) -> Node:
    """Pairs as single numbers of ``dtype``."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    stored = [_single(pair, f"{where}{jax.tree_util.keystr(path)}", dtype) for path, pair in leaves]
    node = _describe(jax.tree.unflatten(treedef, stored), where, arrays, None)
    _mark(node, iter([pair for _, pair in leaves]))
    return node


def _mark(node: Node, pairs: Any) -> None:
    """In the order of JAX, which sorts keys."""
    if isinstance(node, Array):
        pair = next(pairs)
        node.pair_of, node.parts = str(pair.dtype), len(pair)
    items = sorted(node.items, key=lambda item: item[0]) if isinstance(node, Dict) else None
    for child in node.children() if items is None else [child for _, child in items]:
        _mark(child, pairs)


def _single(pair: Any, where: str, dtype: Any) -> Any:
    stored, zeros, infinities, worst = _round(pair, jnp.dtype(dtype).name)
    for number, what in ((int(zeros), "zero"), (int(infinities), "infinity")):
        if number:
            raise ValueError(
                f"{where}: {number} of {stored.size} values would become {what} in {jnp.dtype(dtype).name} (say, "
                f"{float(worst):.3g}); use bfloat16 or float32"
            )
    return stored


@functools.partial(jax.jit, static_argnums=1)
def _round(pair: Any, dtype: str) -> tuple[Any, Any, Any, Any]:
    exact = compensated.value(pair)
    stored = exact.astype(dtype)
    zero, infinite = (stored == 0) & (exact != 0), jnp.isinf(stored) & jnp.isfinite(exact)
    bad = zero | infinite
    return stored, zero.sum(), infinite.sum(), jnp.max(jnp.where(bad, jnp.abs(exact), 0), initial=0)


def measured(node: Node, where: str = "state") -> list[dict[str, Any]]:
    """What each measured state is: its place, type, statistic, unit and scale."""
    if isinstance(node, Record) and node.about.statistic is not None:
        static = {k: v.value for k, v in node.fields.items() if k in node.about.static and isinstance(v, Value)}
        return [{"place": where, "type": node.type, "statistic": node.about.statistic, **static}]
    return [x for key, child in _named(node) for x in measured(child, f"{where}[{key!r}]")]


def _named(node: Node) -> list[tuple[Any, Node]]:
    if isinstance(node, Dict | Other):
        return list(node.items)
    return list(node.fields.items()) if isinstance(node, Record) else list(enumerate(node.children()))

"""From a description and its arrays back to a state; with a template, after both are seen to agree."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support import compensated
from fisher_jax._support.errors import InputError
from fisher_jax.checkpoint import uses
from fisher_jax.checkpoint.describe import Arrays
from fisher_jax.checkpoint.nodes import Array, Dict, Key, Node, Other, Record, Sequence, Value, static_value


def match(node: Node, wanted: Node, path: Any) -> list[tuple[Array, Array]]:
    """Arrays of a saved state beside those of a template, described, if both are of one form.

    Raises:
        InputError: names the first place where they differ.
    """
    return list(_match(node, wanted, "state", path))


def _match(node: Node, wanted: Node, where: str, path: Any) -> Iterator[tuple[Array, Array]]:
    if isinstance(wanted, Array) and isinstance(node, Value) and wanted.shape == () and _is_number(node, wanted):
        return  # a template of shapes has numbers as arrays
    if _form(node) != _form(wanted):
        found, other = (_form(x) if len(_form(x)) < 200 else _form(x)[:200] + " ..." for x in (node, wanted))
        raise InputError(
            f"the checkpoint {path} does not fit: {where} is {found} there and {other} in the state wanted"
        )
    if isinstance(node, Array) and isinstance(wanted, Array):
        yield node, wanted
    if isinstance(node, Record) and isinstance(wanted, Record):
        static = [{k: static_value(x.fields[k]) for k in x.about.static} for x in (node, wanted)]
        if static[0] != static[1]:
            raise InputError(
                f"the checkpoint {path} does not fit: {where} has {static[0]}, the state wanted has {static[1]}"
            )
    children = dict(_named(wanted, where))
    for name, child in _named(node, where):
        yield from _match(child, children[name], name, path)


def _form(node: Node) -> str:
    """All that two nodes must share beside their children, in words."""
    if isinstance(node, Array):
        return f"{node.whole_dtype}{list(node.whole_shape)}"
    if isinstance(node, Key):
        return f"random keys {node.dtype}{list(node.data.shape[: -1 if node.impl else None])}"
    if isinstance(node, Value):
        return f"a {type(node.value).__name__}" if node.value is not None else "None"
    if isinstance(node, Dict):
        return f"a dict of {', '.join(sorted(repr(key) for key, _ in node.items))}"
    if isinstance(node, Sequence):
        return f"a {node.kind} of {len(node.items)}"
    if isinstance(node, Record):
        return f"the state {node.type!r}"
    assert isinstance(node, Other)
    return f"a {node.type} of {', '.join(key for key, _ in node.items)}"


def _is_number(node: Value, wanted: Array) -> bool:
    kind = np.dtype(bool).kind if wanted.dtype == "bool" else "i" if "int" in wanted.dtype else "f"
    return {bool: "b", int: "i", float: "f"}.get(type(node.value)) == kind


def _named(node: Node, where: str) -> list[tuple[str, Node]]:
    if isinstance(node, Dict):
        return [(f"{where}[{key!r}]", child) for key, child in node.items]
    if isinstance(node, Sequence):
        return [(f"{where}[{i}]", child) for i, child in enumerate(node.items)]
    if isinstance(node, Record):
        return [(f"{where}.{name}", child) for name, child in node.fields.items()]
    return [(where + key, child) for key, child in node.items] if isinstance(node, Other) else []


def build(node: Node, arrays: Arrays, like: Any = None, *, has_like: bool = False, path: Any = "") -> Any:
    """The state.

    Args:
        node: its description.
        arrays: by name.
        like: the template, matched already; types of other libraries are taken from it.
        has_like: whether there is one.
        path: of the checkpoint, for messages.

    Raises:
        InputError: a type of another library, and no template.
    """
    if isinstance(node, Value):
        return node.value
    if isinstance(node, Array):
        return _array(node, arrays)
    if isinstance(node, Key):
        return jax.random.wrap_key_data(_array(node.data, arrays), impl=node.impl)

    def child(part: Node, of: Any) -> Any:
        return build(part, arrays, of, has_like=has_like, path=path)

    def field(name: str, part: Node) -> Any:
        if not has_like:
            return child(part, None)
        return getattr(like, name) if name in node.about.static else child(part, getattr(like, name))  # type: ignore

    if isinstance(node, Dict):
        return {key: child(part, like[key] if has_like else None) for key, part in node.items}
    if isinstance(node, Sequence):
        items = [child(part, like[i] if has_like else None) for i, part in enumerate(node.items)]
        return items if node.kind == "list" else tuple(items)
    if isinstance(node, Record):
        if node.about.converted:
            return uses.rebuilt({name: static_value(part) for name, part in node.fields.items()})
        return node.about.cls(**{name: field(name, part) for name, part in node.fields.items()})
    assert isinstance(node, Other)
    if not has_like:
        raise InputError(f"the checkpoint {path} holds a {node.type}; pass like= to restore it")
    parts, treedef = jax.tree.flatten(like, is_leaf=lambda x: x is not like)
    return jax.tree.unflatten(treedef, [child(part, of) for (_, part), of in zip(node.items, parts, strict=True)])


def _array(node: Array, arrays: Arrays) -> Any:
    if node.name is None:
        empty = np.zeros(node.shape, jnp.dtype(node.dtype))
        return empty if node.place == "host" else jnp.asarray(empty)
    array = arrays[node.name]
    if node.pair_of is not None:
        value = array.astype(node.pair_of)
        return value[None] if node.parts == 1 else compensated.from_value(value)
    return array[()] if node.place == "scalar" else array

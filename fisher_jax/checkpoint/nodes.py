"""How a state is described as data: a tree of nodes that JSON carries, checked when it is read."""

import abc
import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from fisher_jax.checkpoint.facts import check
from fisher_jax.checkpoint.sums import Lanes
from fisher_jax.checkpoint.types import StateType, state_type

# What orbax stores to the same bits.
_WIDTHS = {"int": (4, 8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64), "complex": (64, 128)}
_SMALL_FLOATS = (
    "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float4_e2m1fn",
)  # fmt: skip
DTYPES = frozenset(
    ("bool", "bfloat16", *_SMALL_FLOATS, *(f"{kind}{n}" for kind, widths in _WIDTHS.items() for n in widths))
)
_PLACES = ("device", "host", "scalar")


class Node(abc.ABC):
    """One of the following."""

    @abc.abstractmethod
    def json(self) -> dict[str, Any]:
        """What the facts hold of it."""

    def children(self) -> list["Node"]:
        return []


@dataclass(frozen=True)
class Value(Node):
    value: bool | int | float | str | None

    def json(self):
        return {"value": self.value}


@dataclass
class Array(Node):
    """An array: on a device, a NumPy array, or a NumPy scalar.

    Attributes:
        name: under which orbax keeps it; ``None`` for an array without elements.
        sum: checksum of what is stored.
        pair_of, parts: of a statistic that was stored as single numbers: the type of its compensated pairs, and 2;
            1 for the plain form.
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: str
    place: str = "device"
    sum: Lanes = (0, 0)
    pair_of: str | None = None
    parts: int = 2

    def json(self):
        pair = {"pair_of": self.pair_of, "parts": self.parts} if self.pair_of else {}
        return {
            "array": self.name, "shape": list(self.shape), "dtype": self.dtype, "place": self.place,
            "sum": list(self.sum), **pair,
        }  # fmt: skip

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return (self.parts, *self.shape) if self.pair_of else self.shape

    @property
    def whole_dtype(self) -> str:
        return self.pair_of or self.dtype


@dataclass
class Key(Node):
    """Typed PRNG keys."""

    dtype: str
    impl: str
    data: Array

    def json(self):
        return {"key": self.dtype, "impl": self.impl, "data": self.data.json()}

    def children(self):
        return [self.data]


@dataclass
class Dict(Node):
    items: list[tuple[Any, Node]]

    def json(self):
        return {"dict": [[_key_json(key), node.json()] for key, node in self.items]}

    def children(self):
        return [node for _, node in self.items]


@dataclass
class Sequence(Node):
    kind: str  # "list" or "tuple"
    items: list[Node]

    def json(self):
        return {self.kind: [node.json() for node in self.items]}

    def children(self):
        return self.items


@dataclass
class Record(Node):
    """A state of this library."""

    type: str
    fields: dict[str, Node]
    about: StateType = field(repr=False)

    def json(self):
        return {"type": self.type, "fields": {name: node.json() for name, node in self.fields.items()}}

    def children(self):
        return list(self.fields.values())


@dataclass
class Other(Node):
    """A node of another library's type, by the paths of JAX; only a template can rebuild it."""

    type: str
    items: list[tuple[str, Node]]

    def json(self):
        return {"other": self.type, "children": [[key, node.json()] for key, node in self.items]}

    def children(self):
        return [node for _, node in self.items]


def arrays_of(node: Node) -> list[Array]:
    """In the order in which they were described."""
    return [node] if isinstance(node, Array) else [x for child in node.children() for x in arrays_of(child)]


def _key_json(key: Any) -> Any:
    return [_key_json(part) for part in key] if isinstance(key, tuple) else key


def parse(x: Any) -> Node:
    """The node that JSON describes.

    Raises:
        DamagedError: it describes none.
    """
    node = _parse(x)
    names = [array.name for array in arrays_of(node) if array.name is not None]
    check(names == [f"a{i}" for i in range(len(names))], "its arrays are not numbered in order")
    return node


def _parse(x: Any) -> Node:
    check(type(x) is dict, f"{str(x)[:40]!r} is not the description of a part of a state")
    keys = set(x)
    if keys == {"value"}:
        check(x["value"] is None or type(x["value"]) in (bool, int, float, str), "a value is not a number or a text")
        return Value(x["value"])
    if "array" in keys:
        return _parse_array(x, keys)
    if keys == {"key", "impl", "data"}:
        return _parse_key(x)
    if keys == {"dict"}:
        items = [(_parse_dict_key(key), _parse(node)) for key, node in _pairs(x["dict"])]
        check(
            len({(type(key), key) for key, _ in items}) == len({key for key, _ in items}) == len(items),
            "a key occurs twice",
        )
        return Dict(items)
    if keys in ({"list"}, {"tuple"}):
        (kind,) = keys
        check(type(x[kind]) is list, f"a {kind} is not a list of descriptions")
        return Sequence(kind, [_parse(item) for item in x[kind]])
    if keys == {"type", "fields"}:
        about = state_type(x["type"])
        check(about is not None, f"it names the type {str(x['type'])[:60]!r}, which is not a state of this library")
        assert about is not None
        check(type(x["fields"]) is dict, "the fields of a state are not a dict")
        record = Record(x["type"], {name: _parse(node) for name, node in x["fields"].items()}, about)
        check_record(record)
        return record
    check(
        keys == {"other", "children"} and type(x["other"]) is str, "a part of the state has a description of no kind"
    )
    items = [(key, _parse(node)) for key, node in _pairs(x["children"])]
    check(all(type(key) is str for key, _ in items), "a path is not a text")
    return Other(x["other"], items)


def _pairs(x: Any) -> list:
    check(
        type(x) is list and all(type(pair) is list and len(pair) == 2 for pair in x), "a dict is not a list of pairs"
    )
    return x


def _parse_dict_key(key: Any) -> Any:
    if type(key) is list:
        return tuple(_parse_dict_key(part) for part in key)
    check(key is None or type(key) in (bool, int, float, str), "a key of a dict is not a number, a text or a tuple")
    return key


def _parse_array(x: dict, keys: set) -> Array:
    pair = keys > {"array", "pair_of"}
    check(
        keys == {"array", "shape", "dtype", "place", "sum", *(("pair_of", "parts") if pair else ())},
        "an array lacks facts",
    )
    name, shape, dtype = x["array"], x["shape"], x["dtype"]
    check(name is None or type(name) is str, "the name of an array is not a text")
    check(
        type(shape) is list and all(type(n) is int and 0 <= n < 2**48 for n in shape),
        "a shape is not a list of sizes",
    )
    check(len(shape) <= 64 and math.prod(shape) < 2**48, f"an array of shape {str(shape)[:60]} is too large")
    check(type(dtype) is str and dtype in DTYPES, f"{str(dtype)[:40]!r} is not the name of a dtype")
    check((name is None) == (math.prod(shape) == 0), "an array without elements has a name, or another one has none")
    check(
        x["place"] in _PLACES and (x["place"] != "scalar" or not shape),
        f"{str(x['place'])[:40]!r} is no place of an array",
    )
    lanes = x["sum"]
    check(type(lanes) is list and len(lanes) == 2, "a checksum is not two numbers")
    check(all(type(n) is int and 0 <= n < 2**32 for n in lanes), "a checksum is not two numbers of 32 bits")
    array = Array(name, tuple(shape), dtype, x["place"], (lanes[0], lanes[1]))
    if not pair:
        return array
    check(
        x["pair_of"] in ("float32", "float64") and x["parts"] in (1, 2) and type(x["parts"]) is int,
        "a statistic is no pair",
    )
    return replace(array, pair_of=x["pair_of"], parts=x["parts"])


def _parse_key(x: dict) -> Key:
    data = _parse(x["data"])
    check(
        isinstance(data, Array) and data.dtype == "uint32" and data.place == "device", "random keys are not of uint32"
    )
    assert isinstance(data, Array)
    try:
        like = jax.eval_shape(lambda: jax.random.wrap_key_data(jnp.zeros(data.shape, jnp.uint32), impl=x["impl"]))
    except Exception as error:
        check(False, f"random keys of the kind {str(x['impl'])[:40]!r} are not known here ({type(error).__name__})")
    check(str(like.dtype) == x["key"], "random keys have another type than their kind")
    return Key(x["key"], x["impl"], data)


def check_record(record: Record) -> None:
    """Whether the fields of a state are what its type says.

    Raises:
        DamagedError: they are not.
    """
    about = record.about
    check(set(record.fields) == set(about.kinds), f"a state of type {record.type!r} lacks fields, or has others")
    optional = about.optional.split()
    for name, kind in about.kinds.items():
        node = record.fields[name]
        if name in optional and node == Value(None):
            continue
        if kind == "static":
            value = static_value(node)
            check(about.static[name](value), f"the {name} of a state of type {record.type!r} is {str(value)[:40]!r}")
        else:
            check(_FITS[kind](node), f"the {name} of a state of type {record.type!r} are no {kind}")


def static_value(node: Node) -> Any:
    """The Python value of a node without arrays; ``NotImplemented`` for another one."""
    if isinstance(node, Value):
        return node.value
    if isinstance(node, Sequence):
        items = [static_value(item) for item in node.items]
        return items if node.kind == "list" else tuple(items)
    if isinstance(node, Dict):
        return {key: static_value(item) for key, item in node.items}
    if isinstance(node, Record):
        return {"type": node.type, **{name: static_value(item) for name, item in node.fields.items()}}
    return NotImplemented


def _is_number(node: Node) -> bool:
    if isinstance(node, Array):
        return node.shape == () and node.pair_of is None
    return isinstance(node, Value) and type(node.value) in (bool, int, float)


def _is_tree(node: Node) -> bool:
    if isinstance(node, Value):
        return node.value is None
    return isinstance(node, Array | Key) or all(_is_tree(child) for child in node.children())


_FITS = {
    "arrays": lambda node: isinstance(node, Array | Key),
    "trees": _is_tree,
    "numbers": _is_number,
    "texts": lambda node: isinstance(node, Value) and type(node.value) is str,
    "anything": lambda node: True,
}

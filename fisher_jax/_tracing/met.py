"""What a program does first with its inputs: whether an input meets a parameter before anything looks at it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fisher_jax._support.jax_internals import (
    Loop,
    Remat,
    branches,
    broadcast_axes,
    contraction,
    inside,
    loop,
    named_axes,
    opened,
    permutation,
    repetition,
)
from fisher_jax._tracing.tracing import evaluate
from fisher_jax._tracing.uses import Data, Known, View, plain

__all__ = ["CONTENT", "SHIFT", "USED", "met"]

# Everything of it goes into a lookup, a product with a parameter or a convolution; or also into a sum, place by
# place; or it is used otherwise: compared, spread over other data, passed on.
CONTENT, SHIFT, USED = 0, 1, 2

# Of an input and numbers: still the input. Not among them is what tells values apart.
_ARITHMETIC = {
    "add", "sub", "mul", "div", "neg", "max", "min", "clamp", "rem", "convert_element_type", "copy", "copy_p",
    "reduce_precision", "sharding_constraint", "layout_constraint", "reshard", "mesh_cast", "pvary", "pcast", "rev",
    "slice",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Given(Data):
    """An input on its way: for each axis of the array the axes of the input that lie along it."""

    number: int = 0
    axes: tuple[frozenset[int], ...] = ()
    negative: bool = False  # whether the input is below 0, as JAX asks of every index


@dataclasses.dataclass(frozen=True)
class _Patched(Data):
    """A function of parameters in which some entries are no parameter's: a table with a row of zeros for padding."""


def met(apply_fn: Callable, params: Any, inputs: Any, lead: Sequence[Sequence[int]]) -> list[int]:
    """For every leaf of the inputs the worst of what it meets first: `CONTENT`, `SHIFT` or `USED`.

    Args:
        lead: of every leaf its axes of rows and positions. A product that sums over them is `USED`.
    """
    leaves, treedef = jax.tree.flatten(params)
    given, inputs_tree = jax.tree.flatten(inputs)

    def of_arrays(leaves, given):
        return apply_fn(jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(inputs_tree, given))

    traced = jax.make_jaxpr(of_arrays)(leaves, given)
    types = [var.aval for var in opened(traced)[0].arguments]
    moving = [bool(jnp.issubdtype(t.dtype, jnp.floating)) for t in types[: len(leaves)]]
    views = [View.of(Data(types[i]), i) if moved else Data(types[i]) for i, moved in enumerate(moving)]
    pieces = [
        _Given(t, number=i, axes=tuple(frozenset([j]) for j in range(len(t.shape))))
        for i, t in enumerate(types[len(leaves) :])
    ]
    way = _Meeting([frozenset(one) for one in lead], [CONTENT] * len(pieces))
    way.use_all(evaluate(traced, [*views, *pieces], way))
    return way.found


@dataclasses.dataclass
class _Meeting:
    """A way through the program that follows the inputs, and notes what each meets."""

    lead: list[frozenset[int]]
    found: list[int]

    def _note(self, values: Sequence[Any], what: int) -> None:
        for x in map(plain, values):
            if isinstance(x, _Given):
                self.found[x.number] = max(self.found[x.number], what)

    def use_all(self, values: Sequence[Any]) -> None:
        self._note(values, USED)

    def constant(self, value: Any) -> Data:
        return Data(jax.typeof(value))

    def bind(self, eqn: Any, values: list) -> list:
        if (scan := loop(eqn)) is not None:
            return self.scan(eqn, scan, values)
        if (parts := branches(eqn)) is not None:
            self.use_all(values[:1])
            for part in parts:
                self.use_all(evaluate(part, values[1:], self))
            return [Data(var.aval) for var in eqn.outvars]
        if repetition(eqn) is None and (inner := inside(eqn)) is not None:
            return list(map(plain, evaluate(inner, values, self)))
        pieces = [x for x in map(plain, values) if isinstance(x, _Given)]
        if pieces and (moved := self._moved(eqn, pieces, values)) is not None:
            return [moved]
        if pieces and eqn.primitive.name in ("add", "sub", "mul", "div", "add_any"):
            shape = eqn.outvars[0].aval.shape
            for x in pieces:
                self._note([x], SHIFT if _lies_along(x, shape) else USED)
            return [Data(eqn.outvars[0].aval)]
        is_lookup = eqn.primitive.name == "gather" and isinstance(values[0], Known) and values[0].params
        says_what_is_padding = is_lookup and isinstance(values[0].value, _Patched)
        self._note(values, CONTENT if is_lookup and not says_what_is_padding else USED)
        kind = _Patched if _is_patched(eqn, values) else Data
        return [kind(var.aval) for var in eqn.outvars]

    def _moved(self, eqn: Any, pieces: list[_Given], values: list) -> _Given | None:
        """The same input after an equation that only moves it, or counts it up."""
        name, (first, *others), out = eqn.primitive.name, pieces, eqn.outvars[0].aval
        if len({x.number for x in pieces}) != 1 or len(eqn.outvars) != 1:
            return None
        if name == "select_n" and first.negative and not any(x.negative for x in others):
            # x < 0 ? x + size : x
            return dataclasses.replace(others[0], type=out) if len(others) == 2 == len(values) - 1 else None
        if any(x.negative for x in pieces) or others:
            return None
        if name == "lt" and isinstance(plain(values[0]), _Given) and _is_zero(values[1]):
            integers = jnp.issubdtype(first.type.dtype, jnp.integer)
            return dataclasses.replace(first, type=out, negative=True) if integers else None
        if name in _ARITHMETIC:
            rest = [x for x in values if plain(x) is not first]
            known = all(not isinstance(x, View | Data) and not (isinstance(x, Known) and x.params) for x in rest)
            same = (out.shape == first.type.shape or name == "slice") and out.dtype != bool
            return dataclasses.replace(first, type=out) if known and same else None
        axes = _axes_after(eqn, first)
        return None if axes is None else dataclasses.replace(first, type=out, axes=axes)

    def use(self, view: View, kind: str, eqn: Any, index: int, output: Callable, apply: Any, inputs: tuple) -> Data:
        del view, output, apply
        for x in inputs:
            if isinstance(x, _Given):
                lost = x.negative or (kind == "dense" and self._is_summed(x, eqn, index))
                self._note([x], USED if lost else SHIFT if kind == "bias" else CONTENT)
        return Data(eqn.outvars[0].aval)

    def _is_summed(self, x: _Given, eqn: Any, index: int) -> bool:
        contracted = contraction(eqn.params).contracted[1 - index]
        return any(x.axes[i] & self.lead[x.number] for i in contracted)

    def instead(self, eqn: Any, values: list) -> Any:
        return None

    def beside(self, view: View, eqn: Any, values: list) -> Data:
        return view.value

    def generic(self, x: Any, eqn: Any) -> Any:
        return Known(x.value, params=True) if isinstance(x, View) else x

    def remat(self, eqn: Any, remat: Remat, values: list) -> list:
        return [plain(x) for x in evaluate(remat.traced, values, self)]

    def scan(self, eqn: Any, scan: Loop, values: list) -> list:
        first, head = scan.num_consts, scan.num_consts + scan.num_carry
        self.use_all(values[first:head])
        types = [Data(var.aval) for var in opened(scan.traced)[0].arguments]
        consts = [_inside(x, t, "shared") for x, t in zip(values[:first], types, strict=False)]
        xs = [_inside(x, t, "stacked") for x, t in zip(values[head:], types[head:], strict=True)]
        outs = evaluate(scan.traced, [*consts, *types[first:head], *xs], self)
        self.use_all(outs)
        return [Data(var.aval) for var in eqn.outvars]


def _is_patched(eqn: Any, values: list) -> bool:
    """Whether a function of parameters is made of one and of arrays that are none's."""
    of_parameters = [isinstance(x, Known) and x.params for x in values]
    arrays = [not own and len(var.aval.shape) > 0 for own, var in zip(of_parameters, eqn.invars, strict=True)]
    return any(of_parameters) and (
        any(arrays) or eqn.primitive.name == "pad" or any(isinstance(plain(x), _Patched) for x in values)
    )


def _inside(x: Any, inner: Data, how: str) -> Any:
    """What the body of a loop has of an operand."""
    if isinstance(x, View):
        return x.inside(inner, how)
    given = plain(x)
    if isinstance(given, _Given):
        return dataclasses.replace(given, type=inner.type, axes=given.axes[how == "stacked" :])
    return dataclasses.replace(x, value=inner) if isinstance(x, Known) else inner


def _lies_along(x: _Given, shape: tuple[int, ...]) -> bool:
    """Whether an input is added to numbers of its own places, none of which has it twice."""
    return (
        x.type.shape == shape
        and not x.negative
        and all(axes or n == 1 for axes, n in zip(x.axes, shape, strict=True))
    )


def _is_zero(x: Any) -> bool:
    x = plain(x)
    return not isinstance(x, Data) and jnp.ndim(x) == 0 and bool(x == 0)


def _axes_after(eqn: Any, x: _Given) -> tuple[frozenset[int], ...] | None:
    """The axes of an input after a layout operation; ``None`` for any other."""
    name, shape, new = eqn.primitive.name, x.type.shape, eqn.outvars[0].aval.shape
    if name == "transpose":
        return tuple(x.axes[i] for i in permutation(eqn))
    if name == "broadcast_in_dim":
        places = dict(zip(broadcast_axes(eqn), x.axes, strict=True))
        return tuple(places.get(i, frozenset()) for i in range(len(new)))
    if name == "squeeze":
        return tuple(axes for i, axes in enumerate(x.axes) if i not in named_axes(eqn))
    if name == "expand_dims":
        rest = iter(x.axes)
        return tuple(frozenset() if i in named_axes(eqn) else next(rest) for i in range(len(new)))
    return _regrouped(shape, x.axes, new) if name == "reshape" else None


def _regrouped(
    shape: tuple[int, ...], axes: tuple[frozenset[int], ...], new: tuple[int, ...]
) -> tuple[frozenset[int], ...]:
    """Of a reshape: axes that are merged or split have all that was there."""
    ends, new_ends = (list(itertools.accumulate(s, lambda a, b: a * b, initial=1)) for s in (shape, new))
    if math.prod(shape) == 0:
        return tuple(frozenset().union(*axes) for _ in new)
    found: list[frozenset[int]] = []
    for i, size in enumerate(new):
        if size == 1:
            found.append(frozenset())
            continue
        low, high = new_ends[i], new_ends[i + 1]
        # Axes whose strides, counted from the front, lie between those of this one.
        met = [axes[j] for j in range(len(shape)) if shape[j] > 1 and ends[j] < high and ends[j + 1] > low]
        found.append(frozenset().union(*met))
    return tuple(found)

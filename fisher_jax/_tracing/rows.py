"""Whether the rows of a batch depend on each other: what links them, carried through a program beside the ids.

An array without a link is, at every entry, a function of the row that its id names (of none, without ids). A link
comes from an operation that sums over rows, sorts, scans or joins them, and from what is laid on rows by their place
in the batch: random numbers of the batch's shape, a table.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._tracing.id_rules import Carrying, is_cumulative
from fisher_jax._tracing.ids import Carried, Ids, Link, Lost, joined
from fisher_jax._tracing.uses import Data, constant_of
from fisher_jax._tracing.variation import Axes, everywhere, of_value, varied

__all__ = ["SMALL", "Rows", "beside", "decided_by", "either", "handed_on", "rows_of", "strongest"]

_STATISTICS = "for a batch norm, take its running statistics"
_ROOM = "for an expert's dispatch, give each expert room for all tokens"
_KEYS = "draw with a key for each row, an input [rows] that jax.vmap goes over"
_PLACES = "make it an input with one entry for each row"
SMALL = 4096  # a constant whose values are looked at


@dataclasses.dataclass(frozen=True)
class Rows:
    """Whether rows depend on each other.

    Attributes:
        verdict: ``independent``; ``interact``; ``unknown``, where data decide (an expert's dispatch, a gather).
        links: what makes them interact, or may do so, the strongest first: one where other rows count, one where the
            place in the batch alone does (a dropout's mask).
    """

    verdict: str
    links: tuple[Link, ...] = ()


def strongest(*several: Sequence[Link]) -> tuple[Link, ...]:
    """The first link of each kind, one that is certain before others."""
    every = sorted((one for links in several for one in links), key=lambda one: not one.certain)
    found = [next((one for one in every if one.mixes is mixes), None) for mixes in (True, False)]
    return tuple(sorted((one for one in found if one is not None), key=lambda one: not one.certain))


def beside(
    eqn: Any, operands: Sequence[Any], carrying: Sequence[Carrying], loops: int, line: Callable[[Any], str]
) -> list[dict[str, Any]]:
    """``links``, ``varies``, ``drawn`` and ``parts`` of each result of an equation, as fields of `Data`."""
    # Of vectors of indices those components count that say something of their own.
    seen = [y for x in operands for y in (x.parts if isinstance(x, Data) and x.parts and _picks(eqn) else (x,))]
    data = [x for x in seen if isinstance(x, Data)]
    inherited = strongest(*(x.links for x in data))
    if not any(_touched(x) for x in data):
        drawn = next((x.drawn for x in data if x.drawn), "")
        if eqn.primitive.name in ("random_bits", "random_gamma", "rng_bit_generator"):
            drawn = drawn or line(eqn) or eqn.primitive.name
        axes = varied(eqn, [_seen_axes(eqn, i, x, loops) for i, x in enumerate(operands)], loops)
        return [{"varies": one, "drawn": drawn} for one in axes]
    parts = _components(eqn, operands)
    return [
        {"links": strongest(inherited, _new(eqn, operands, carried, gone, output, loops, line)), "parts": parts}
        for output, (carried, gone) in enumerate(carrying)
    ]


def _picks(eqn: Any) -> bool:
    return eqn.primitive.name == "gather"


def _touched(x: Any) -> bool:
    """Whether data went into it, as far as rows matter."""
    return isinstance(x, Data) and (bool(x.links) or any(one.kind == "row" for one in x.ids))


def _axes(x: Any, loops: int) -> Axes:
    if isinstance(x, Data):
        return everywhere(getattr(x.type, "shape", ()), loops) if x.varies is None else x.varies
    return (*(False,) * loops, *everywhere(np.shape(x)))


def _seen_axes(eqn: Any, i: int, x: Any, loops: int) -> Axes:
    """The axes of an operand; indices that are the same for all rows look so by their values alone."""
    known = _value(x) if _picks(eqn) and i and isinstance(x, Data) and not x.drawn else None
    return _axes(x, loops) if known is None else (*(False,) * loops, *of_value(known))


def _components(eqn: Any, operands: Sequence[Any]) -> tuple[Data, ...]:
    """The parts of vectors of indices, put side by side along the last axis."""
    if eqn.primitive.name != "concatenate" or not all(isinstance(x, Data) for x in operands):
        return ()
    shape = eqn.outvars[0].aval.shape
    last = eqn.params["dimension"] == len(shape) - 1 and len(operands) == shape[-1]
    return tuple(operands) if last and not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact) else ()


def _new(
    eqn: Any, operands: Sequence[Any], carried: Carried, gone: tuple, output: int, loops: int, line: Callable
) -> tuple[Link, ...]:
    """The links that an equation makes."""
    own = [one for one in carried if one.kind == "row"]
    axes = {i for one in own if isinstance(one, Ids) for i in one.axes}
    numbers = _are_numbers(eqn, output)
    mixing = _mixing(eqn, operands, own, "row" in gone, axes, numbers, loops)
    place = _by_place(eqn, operands, output, axes, numbers, loops, line)
    if mixing is None:
        return place
    return (Link(eqn.primitive.name, line(eqn), *mixing, _STATISTICS if mixing[1] else _ROOM), *place)


def _mixing(
    eqn: Any,
    operands: Sequence[Any],
    own: Sequence[Ids | Lost],
    gone: bool,
    axes: set[int],
    numbers: bool,
    loops: int,
) -> tuple[str, bool] | None:
    """How an equation mixes rows, and whether for certain."""
    name = eqn.primitive.name
    if gone:
        others = [x for x in operands if not _touched(x)]
        mixes = name != "dot_general" or any(isinstance(x, Data) and x.constant is None for x in others)
        return "goes over rows", numbers and mixes and name in _OVER
    before = [one for x in operands if isinstance(x, Data) for one in x.ids if one.kind == "row"]
    lost = next((one for one in own if isinstance(one, Lost)), None)
    if lost is not None:
        known = any(isinstance(one, Lost) for one in before)
        return None if known else (f"links rows: {lost.reason}", numbers and name in _CERTAIN)
    if len(own) > 1 and not _paired(operands):
        return "joins every row with every other", False
    if is_cumulative(name) and loops + eqn.params["axis"] in axes:
        return "goes from one row to the next", numbers
    return None


# Operations that link rows for certain where they lose them, and where they go over them.
_OVER = {
    "conv_general_dilated", "dot_general", "pmax", "pmin", "psum", "reduce_max", "reduce_min", "reduce_prod",
    "reduce_sum",
}  # fmt: skip
_CERTAIN = {
    "add", "add_any", "atan2", "conv_general_dilated", "div", "fft", "max", "min", "mul", "pow", "reduce_max",
    "reduce_min", "reduce_prod", "reduce_sum", "reduce_window_max", "reduce_window_min", "reduce_window_sum",
    "select_n", "sort", "sub", "top_k",
}  # fmt: skip


def _are_numbers(eqn: Any, output: int) -> bool:
    """Whether an equation is one of real numbers, not of indices, masks and ranks."""
    kinds = [eqn.outvars[output].aval, *(eqn.invars[0].aval for _ in "x" if eqn.primitive.name in ("sort", "top_k"))]
    return all(hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact) for x in kinds)


def _paired(operands: Sequence[Any]) -> bool:
    """Whether an operand is of two rows at once already."""
    kinds = [[one.kind for one in x.ids].count("row") for x in operands if isinstance(x, Data)]
    return max(kinds, default=0) > 1


def _by_place(
    eqn: Any, operands: Sequence[Any], output: int, axes: set[int], numbers: bool, loops: int, line: Callable
) -> tuple[Link, ...]:
    """A link by what no row has brought, and that differs from row to row."""
    nothing = [(False,) * (loops + len(x.type.shape if isinstance(x, Data) else np.shape(x))) for x in operands]
    for i, x in enumerate(operands):
        if (
            not isinstance(x, Data)
            or _touched(x)
            or not axes & _reached(eqn, nothing, i, _axes(x, loops), output, loops)
        ):
            continue
        if x.drawn:
            reason = f"lays random numbers of the batch's shape, drawn by random_bits at {x.drawn}, on rows"
            return (Link(eqn.primitive.name, line(eqn), reason, numbers, _KEYS, False),)
        known = _value(x)
        seen = everywhere(x.type.shape) if known is None else of_value(known)
        if not axes & _reached(eqn, nothing, i, (*(False,) * loops, *seen), output, loops) and known is not None:
            continue
        certain = numbers and (x.constant is None or known is not None)
        reason = "takes for every row what stands at its place in the batch"
        return (Link(eqn.primitive.name, line(eqn), reason, certain, _PLACES, False),)
    return ()


def _reached(eqn: Any, nothing: list[Axes], i: int, own: Axes, output: int, loops: int) -> set[int]:
    axes = varied(eqn, [own if i == j else x for j, x in enumerate(nothing)], loops)[output]
    return {j for j, x in enumerate(axes) if x}


def _value(x: Data) -> np.ndarray | None:
    """The value of a small constant."""
    if math.prod(x.type.shape) > SMALL or jnp.issubdtype(x.type.dtype, jax.dtypes.extended):
        return None
    return constant_of(x)


def either(parts: Sequence[Any], kind: Any, loops: int, eqn: Any, line: Callable) -> Data:
    """What is one of several arrays: of branches, or the state of a loop before and after a round."""
    ids = joined([x.ids if isinstance(x, Data) else () for x in parts], eqn, line)
    data = [x if isinstance(x, Data) else Data(kind, varies=_axes(x, loops)) for x in parts]
    links = strongest(
        *(x.links for x in data), *(_started(a, b, loops, eqn, line) for a, b in itertools.pairwise(data))
    )
    lost = next((one for one in ids if one.kind == "row" and isinstance(one, Lost)), None)
    if lost is not None and not any(one.mixes for one in links):
        links = strongest(
            links, [Link(lost.operation, lost.where, f"links rows: {lost.reason}", False, _STATISTICS)]
        )  # fmt: skip
    if links or any(map(_touched, data)):
        return Data(kind, ids, maker=eqn, links=links)
    axes = tuple(map(any, zip(*(_axes(x, loops) for x in data), strict=True)))
    return Data(kind, ids, maker=eqn, varies=axes, drawn=next((x.drawn for x in data if x.drawn), ""))


def _started(x: Data, other: Data, loops: int, eqn: Any, line: Callable) -> tuple[Link, ...]:
    if _touched(x) == _touched(other):
        return ()
    rows, plain = (x, other) if _touched(x) else (other, x)
    axes = {i for one in rows.ids if isinstance(one, Ids) and one.kind == "row" for i in one.axes}
    if not axes & {i for i, differs in enumerate(_axes(plain, loops)) if differs}:
        return ()
    reason = "starts every row with what stands at its place in the batch"
    return (Link(eqn.primitive.name, line(eqn), reason, plain.constant is None, _PLACES, False),)


def handed_on(x: Data, ids: Carried, eqn: Any) -> tuple[Link, ...]:
    """The links of what a loop hands on: those of its state, and one of its own where it goes from row to row."""
    own = [one for one in ids if isinstance(one, Lost) and one.kind == "row"]
    if not own or any(isinstance(one, Lost) and one.kind == "row" for one in x.ids):
        return x.links
    numbers = bool(jnp.issubdtype(x.type.dtype, jnp.inexact))
    link = Link(own[0].operation, own[0].where, "goes from one row to the next", numbers, _STATISTICS)
    return strongest(x.links, [link])


def decided_by(predicate: Any, eqn: Any, line: Callable) -> tuple[Link, ...]:
    """The links of results that a number decides over, in a branch or a loop, for all rows."""
    if not _touched(predicate) or predicate.links:
        return predicate.links if isinstance(predicate, Data) else ()
    return (Link(eqn.primitive.name, line(eqn), "lets one row decide for all", False, _STATISTICS),)


def rows_of(outputs: Sequence[Data], inputs: Sequence[Data], lead: tuple[int, ...]) -> Rows:
    """The verdict of what a program returns, rows first."""
    if lead[:1] in ((), (1,)):
        return Rows("independent" if lead else "unknown")
    if not any(map(_touched, inputs)):
        reason = "reads no input with a first axis of rows, as its outputs have"
        return Rows("unknown", (Link("the model", "", reason, False, _PLACES),))
    links = strongest(*(_at_the_end(x, lead[0]) for x in outputs))
    verdict = "independent" if not links else "interact" if links[0].certain else "unknown"
    return Rows(verdict, links)


def _at_the_end(x: Data, rows: int) -> tuple[Link, ...]:
    own = [one for one in x.ids if one.kind == "row"]
    if not own:
        if x.links or not (x.type.shape and x.type.shape[0] == rows and _axes(x, 0)[0]):
            return x.links
        reason = "returns for every row what stands at its place in the batch"
        return (Link("the model", "", reason, True, _PLACES, False),)
    if isinstance(own[0], Lost) or (own[0].axes == (0,) and np.array_equal(own[0].values.ravel(), np.arange(rows))):
        return x.links
    order = ", ".join(map(str, own[0].values.ravel()[:8])) + (", ..." if own[0].values.size > 8 else "")
    reason = f"returns rows {order} in place of 0, 1, ..."
    return strongest(x.links, [Link("the model", "", reason, True, "undo the order at the outputs")])

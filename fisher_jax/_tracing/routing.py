"""Which products are of experts: what an expert makes of a token that it was not given is multiplied by zero.

A gate is made of what was ranked (``top_k``, ``sort``, ``argmax``): a mask, an index, a weight that a mask went into.
Where it meets other data, and is one number for several of their entries, these reach no further than it lets them.
A product is routed if it reaches the outputs through gates alone, or if it sums over what gates have let through.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fisher_jax._support.jax_internals import (
    Body,
    branches,
    contraction,
    inside,
    is_literal,
    loop,
    opened,
    repetition,
    walk,
)
from fisher_jax._tracing.id_rules import is_cumulative, is_elementwise, is_layout, is_reduction, moves_nothing
from fisher_jax._tracing.variation import Axes, everywhere, is_followed, varied

__all__ = ["Routed", "routed_equations"]

_RANKS = {"top_k", "approx_top_k", "sort", "argmax", "argmin"}
_LOGIC = {"and", "or", "xor", "not", "eq", "ne", "lt", "le", "gt", "ge"}
_SCATTERS = {"scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul"}
_MADE_OF_GATES = {"dot_general", "concatenate", "pad", "stack", "dynamic_update_slice", *_SCATTERS}


@dataclasses.dataclass(frozen=True)
class Routed:
    """A routed product.

    Attributes:
        outputs: axes of its result along which the gates differ: of tokens, and of experts.
        inputs: of each operand that a gate has gone over the axes that it contracts and the gate differs along;
            ``None`` of others.
        by_output: whether gates go over its result.
    """

    outputs: frozenset[int] = frozenset()
    inputs: tuple[frozenset[int] | None, ...] = (None, None)
    by_output: bool = False


@dataclasses.dataclass(frozen=True)
class _Found:
    """What is known of an array.

    Attributes:
        free: the axes along which it varies, where neither data nor parameters went into it.
        gate: the axes along which it varies, where it is a gate.
        after: the axes along which a gate went over it.
    """

    free: Axes | None = None
    gate: Axes | None = None
    after: Axes | None = None


_DATA = _Found()


def _known(x: Any) -> _Found:
    """What is known of an array, or of a number that is written into the program."""
    return x if isinstance(x, _Found) else _Found(free=everywhere(np.shape(x)))


def _free(atom: Any) -> _Found:
    return _Found(free=everywhere(getattr(atom.aval, "shape", ())))


def routed_equations(traced: Any) -> dict[int, Routed]:
    """Of every routed product the ``id`` of its equation, and what is known of it."""
    body, _ = opened(traced)
    gates = _Gates()
    gates.through(traced, [*map(_free, body.constants), *[_DATA] * len(body.arguments)])
    if not any(gates.cuts.values()):
        return {}
    every, free = _Reach(gates.cuts), _Reach(gates.cuts, stops=True)
    for reach in (every, free):
        reach.back(traced, [frozenset()] * len(body.results))
    found = {key: Routed(axes, by_output=True) for key, axes in every.reached.items() if key not in free.reached}
    for key, inputs in gates.summed.items():
        if any(x is not None for x in inputs):
            found[key] = dataclasses.replace(found.get(key, Routed()), inputs=inputs)
    return found


class _Gates:
    """Forward: where gates meet data.

    Attributes:
        cuts: by the ``id`` of an equation, of each operand that a gate lets through the axes that it differs along.
        summed: of a product, see `Routed.inputs`.
    """

    def __init__(self) -> None:
        self.cuts: dict[int, dict[int, frozenset[int]]] = {}
        self.summed: dict[int, tuple[frozenset[int] | None, ...]] = {}

    def through(self, traced: Any, given: Sequence[_Found]) -> list[_Found]:
        body, _ = opened(traced)
        found = walk(body, given, lambda eqn, values: self._meet(eqn, list(map(_known, values))))
        return list(map(_known, found))

    def _meet(self, eqn: Any, given: list[_Found]) -> list[_Found]:
        if (scan := loop(eqn)) is not None:
            return self._scanned(eqn, scan, given)
        if branches(eqn) is not None or repetition(eqn) is not None:
            return [_DATA] * len(eqn.outvars)
        if (inner := inside(eqn)) is not None:
            return self.through(inner, [*map(_free, opened(inner)[0].constants), *given])
        if all(x.free is not None for x in given):
            return [_Found(free=axes) for axes in _varied(eqn, given, lambda x: x.free)]
        if eqn.primitive.name in _RANKS:
            return [_Found(gate=everywhere(var.aval.shape)) for var in eqn.outvars]
        self._note_sums(eqn, given)
        gates = [i for i, x in enumerate(given) if x.gate is not None]
        data = [i for i, x in enumerate(given) if x.gate is None and x.free is None]
        cut = _cut(eqn, given, gates, data) if gates and data else {}
        before = self.cuts.get(id(eqn))
        self.cuts[id(eqn)] = cut if before is None else {i: x | before[i] for i, x in cut.items() if i in before}
        if gates and not cut and _stays_a_gate(eqn, gates, data):
            return [_Found(gate=axes) for axes in _varied(eqn, given, lambda x: x.free if x.gate is None else x.gate)]
        after = _after(eqn, given, bool(cut))
        return [_DATA] * len(eqn.outvars) if after is None else [_Found(after=axes) for axes in after]

    def _note_sums(self, eqn: Any, given: list[_Found]) -> None:
        if eqn.primitive.name != "dot_general":
            return
        contracted = contraction(eqn.params).contracted
        found = tuple(
            None if x.after is None else frozenset(i for i in axes if x.after[i])
            for x, axes in zip(given, contracted, strict=True)
        )
        pairs = zip(self.summed.get(id(eqn), found), found, strict=True)
        self.summed[id(eqn)] = tuple(None if a is None or b is None else a & b for a, b in pairs)

    def _scanned(self, eqn: Any, scan: Any, given: list[_Found]) -> list[_Found]:
        first, head = scan.num_consts, scan.num_consts + scan.num_carry
        slices = [_Found(*(None if axes is None else axes[1:] for axes in (x.free, x.gate))) for x in given[head:]]
        constants = map(_free, opened(scan.traced)[0].constants)
        outs = self.through(scan.traced, [*constants, *given[:first], *[_DATA] * scan.num_carry, *slices])
        stacked = [_DATA if x.gate is None else _Found(gate=(True, *x.gate)) for x in outs[scan.num_carry :]]
        return [*[_DATA] * scan.num_carry, *stacked]


def _varied(eqn: Any, given: list[_Found], axes_of: Callable[[_Found], Axes | None]) -> list[Axes]:
    shapes = [getattr(atom.aval, "shape", ()) for atom in eqn.invars]
    axes = [everywhere(s) if (own := axes_of(x)) is None else own for x, s in zip(given, shapes, strict=True)]
    return varied(eqn, axes, 0)


def _cut(eqn: Any, given: list[_Found], gates: list[int], data: list[int]) -> dict[int, frozenset[int]]:
    """Operands that a gate lets parts through of, and the axes that it differs along."""
    name = eqn.primitive.name
    if name == "dot_general":
        contracted, batch = contraction(eqn.params)
        (gate,), (i,) = gates, data
        axes: Axes = given[gate].gate or ()
        pairs = [*zip(contracted[i], contracted[gate], strict=True), *zip(batch[i], batch[gate], strict=True)]
        free = any(n > 1 for j, n in enumerate(eqn.invars[i].aval.shape) if j not in (*contracted[i], *batch[i]))
        return {i: frozenset(own for own, other in pairs if axes[other])} if free else {}
    if name in _SCATTERS:
        return {2: frozenset()} if 2 in data and 1 in gates else {}
    by = gates if name == "mul" else [i for i in gates if i == 0] if name == "select_n" else []
    shape = eqn.outvars[0].aval.shape
    whole = [x for x in (given[i].gate for i in by) if x is not None and len(x) == len(shape)]
    if not any(n > 1 and not x for own in whole for n, x in zip(shape, own, strict=True)):
        return {}
    differ = frozenset(i for i in range(len(shape)) if any(x[i] for x in whole))
    return {i: differ for i in data if i not in by}


def _stays_a_gate(eqn: Any, gates: list[int], data: list[int]) -> bool:
    name = eqn.primitive.name
    if name in ("gather", "dynamic_slice"):
        return 0 in gates
    if data:  # probabilities times a mask of the same shape, logits where they are the largest
        return name in _LOGIC or name in ("mul", "select_n") or (name == "div" and 0 in gates)
    return (
        is_elementwise(name) or is_layout(name) or is_reduction(name) or is_cumulative(name) or moves_nothing(name)
        or name in _MADE_OF_GATES
    )  # fmt: skip


def _after(eqn: Any, given: list[_Found], cut: bool) -> list[Axes] | None:
    """Axes along which a gate went over the results; ``None``: over none, or something was added since."""
    own = [x.gate if cut and x.gate is not None else x.after for x in given]
    if all(x is None for x in own) or not _keeps_zeros(eqn, given, own):
        return None
    shapes = [getattr(atom.aval, "shape", ()) for atom in eqn.invars]
    return varied(eqn, [(False,) * len(s) if x is None else x for x, s in zip(own, shapes, strict=True)], 0)


def _keeps_zeros(eqn: Any, given: list[_Found], own: list[Axes | None]) -> bool:
    name = eqn.primitive.name
    if name == "select_n":
        return sum(x.gate is None and x.free is None for x in given[1:]) == 1
    if name == "dot_general":
        return not any(contraction(eqn.params).contracted)
    if name == "div":
        return own[0] is not None
    return name in ("mul", "neg") or (len(own) == 1 and (is_layout(name) or moves_nothing(name)))


class _Reach:
    """Backward: equations whose results reach those of the program.

    Attributes:
        cuts: see `_Gates`; where ``stops``, operands that are cut reach nothing.
        reached: axes of the result of an equation along which gates on the way differ.
    """

    def __init__(self, cuts: dict[int, dict[int, frozenset[int]]], stops: bool = False) -> None:
        self.cuts, self.stops = cuts, stops
        self.reached: dict[int, frozenset[int]] = {}

    def back(self, traced: Any, wanted: Sequence[frozenset[int] | None]) -> list[frozenset[int] | None]:
        """Of each argument the axes along which gates differ on its way to wanted results; ``None``: no way."""
        body, _ = opened(traced)
        live: dict[Any, frozenset[int]] = {}

        def add(atoms: Sequence[Any], found: Sequence[frozenset[int] | None]) -> None:
            for atom, axes in zip(atoms, found, strict=True):
                if axes is not None and not is_literal(atom):
                    live[atom] = live.get(atom, frozenset()) | axes

        add(body.results, wanted)
        for eqn in reversed(_equations(body)):
            outs = [live.get(var) for var in eqn.outvars]
            known = [x for x in outs if x is not None]
            if known:
                self.reached[id(eqn)] = self.reached.get(id(eqn), frozenset()) | known[0]
                add(eqn.invars, self._operands(eqn, outs))
        return [live.get(var) for var in body.arguments]

    def _operands(self, eqn: Any, outs: list[frozenset[int] | None]) -> list[frozenset[int] | None]:
        if (scan := loop(eqn)) is not None:
            return self._scanned(scan, outs)
        every: list[frozenset[int] | None] = [frozenset()] * len(eqn.invars)
        parts = branches(eqn)
        if parts is None and (repeated := repetition(eqn)) is not None:
            parts = (repeated.condition, repeated.body)
        if parts is not None:
            for part in parts:
                self.back(part, [frozenset()] * len(opened(part)[0].results))
            return every
        if (inner := inside(eqn)) is not None:
            return self.back(inner, outs)
        cut = self.cuts.get(id(eqn), {})
        if self.stops:
            return [None if i in cut else x for i, x in enumerate(every)]
        return [_before(eqn, i, outs) | cut.get(i, frozenset()) for i in range(len(eqn.invars))]

    def _scanned(self, scan: Any, outs: list[frozenset[int] | None]) -> list[frozenset[int] | None]:
        first, head = scan.num_consts, scan.num_consts + scan.num_carry
        carried, stacked = outs[: scan.num_carry], [_moved(x, -1) for x in outs[scan.num_carry :]]
        while True:
            found = self.back(scan.traced, [*carried, *stacked])
            more = [_either(a, b) for a, b in zip(carried, found[first:head], strict=True)]
            if more == carried:
                return [*found[:head], *(_moved(x, 1) for x in found[head:])]
            carried = more


def _equations(body: Body) -> list[Any]:
    """In order, without what they do."""
    found: list[Any] = []

    def noted(eqn: Any, values: list) -> list:
        found.append(eqn)
        return [None] * len(eqn.outvars)

    walk(body, [None] * len(body.inputs), noted)
    return found


def _moved(axes: frozenset[int] | None, by: int) -> frozenset[int] | None:
    return None if axes is None else frozenset(i + by for i in axes if i + by >= 0)


def _either(a: frozenset[int] | None, b: frozenset[int] | None) -> frozenset[int] | None:
    return b if a is None else a if b is None else a | b


def _before(eqn: Any, operand: int, outs: list[frozenset[int] | None]) -> frozenset[int]:
    """The axes of an operand that some axes of the results come from."""
    shapes = [getattr(atom.aval, "shape", ()) for atom in eqn.invars]
    if not any(outs) or not shapes[operand] or not is_followed(eqn.primitive.name):
        return frozenset()
    nothing = [(False,) * len(s) for s in shapes]
    # An axis that the operation makes, as where it puts parts side by side, is of none of the operand's.
    made = varied(eqn, nothing, 0)
    found = set()
    for axis, n in enumerate(shapes[operand]):
        if n == 1:
            continue
        own = tuple(i == axis for i in range(len(shapes[operand])))
        results = varied(eqn, [own if i == operand else x for i, x in enumerate(nothing)], 0)
        for axes, after, before in zip(outs, results, made, strict=True):
            if axes and any(x and not y and i in axes for i, (x, y) in enumerate(zip(after, before, strict=True))):
                found.add(axis)
    return frozenset(found)

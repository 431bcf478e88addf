"""Which products of parameters are the queries, keys, values and outputs of an attention, and of which head.

The output units of every product are followed through the program, as ids are. Two of them that are mixed (the
halves of a head by rotary positions) belong together from then on. Where units of two products are contracted with
each other, queries meet keys; where the result is contracted along the positions of one side, that side were the keys
and the other factor holds the values; the next product of a parameter is the output.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fisher_jax._support.jax_internals import contraction, convolution
from fisher_jax._tracing.dense import operand_axes
from fisher_jax._tracing.id_rules import extended, moved_through
from fisher_jax._tracing.ids import NOBODY, Carried, Ids, along, compressed
from fisher_jax._tracing.uses import Part, Spec, Use

__all__ = ["Attention"]

Units = tuple[Ids, ...]  # kinds are tuples, the first of which is one of these:
_UNIT = "unit"  # (use): output units of a product
_CLASS = "class"  # (meeting, side, use): the same after queries met keys
_SIDE = "side"  # (meeting, side): positions of queries, or of keys
_HEAD = "head"  # (attended): query units that the values were weighted by
_SUMS = ("add", "add_any", "sub", "concatenate", "stack")


@dataclasses.dataclass(frozen=True, eq=False)
class _Meeting:
    """A product of queries with keys: of each side the units that met, by use, over the axes of the result."""

    where: str
    sides: tuple[dict[int, np.ndarray], dict[int, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Attended:
    """Values weighted by the result of a meeting: its side of keys, and pairs of (unit of a value, unit of a key)."""

    meeting: int
    keys: int
    pairs: dict[int, np.ndarray]


@dataclasses.dataclass
class Attention:
    """What is known of units so far.

    Attributes:
        owner: of the units of each use, the first one that each belongs together with.
        meetings, attended: see there.
        outputs: of a use, what it contracts: the attended values and the query units along the axes of its operand.
        biases: of a use, the products that it is added to, and their units along the axes of its operand.
        follows: of a use, the products that it contracts, or is added to.
    """

    owner: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    meetings: list[_Meeting] = dataclasses.field(default_factory=list)
    attended: list[_Attended] = dataclasses.field(default_factory=list)
    outputs: dict[int, dict[int, Ids]] = dataclasses.field(default_factory=dict)
    biases: dict[int, dict[int, Ids]] = dataclasses.field(default_factory=dict)
    follows: dict[int, set[int]] = dataclasses.field(default_factory=dict)

    def copy(self) -> "Attention":
        parts = {name: value.copy() for name, value in vars(self).items()}
        parts["owner"] = {use: x.copy() for use, x in self.owner.items()}
        return Attention(**parts)

    def through(
        self, eqn: Any, given: Sequence[Units], places: Sequence[Carried | None], loops: int, constant: Callable,
        line: Callable,
    ) -> list[Units]:  # fmt: skip
        """Units of the results of an equation.

        Args:
            places: of each operand the ids of rows and positions; ``None`` of a constant or a parameter.
        """
        if not any(given):
            return [() for _ in eqn.outvars]
        if eqn.primitive.name == "dot_general":
            return [self._product(eqn, given, places, loops, constant, line)]
        data = [ids is not None for ids in places]
        results = []
        for output in range(len(eqn.outvars)):
            moved = moved_through(eqn, given, output, loops, constant, line)
            if eqn.primitive.name in _SUMS:
                # What is attended ends where something else is added to it.
                common = [{x.kind for x in own} for own, counts in zip(moved, data, strict=True) if counts]
                moved = [tuple(x for x in own if x.kind[0] != _HEAD or all(x.kind in kinds for kinds in common))
                         for own in moved]  # fmt: skip
            results.append(_known(extended(eqn, self._joined(moved), loops)))
        return results

    def _joined(self, moved: Sequence[Carried]) -> Units:
        found: dict[Any, np.ndarray | None] = {}
        for one in (x for own in moved for x in own if isinstance(x, Ids)):
            values = found.get(one.kind, one.values) if one.kind in found else one.values
            if values is None or values is one.values or np.array_equal(values, one.values):
                found[one.kind] = values
                continue
            a, b = np.broadcast_arrays(values, one.values)
            both = (a != NOBODY) & (b != NOBODY)
            if (a[both] != b[both]).any():
                if one.kind[0] != _UNIT:
                    found[one.kind] = None
                    continue
                self._together(one.kind[1], a[both], b[both])
            found[one.kind] = compressed(np.where(a == NOBODY, b, a))
        return tuple(Ids(kind, values) for kind, values in found.items() if values is not None)

    def _together(self, use: int, a: np.ndarray, b: np.ndarray) -> None:
        """Units of a use, pair by pair, belong together."""
        owner = self.owner[use]
        while True:
            first, second = owner[a], owner[b]
            if (first == second).all():
                break
            low = np.minimum(first, second)
            np.minimum.at(owner, first, low)
            np.minimum.at(owner, second, low)
            while not np.array_equal(owner, owner[owner]):
                owner = owner[owner]
        self.owner[use] = owner

    def _product(
        self, eqn: Any, given: Sequence[Units], places: Sequence[Carried | None], loops: int, constant: Callable,
        line: Callable,
    ) -> Units:  # fmt: skip
        """A product of data: queries meet keys, values are weighted, or anything else."""
        contracted, batch = contraction(eqn.params)
        gone = [[loops + i for i in axes] for axes in contracted]
        keys = [x for i, own in enumerate(given) for x in own if x.kind[0] == _SIDE and _along(x, gone[i])]
        features = [_features(places[i], gone[i]) for i in (0, 1)]
        met = [[x.kind for x in own if x.kind[0] == _UNIT and (features[i] or _along(x, gone[i]))]
               for i, own in enumerate(given)]  # fmt: skip
        moved = moved_through(
            eqn, [tuple(self._without(x, gone[i]) for x in own) for i, own in enumerate(given)], 0, loops, constant,
            line,
        )  # fmt: skip
        if keys:
            return tuple(x for one in keys for x in self._weighted(one, moved))
        if not all(met):
            return self._joined(moved)
        number = len(self.meetings)
        sides = [{x.kind[1]: x for x in _known(own) if x.kind in met[i]} for i, own in enumerate(moved)]
        result, free, found = eqn.outvars[0].aval.shape, len(batch[0]), []
        for side, own in enumerate(sides):
            count = len(eqn.invars[side].aval.shape) - len(batch[side]) - len(contracted[side])
            axes = [
                i for i in range(free, free + count) if not any(x.values.shape[loops + i] > 1 for x in own.values())
            ]
            free += count
            order = np.arange(int(np.prod([result[i] for i in axes]))).reshape([result[i] for i in axes])
            found.append(along((_SIDE, number, side), order, axes, len(result), loops))
            found += [Ids((_CLASS, number, side, use), x.values) for use, x in own.items()]
        by_use = [{use: x.values for use, x in own.items()} for own in sides]
        self.meetings.append(_Meeting(line(eqn), (by_use[0], by_use[1])))
        return tuple(found)

    def _without(self, x: Ids, gone: Sequence[int]) -> Ids:
        """Units of one kind along the axes that stay; those along the others belong together."""
        first = x.values.max(tuple(gone), keepdims=True)  # any of them but `NOBODY`
        if x.kind[0] == _UNIT and first.shape != x.values.shape:
            a, b = np.broadcast_arrays(first, x.values)
            real = (a != NOBODY) & (b != NOBODY)
            self._together(x.kind[1], a[real], b[real])
        return Ids(x.kind, first)

    def _weighted(self, keys: Ids, moved: Sequence[Carried]) -> Units:
        _, meeting, side = keys.kind
        own = [x for part in moved for x in _known(part)]
        classes = {s: [x for x in own if x.kind[:3] == (_CLASS, meeting, s)] for s in (0, 1)}
        if not classes[0] or not classes[1]:
            return ()
        pairs = {}
        for x in own:
            if x.kind[0] == _UNIT:
                both = np.broadcast_arrays(x.values, classes[side][0].values)
                pairs[x.kind[1]] = np.unique(np.stack([y.ravel() for y in both], 1), axis=0)
        self.attended.append(_Attended(meeting, side, pairs))
        return (Ids((_HEAD, len(self.attended) - 1), classes[1 - side][0].values),)

    def made(self, use: Use, met: Units, shape: tuple[int, ...], loops: int) -> Units:
        """Units of the output, of this shape, of a product or convolution that met these."""
        inside, axes = _inputs(use), _unit_axes(use, len(shape))
        beside = (
            [i for i in range(len(met[0].values.shape) - loops) if i not in [a for a, _ in inside]] if met else []
        )
        for x in met:
            if x.kind[0] == _HEAD and not _along(x, [loops + i for i in beside]):
                self.outputs.setdefault(use.order, {})[x.kind[1]] = x
            elif x.kind[0] == _UNIT and _along(x, [loops + i for i, _ in inside]):
                self.follows.setdefault(use.order, set()).add(x.kind[1])
        sizes = [shape[i] for i in axes]
        self.owner[use.order] = np.arange(int(np.prod(sizes)))
        return (along((_UNIT, use.order), np.arange(int(np.prod(sizes))).reshape(sizes), axes, len(shape), loops),)

    def added(self, use: Use, met: Units) -> None:
        """A bias was added to these."""
        self.biases[use.order] = {x.kind[1]: x for x in met if x.kind[0] == _UNIT}
        self.follows[use.order] = set(self.biases[use.order])

    def parts(self, specs: Sequence[Spec]) -> dict[int, tuple[Part, ...]]:
        """What every use is in attentions, by its order."""
        uses = {spec.use.order: spec.use for spec in specs}
        loops = {spec.use.order: len(spec.use.loops) for spec in specs}
        found: dict[int, list[Part]] = {}
        for number, one in enumerate(self.attended):
            meeting = self.meetings[one.meeting]
            labels = {s: {u: self._labels(u, x) for u, x in meeting.sides[s].items()} for s in (0, 1)}
            placed = [("query", *x) for x in labels[1 - one.keys].items()]
            placed += [("key", *x) for x in labels[one.keys].items()]
            key = next(iter(labels[one.keys]))
            placed += [("value", u, _by_key(pairs, labels[one.keys][key], len(self.owner[u])))
                       for u, pairs in one.pairs.items()]  # fmt: skip
            for name, use, heads in placed:
                count = int(heads.max(initial=-1)) + 1
                for axes, values in self._places(name, use, heads, uses, loops):
                    order, own = axes
                    found.setdefault(order, []).append(Part(name, own, values, count, meeting.where, number))
            query = labels[1 - one.keys][next(iter(labels[1 - one.keys]))]
            for order, met in self.outputs.items():
                if number in met and order in uses:
                    inside = _inputs(uses[order])
                    values = _taken(query, met[number].values, loops[order], [i for i, _ in inside])
                    shape = [uses[order].operand.shape[i] for _, i in inside]
                    part = Part("output", tuple(i for _, i in inside), np.broadcast_to(values, shape),
                                int(query.max(initial=-1)) + 1, meeting.where, number)  # fmt: skip
                    found.setdefault(order, []).append(part)
        return {order: tuple(parts) for order, parts in found.items()}

    def _labels(self, use: int, values: np.ndarray) -> np.ndarray:
        """The head of every unit of a use: the place, along the meeting's axes, of those that it belongs together
        with."""
        owner = self.owner[use]
        flat = values.ravel()
        flat = owner[flat[flat != NOBODY]]
        kept, first = np.unique(flat, return_index=True)
        heads = np.full(len(owner), -1)
        heads[kept[np.argsort(first)]] = np.arange(len(kept))
        return heads[owner]

    def _places(self, name: str, use: int, heads: np.ndarray, uses: dict, loops: dict) -> Iterable:
        """Where the units of a product lie in its operand, and in those of its biases."""
        if use in uses:
            axes = _operand_units(uses[use])
            yield (use, axes), heads.reshape([uses[use].operand.shape[i] for i in axes])
        for order, met in self.biases.items():
            if use in met and order in uses:
                shape = uses[order].operand.shape
                varying = [i for i in range(len(shape)) if met[use].values.shape[loops[order] + i] > 1]
                values = _taken(heads, met[use].values, loops[order], varying)
                yield (order, tuple(varying)), np.broadcast_to(values, [shape[i] for i in varying])


def _known(carried: Carried) -> Units:
    return tuple(x for x in carried if isinstance(x, Ids))


def _features(ids: Carried | None, axes: Sequence[int]) -> bool:
    """Whether it is known that no rows or positions lie along some axes."""
    return ids is not None and any(isinstance(x, Ids) for x in ids) and all(
        isinstance(x, Ids) and not _along(x, axes) for x in ids
    )  # fmt: skip


def _along(x: Ids, axes: Sequence[int]) -> bool:
    return any(x.values.shape[i] > 1 for i in axes)


def _taken(heads: np.ndarray, values: np.ndarray, loops: int, axes: Sequence[int]) -> np.ndarray:
    """Heads of the units that lie along some axes, in the order of these."""
    rest = [i for i in range(values.ndim) if i - loops not in axes]
    first = values.transpose([*rest, *(loops + i for i in axes)])[(0,) * len(rest)]
    return np.where(first == NOBODY, -1, heads[first])


def _by_key(pairs: np.ndarray, heads: np.ndarray, size: int) -> np.ndarray:
    """The head of every unit of a value: units that are weighted by the same keys have one."""
    number = int(heads.max(initial=-1)) + 1
    by = np.zeros((size, number), bool)
    real = (pairs != NOBODY).all(1)
    by[pairs[real, 0], heads[pairs[real, 1]]] = True
    _, first, inverse = np.unique(by, axis=0, return_index=True, return_inverse=True)
    used = [i for i in np.argsort(by[first].argmax(1), kind="stable") if by[first[i]].any()]
    label = np.full(len(first), -1)
    label[used] = np.arange(len(used))
    return label[inverse.ravel()]


def _inputs(use: Use) -> list[tuple[int, int]]:
    """Pairs of an axis of what a use meets and the axis of its operand that it is contracted with, or kept beside."""
    if use.kind == "conv":
        conv = convolution(use.options)
        return [(conv.inputs[1], conv.kernel[1])] if conv.groups == 1 else []
    contracted, batch = contraction(use.options)
    return [*zip(batch[1 - use.index], batch[use.index], strict=True),
            *zip(contracted[1 - use.index], contracted[use.index], strict=True)]  # fmt: skip


def _operand_units(use: Use) -> tuple[int, ...]:
    """Axes of the operand that are output units, or kept apart, in the order of `_unit_axes`."""
    if use.kind == "conv":
        return (convolution(use.options).kernel[0],)
    apart, _, outputs = operand_axes(use)
    return (*apart, *outputs)


def _unit_axes(use: Use, ndim: int) -> tuple[int, ...]:
    """Axes of the output along which its units lie."""
    if use.kind == "conv":
        return (convolution(use.options).outputs[1],)
    apart, _, outputs = operand_axes(use)
    first = len(apart) if use.index == 0 else ndim - len(outputs)
    return (*range(len(apart)), *range(first, first + len(outputs)))

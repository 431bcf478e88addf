"""What a program does with its parameters, and whose row and position every array belongs to, without running it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fisher_jax._support.jax_internals import (
    Loop,
    Remat,
    Repetition,
    bind,
    branches,
    brought_out,
    contraction,
    convolution,
    inside,
    lookup,
    loop,
    opened,
    repetition,
    user_line,
)
from fisher_jax._tracing import loops as loops_room
from fisher_jax._tracing import rows
from fisher_jax._tracing.attention import Attention
from fisher_jax._tracing.dense import token_axes
from fisher_jax._tracing.id_rules import (
    Carrying,
    carried_through,
    is_elementwise,
    is_layout,
    keeps_entries,
    moved_through,
)
from fisher_jax._tracing.ids import NOBODY, Carried, Ids, Lost, along, joined
from fisher_jax._tracing.index_rules import as_slice
from fisher_jax._tracing.made import Made, followed
from fisher_jax._tracing.places import input_token_axes
from fisher_jax._tracing.tracing import evaluate
from fisher_jax._tracing.uses import Data, Experts, Spec, Use, View, constant_of, plain, shape_of, signature
from fisher_jax._tracing.variation import everywhere

__all__ = ["Findings", "Survey"]

_PASSES = 8  # through the body of a loop, until its carry belongs to the same rows and positions as before


@dataclasses.dataclass
class Findings:
    """What a survey found beside the uses.

    Attributes:
        number: of uses so far.
        biases: leaf of a bias, by the leaf of the kernel to whose output it is added.
        learned: ids of the tokens of a use that has none of its own, from what its output is added to; by its order.
        attention: what the products of parameters are in attentions.
        tokens: number of the tokens of a product, by its order.
        equations: ``id`` of the equation of every use, by its order.
    """

    number: int = 0
    biases: dict[int, int] = dataclasses.field(default_factory=dict)
    learned: dict[int, Carried] = dataclasses.field(default_factory=dict)
    attention: Attention = dataclasses.field(default_factory=Attention)
    tokens: dict[int, int] = dataclasses.field(default_factory=dict)
    equations: dict[int, int] = dataclasses.field(default_factory=dict)

    def copy(self) -> "Findings":
        return Findings(
            self.number, self.biases.copy(), self.learned.copy(), self.attention.copy(), self.tokens.copy(),
            self.equations.copy(),
        )  # fmt: skip


@dataclasses.dataclass
class Survey:
    """Notes every use of a parameter; arrays are `Data`.

    Attributes:
        loops: number of loops around this part of the program.
        findings: of the whole program.
        around: the line of the call around this part.
        own: uses in this part, in program order; those of loops and rematerialised parts are in ``parts``.
        specs: all uses, those of parts among them.
        met: the operand that is a parameter, while the result of its use is asked for.
        lookups: of every lookup in a parameter in this part, in program order, what does the same without one.
    """

    loops: int = 0
    findings: Findings = dataclasses.field(default_factory=Findings)
    around: str = ""
    own: list[Spec] = dataclasses.field(default_factory=list)
    parts: list["Survey"] = dataclasses.field(default_factory=list)
    specs: list[Spec] = dataclasses.field(default_factory=list)
    met: int | None = None
    lookups: list[Any] = dataclasses.field(default_factory=list)

    def line(self, eqn: Any) -> str:
        """Where an equation stands; functions of JAX stand where they are called."""
        return user_line(eqn) or self.around

    def inside(self, eqn: Any, loops: int = 0) -> "Survey":
        """A survey of a part of the program."""
        return Survey(self.loops + loops, self.findings, self.line(eqn))

    def constant(self, value: Any) -> Data:
        kind = jax.typeof(value)
        axes = (*(False,) * self.loops, *everywhere(kind.shape))
        return Data(kind, constant=lambda: value, varies=axes)

    def bind(self, eqn: Any, values: list) -> list:
        """Types of the results of an equation, their ids, and the product that they come from."""
        if (scan := loop(eqn)) is not None:
            return self._scanned(eqn, scan, values)[0]
        if (parts := branches(eqn)) is not None:
            return self._either(eqn, parts, values)
        if (repeated := repetition(eqn)) is not None:
            return self._repeated(eqn, repeated, values)
        if (inner := inside(eqn)) is not None:
            return list(map(plain, evaluate(inner, values, self.inside(eqn))))
        operands = [plain(v) for v in values]
        carried = carried_through(
            eqn, [x.ids if isinstance(x, Data) else () for x in operands], self.loops,
            _known(operands), self.line,
        )  # fmt: skip
        beside = rows.beside(eqn, operands, carried, self.loops, self.line)
        fixed = not eqn.effects and all(not isinstance(x, Data) or x.constant is not None for x in operands)
        value = _once(functools.partial(_computed, eqn, operands)) if fixed else None
        made, units, tokens = (
            self._made(eqn, operands, carried),
            self._units(eqn, operands),
            self._tokens(eqn, operands),
        )
        return [
            Data(
                var.aval,
                one.ids,
                made[i],
                None if value is None else functools.partial(_item, value, i),
                eqn,
                units[i],
                tokens[i],
                **more,
            )
            for i, (var, one, more) in enumerate(zip(eqn.outvars, carried, beside, strict=True))
        ]

    def instead(self, eqn: Any, values: list) -> Any:
        self.lookups.append(as_slice(eqn, _known(list(map(plain, values)))))
        return self.lookups[-1]

    def _tokens(self, eqn: Any, operands: list) -> list[Carried]:
        """Tokens of the products that each result comes from, entry by entry."""
        given = [x.tokens if isinstance(x, Data) else () for x in operands]
        if not any(given) or not keeps_entries(eqn.primitive.name):
            return [() for _ in eqn.outvars]
        constant = _known(operands)
        return [
            joined(moved_through(eqn, given, i, self.loops, constant, self.line), eqn, self.line)
            for i in range(len(eqn.outvars))
        ]

    def _units(self, eqn: Any, operands: list) -> list[tuple[Ids, ...]]:
        """Of which products the results of an equation are made; a product of a parameter is one of its own."""
        if self.met is not None and eqn.primitive.name in ("dot_general", "gather", "conv_general_dilated"):
            return [()]
        given = [x.units if isinstance(x, Data) else () for x in operands]
        data = [x.ids if isinstance(x, Data) and x.constant is None and i != self.met else None
                for i, x in enumerate(operands)]  # fmt: skip
        return self.findings.attention.through(eqn, given, data, self.loops, _known(operands), self.line)

    def use(self, view: View, kind: str, eqn: Any, index: int, output: Callable, apply: Any, inputs: tuple) -> Data:
        self.met = index
        found: Data = output()
        self.met = None
        whose = _whose(kind, found, inputs)
        use = _facts(view, kind, eqn, index, apply, self.findings.number, whose, self.around)
        if inputs and all(x.varies is not None for x in inputs):  # no data went into it
            use = dataclasses.replace(use, same_for_all=True)
        self.findings.equations[use.order] = id(eqn)
        self.findings.number += 1
        spec = Spec(view.leaf, use, brought_out(shape_of(found)), tuple(brought_out(shape_of(x)) for x in inputs))
        self.own.append(spec)
        self.specs.append(spec)
        if kind in ("dense", "embedding", "conv"):
            sizes = found.type.shape
            places = tuple(along(i, np.arange(n), [i], len(sizes), self.loops) for i, n in enumerate(sizes))
            met = len(sizes if kind == "conv" else inputs[0].type.shape)
            units = (
                ()
                if kind == "embedding"
                else self.findings.attention.made(use, _units_of(inputs[0]), sizes, self.loops)
            )
            product = Made(view.leaf, use, places, sizes, met)
            tokens = self._own_tokens(view.leaf, use, sizes)
            return dataclasses.replace(found, made=product, units=units, tokens=tokens)
        if kind == "ragged":
            return found
        if kind == "bias" and inputs:
            self.findings.attention.added(use, _units_of(inputs[0]))
        made = next((x.made for x in inputs if isinstance(x, Data) and x.made is not None), None)
        if made is None or kind == "generic":
            return found
        first = made.leaf not in self.findings.biases
        if kind == "bias" and eqn.primitive.name == "add" and not made.after and first:
            self.findings.biases[made.leaf] = view.leaf
            return dataclasses.replace(found, made=dataclasses.replace(made, bias=view.leaf))
        other = made.other or eqn.primitive.name
        return dataclasses.replace(found, made=dataclasses.replace(made, after=True, other=other))

    def beside(self, view: View, eqn: Any, values: list) -> Data:
        """A learned token is of the rows of what it is laid beside, and of no position."""
        (one,) = carried_through(eqn, [_ids_of(plain(x)) for x in values], self.loops, lambda *_: None, self.line)
        axis = self.loops + int(eqn.params["dimension"])
        own = tuple(x for x in one.ids if x.kind == "row" and (isinstance(x, Lost) or x.values.shape[axis] == 1))
        return Data(view.value.type, own)

    def _own_tokens(self, leaf: int, use: Use, sizes: tuple[int, ...]) -> Carried:
        """Of a product the token that each of its entries belongs to."""
        if use.kind == "embedding" or "stacked" in use.loops:
            return ()
        axes = token_axes(use, len(sizes))
        values = np.arange(math.prod(sizes[i] for i in axes)).reshape([sizes[i] for i in axes])
        self.findings.tokens[use.order] = values.size
        return (along((leaf, use.order), values, axes, len(sizes), self.loops),)

    def generic(self, x: Any, eqn: Any) -> Any:
        return self.use(x, "generic", eqn, 0, lambda: x.value, None, ()) if isinstance(x, View) else plain(x)

    def remat(self, eqn: Any, remat: Remat, values: list) -> list:
        part = self.inside(eqn)
        outs = [part.generic(v, eqn) for v in evaluate(remat.traced, values, part)]
        self.parts.append(part)
        self.specs += part.specs
        return outs

    def scan(self, eqn: Any, scan: Loop, values: list) -> list:
        outs, part = self._scanned(eqn, scan, values)
        self.parts.append(part)
        self.specs += [spec.stacked(scan.length) for spec in part.specs]
        return outs

    def _scanned(self, eqn: Any, scan: Loop, values: list) -> tuple[list[Data], "Survey"]:
        """A loop: its iterations are an axis of ids more. What is carried must belong to the same rows after it."""
        first, head = scan.num_consts, scan.num_consts + scan.num_carry
        start = [self.generic(v, eqn) for v in values[first:head]]
        body, _ = opened(scan.traced)
        types = [var.aval for var in body.arguments]
        consts = [
            loops_room.entered(v, t, "shared", self.loops) for v, t in zip(values[:first], types[:first], strict=True)
        ]
        xs = [
            loops_room.entered(v, t, "stacked", self.loops) for v, t in zip(values[head:], types[head:], strict=True)
        ]
        part: Survey = self
        outs: list[Data] = []

        def once(carried: list[Data]) -> list[Data]:
            nonlocal part, outs
            part = self.inside(eqn, 1)
            part.findings = self.findings.copy()
            outs = [
                loops_room.as_data(part.generic(v, eqn))
                for v in evaluate(scan.traced, [*consts, *carried, *xs], part)
            ]
            return [self._handed_on(eqn, x) for x in outs[: scan.num_carry]]

        begun = [loops_room.begun(x, t, self.loops) for x, t in zip(start, types[first:head], strict=True)]
        carried = self._settled(eqn, begun, once, self.loops + 1)
        vars(self.findings).update(vars(part.findings))
        stacked = outs[scan.num_carry :]
        found = [*(loops_room.after_loop(x, self.loops) for x in carried), *stacked]
        made = [
            *[None] * scan.num_carry,
            *(loops_room.made_in_each(x.made, scan.length, self.loops) for x in stacked),
        ]
        tokens = [() if i < scan.num_carry else self._tokens_of_iterations(x, scan) for i, x in enumerate(outs)]
        for order in {one.kind[1] for own in tokens for one in own}:
            self.findings.tokens[order] *= scan.length
        results = [
            dataclasses.replace(loops_room.renewed(x, var.aval, eqn, one), tokens=own)
            for var, x, one, own in zip(eqn.outvars, found, made, tokens, strict=True)
        ]
        return results, part

    def _handed_on(self, eqn: Any, x: Data) -> Data:
        ids = loops_room.kept_between(x.ids, self.loops, eqn, self.line)
        axes = None if x.varies is None else (*x.varies[: self.loops], True, *x.varies[self.loops + 1 :])
        return dataclasses.replace(x, ids=ids, links=rows.handed_on(x, ids, eqn), varies=axes)

    def _tokens_of_iterations(self, x: Any, scan: Loop) -> Carried:
        """Tokens of what a loop stacks: those of one iteration after those of the other."""
        found: list[Ids | Lost] = []
        for one in x.tokens if isinstance(x, Data) else ():
            if isinstance(one, Ids):
                shape = [scan.length if i == self.loops else 1 for i in range(one.values.ndim)]
                first = np.arange(scan.length).reshape(shape) * self.findings.tokens[one.kind[1]]
                one = Ids(one.kind, np.where(one.values == NOBODY, NOBODY, one.values + first).astype(np.int32))
            found.append(one)
        return tuple(found)

    def _either(self, eqn: Any, parts: Sequence[Any], values: list) -> list[Data]:
        outs = [list(map(plain, evaluate(part, values[1:], self.inside(eqn)))) for part in parts]
        decided = rows.decided_by(plain(values[0]), eqn, self.line)
        found = [
            rows.either(same, var.aval, self.loops, eqn, self.line)
            for var, *same in zip(eqn.outvars, *outs, strict=True)
        ]
        return [loops_room.linked(x, decided) for x in found]

    def _repeated(self, eqn: Any, repeats: Repetition, values: list) -> list[Data]:
        """A loop without end: what it carries must belong to the same rows and positions in every round."""
        split = repeats.condition_constants, repeats.condition_constants + repeats.constants
        asked, consts, start = values[: split[0]], values[split[0] : split[1]], values[split[1] :]

        def once(carried: list[Data]) -> list[Data]:
            (go_on,) = evaluate(repeats.condition, [*asked, *carried], self.inside(eqn))
            decided = rows.decided_by(plain(go_on), eqn, self.line)
            outs = evaluate(repeats.body, [*consts, *carried], self.inside(eqn))
            return [loops_room.linked(loops_room.as_data(plain(x)), decided) for x in outs]

        carried = self._settled(eqn, [loops_room.as_data(plain(x)) for x in start], once, self.loops)
        return [loops_room.renewed(x, var.aval, eqn) for var, x in zip(eqn.outvars, carried, strict=True)]

    def _settled(self, eqn: Any, carried: list[Data], once: Callable, loops: int) -> list[Data]:
        """What one round of a loop leaves as it is, from what it starts with; else ids are lost."""
        for attempt in range(_PASSES):
            pairs = zip(carried, once(carried), strict=True)
            new = [rows.either((a, b), a.type, loops, eqn, self.line) for a, b in pairs]
            if attempt == _PASSES - 2:
                new = [
                    rows.either((x,), x.type, loops, eqn, self.line)
                    for x in (
                        dataclasses.replace(b, ids=loops_room.unstable(a.ids, b.ids, eqn, self.line))
                        for a, b in zip(carried, new, strict=True)
                    )
                ]
            if all(map(loops_room.same, carried, new)):
                break
            carried = new
        return carried

    def _made(self, eqn: Any, operands: list, carried: list[Carrying]) -> list[Made | None]:
        """The product that each result comes from, entry by entry."""
        nothing: list[Made | None] = [None] * len(eqn.outvars)
        owners = [i for i, x in enumerate(operands) if isinstance(x, Data) and x.made is not None]
        if not owners:
            return nothing
        name = eqn.primitive.name
        if is_elementwise(name):
            shape = eqn.outvars[0].aval.shape
            for i in owners:
                self._learn(operands[i].made, carried[0].ids)
            owners = [i for i in owners if operands[i].type.shape == shape]
            if len(owners) != 1:
                return nothing
            (i,) = owners
            return [followed(operands[i].made, name, [x for j, x in enumerate(operands) if j != i], i)]
        made = operands[owners[0]].made
        parts = name == "concatenate" and len(owners) == len(operands)
        if (parts and all(x.made.same(made) for x in operands)) or (is_layout(name) and len(owners) == 1):
            given = [x.made.axes if j in owners else () for j, x in enumerate(operands)]
            moved = carried_through(eqn, given, self.loops, _known(operands), self.line)
            return [
                dataclasses.replace(made, axes=axes)
                if len(axes) == len(made.axes) and not any(isinstance(x, Lost) for x in axes)
                else None
                for axes, _ in moved
            ]
        return nothing

    def _learn(self, made: Made, around: Carried) -> None:
        """Ids for the tokens of a use without ids, from an array whose entries its output is joined to."""
        if made.loops:
            return
        own = {one.kind for one in (*made.use.ids, *self.findings.learned.get(made.use.order, ()))}
        for one in around:
            if one.kind in own or isinstance(one, Lost) or len([x for x in around if x.kind == one.kind]) > 1:
                continue
            places = [x.axes for x in made.axes]
            identity = all(
                len(a) == 1 and (np.squeeze(x.values) == np.arange(x.values.size)).all() if a else True
                for x, a in zip(made.axes, places, strict=True)
            )
            tokens = token_axes(made.use, len(made.axes))
            order = [places[i][0] for i in tokens if places[i]]
            # Every iteration of a loop around may have another one.
            if not identity or not set(one.axes) <= {*range(self.loops), *order}:
                continue
            lead = one.values.shape[: self.loops]
            rest = [i for i in range(self.loops, one.values.ndim) if i not in order]
            values = one.values.transpose([*range(self.loops), *order, *rest])
            shape = [1] * made.met
            for axis, i in zip(input_token_axes(made.use, made.met), tokens, strict=True):
                shape[axis] = one.values.shape[places[i][0]] if places[i] else 1
            ids = Ids(one.kind, values.reshape(*lead, *shape))
            known = self.findings.learned.get(made.use.order, ())
            self.findings.learned[made.use.order] = (*known, ids)


def _ids_of(x: Any) -> Carried:
    return x.ids if isinstance(x, Data) else ()


def _units_of(x: Any) -> tuple[Ids, ...]:
    return x.units if isinstance(x, Data) else ()


def _once(function: Callable) -> Callable:
    return functools.lru_cache(maxsize=None)(function)


def _item(values: Callable, i: int) -> Any:
    return values()[i]


def _computed(eqn: Any, operands: list) -> list:
    """The results of an equation of constants."""
    with jax.ensure_compile_time_eval():
        return bind(eqn, [x.constant() if isinstance(x, Data) and x.constant else x for x in operands])


def _known(operands: list) -> Callable[..., np.ndarray | None]:
    """Values of the operands that are constants, and of components of those that are vectors of indices."""

    @functools.cache
    def constant(i: int, part: int | None = None) -> np.ndarray | None:
        x = operands[i]
        if part is None:
            return constant_of(x)
        value = constant_of(x.parts[part]) if isinstance(x, Data) and x.parts else None
        return None if value is None else value.squeeze(-1)

    return constant


def _whose(kind: str, output: Data, inputs: tuple) -> Carried:
    """Ids of what a use meets."""
    if kind in ("dense", "embedding"):
        return _ids_of(inputs[0])
    return () if kind == "generic" else output.ids


def _facts(view: View, kind: str, eqn: Any, index: int, apply: Any, order: int, ids: Carried, around: str) -> Use:
    """The static facts of a use of a view."""
    name, where = ("output", "") if eqn is None else (eqn.primitive.name, user_line(eqn) or around)
    operand, chain = brought_out(shape_of(view.value)), (view.segments, view.loops)
    if apply is None:
        return Use(kind, name, where, *chain, operand, None, order=order)
    roles, key = _roles(eqn, kind, index), (index, *signature(eqn))
    numbers = view.factor, view.moved
    experts = Experts() if kind == "ragged" else None
    return Use(
        kind, name, where, *chain, operand, apply, roles, index, eqn.params, key, order, *numbers, ids,
        experts=experts,
    )  # fmt: skip


def _roles(eqn: Any, kind: str, index: int) -> tuple[str, ...]:
    """What each axis of operand ``index`` is, see `Use`."""
    axes, params = range(len(eqn.invars[index].aval.shape)), eqn.params
    if kind == "dense":
        contracted, batch = (sides[index] for sides in contraction(params))
        return tuple("column" if i in contracted else "both" if i in batch else "row" for i in axes)
    if kind == "embedding":
        row = lookup(params, eqn.invars[index].aval.shape).row
        return tuple("row" if i == row else "column" for i in axes)
    if kind == "conv":
        conv = convolution(params)
        out, inner, *_ = conv.kernel
        grouped = conv.groups != 1 or conv.batch_groups != 1
        return tuple(
            "row" if i == out else "window" if i != inner else "grouped" if grouped else "column" for i in axes
        )
    if kind == "ragged":
        return "both", "column", "row"
    return ("both" if kind == "scale" else "row",) * len(axes)

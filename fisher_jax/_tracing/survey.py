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
    bind,
    branches,
    contraction,
    convolution,
    inside,
    is_traced,
    lookup,
    loop,
    opened,
    repetition,
    user_line,
)
from fisher_jax._tracing.attention import Attention
from fisher_jax._tracing.dense import token_axes
from fisher_jax._tracing.id_rules import carried_through, is_elementwise, is_layout, keeps_entries, moved_through
from fisher_jax._tracing.ids import NOBODY, Carried, Ids, Lost, along, joined
from fisher_jax._tracing.places import input_token_axes
from fisher_jax._tracing.tracing import evaluate
from fisher_jax._tracing.uses import Data, Known, Spec, Use, View, plain, shape_of, signature

__all__ = ["Findings", "Made", "Survey"]

_PASSES = 8  # through the body of a loop, until its carry belongs to the same rows and positions as before


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """A product of a parameter, and what happened to it entry by entry.

    Attributes:
        leaf, use: of the product.
        axes: for each axis of its output the place along it, as ids of kind 0, 1, ....
        sizes: lengths of these axes.
        met: number of axes of what the parameter meets (of the output, for a convolution).
        loops: number of axes before those of its output, for the iterations of loops that it is in.
        bias: leaf of the bias that was added to it.
        after: whether anything but a bias followed.
        cap: how far ``c * tanh(z / c)`` has come, and ``c``.
        other: an operation that followed and is no part of a soft cap.
    """

    leaf: int
    use: Use
    axes: tuple[Ids, ...]
    sizes: tuple[int, ...]
    met: int
    bias: int | None = None
    after: bool = False
    cap: tuple[str, float] | None = None
    other: str | None = None
    loops: int = 0

    def same(self, other: "Made") -> bool:
        """Whether both are parts of one array."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "axes"]
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclasses.dataclass
class Findings:
    """What a survey found beside the uses.

    Attributes:
        number: of uses so far.
        biases: leaf of a bias, by the leaf of the kernel to whose output it is added.
        learned: ids of the tokens of a use that has none of its own, from what its output is added to; by its order.
        attention: what the products of parameters are in attentions.
        tokens: number of the tokens of a product, by its order.
    """

    number: int = 0
    biases: dict[int, int] = dataclasses.field(default_factory=dict)
    learned: dict[int, Carried] = dataclasses.field(default_factory=dict)
    attention: Attention = dataclasses.field(default_factory=Attention)
    tokens: dict[int, int] = dataclasses.field(default_factory=dict)

    def copy(self) -> "Findings":
        return Findings(
            self.number, self.biases.copy(), self.learned.copy(), self.attention.copy(), self.tokens.copy()
        )


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
    """

    loops: int = 0
    findings: Findings = dataclasses.field(default_factory=Findings)
    around: str = ""
    own: list[Spec] = dataclasses.field(default_factory=list)
    parts: list["Survey"] = dataclasses.field(default_factory=list)
    specs: list[Spec] = dataclasses.field(default_factory=list)
    met: int | None = None

    def line(self, eqn: Any) -> str:
        """Where an equation stands; functions of JAX stand where they are called."""
        return user_line(eqn) or self.around

    def inside(self, eqn: Any, loops: int = 0) -> "Survey":
        """A survey of a part of the program."""
        return Survey(self.loops + loops, self.findings, self.line(eqn))

    def constant(self, value: Any) -> Data:
        return Data(jax.typeof(value), constant=lambda: value)

    def bind(self, eqn: Any, values: list) -> list:
        """Types of the results of an equation, their ids, and the product that they come from."""
        if (scan := loop(eqn)) is not None:
            return self._scanned(eqn, scan, values)[0]
        if (parts := branches(eqn)) is not None:
            return self._either(eqn, parts, values[1:])
        if (repeated := repetition(eqn)) is not None:
            return self._repeated(eqn, *repeated, values)
        if (inner := inside(eqn)) is not None:
            return list(map(plain, evaluate(inner, values, self.inside(eqn))))
        operands = [plain(v) for v in values]
        carried = carried_through(
            eqn, [x.ids if isinstance(x, Data) else () for x in operands], self.loops,
            lambda i: _constant(operands[i]), self.line,
        )  # fmt: skip
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
                ids,
                made[i],
                None if value is None else functools.partial(_item, value, i),
                eqn,
                units[i],
                tokens[i],
            )
            for i, (var, ids) in enumerate(zip(eqn.outvars, carried, strict=True))
        ]

    def _tokens(self, eqn: Any, operands: list) -> list[Carried]:
        """Tokens of the products that each result comes from, entry by entry."""
        given = [x.tokens if isinstance(x, Data) else () for x in operands]
        if not any(given) or not keeps_entries(eqn.primitive.name):
            return [() for _ in eqn.outvars]
        constant = functools.cache(lambda i: _constant(operands[i]))
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
        constant = functools.cache(lambda i: _constant(operands[i]))
        return self.findings.attention.through(eqn, given, data, self.loops, constant, self.line)

    def use(self, view: View, kind: str, eqn: Any, index: int, output: Callable, apply: Any, inputs: tuple) -> Data:
        self.met = index
        found: Data = output()
        self.met = None
        whose = _whose(kind, found, inputs)
        use = _facts(view, kind, eqn, index, apply, self.findings.number, whose, self.around)
        self.findings.number += 1
        spec = Spec(view.leaf, use, shape_of(found), tuple(map(shape_of, inputs)))
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
            return dataclasses.replace(
                found, made=product, units=units, tokens=self._own_tokens(view.leaf, use, sizes)
            )
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
        (ids,) = carried_through(eqn, [_ids_of(plain(x)) for x in values], self.loops, lambda i: None, self.line)
        axis = self.loops + int(eqn.params["dimension"])
        rows = tuple(x for x in ids if x.kind == "row" and (isinstance(x, Lost) or x.values.shape[axis] == 1))
        return Data(view.value.type, rows)

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
        consts = [_entered(v, t, "shared", self.loops) for v, t in zip(values[:first], types[:first], strict=True)]
        xs = [_entered(v, t, "stacked", self.loops) for v, t in zip(values[head:], types[head:], strict=True)]
        part: Survey = self
        outs: list[Data] = []

        def once(carried: list[Carried]) -> list[Carried]:
            nonlocal part, outs
            part = self.inside(eqn, 1)
            part.findings = self.findings.copy()
            carry = [Data(t, ids) for t, ids in zip(types[first:head], carried, strict=True)]
            outs = [part.generic(v, eqn) for v in evaluate(scan.traced, [*consts, *carry, *xs], part)]
            return [_kept_between(_ids_of(x), self.loops, eqn, self.line) for x in outs[: scan.num_carry]]

        carried = self._settled(eqn, [_beside_loop(_ids_of(x), self.loops) for x in start], once)
        vars(self.findings).update(vars(part.findings))
        stacked = outs[scan.num_carry :]
        found = [*(_after_loop(ids, self.loops) for ids in carried), *map(_ids_of, stacked)]
        made = [*[None] * scan.num_carry, *(_made_in_each(x.made, scan.length, self.loops) for x in stacked)]
        tokens = [() if i < scan.num_carry else self._tokens_of_iterations(x, scan) for i, x in enumerate(outs)]
        for order in {one.kind[1] for own in tokens for one in own}:
            self.findings.tokens[order] *= scan.length
        return [
            Data(var.aval, ids, one, maker=eqn, tokens=own)
            for var, ids, one, own in zip(eqn.outvars, found, made, tokens, strict=True)
        ], part

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
        outs = [list(map(plain, evaluate(part, values, self.inside(eqn)))) for part in parts]
        ids = [joined([_ids_of(x) for x in same], eqn, self.line) for same in zip(*outs, strict=True)]
        return [Data(var.aval, one, maker=eqn) for var, one in zip(eqn.outvars, ids, strict=True)]

    def _repeated(self, eqn: Any, body: Any, skipped: int, num_consts: int, values: list) -> list[Data]:
        """A loop without end: what it carries must belong to the same rows and positions in every round."""
        consts, start = values[skipped : skipped + num_consts], values[skipped + num_consts :]

        def once(carried: list[Carried]) -> list[Carried]:
            given = [Data(var.aval, ids) for var, ids in zip(eqn.outvars, carried, strict=True)]
            return [_ids_of(plain(x)) for x in evaluate(body, [*consts, *given], self.inside(eqn))]

        carried = self._settled(eqn, [_ids_of(plain(x)) for x in start], once)
        return [Data(var.aval, ids, maker=eqn) for var, ids in zip(eqn.outvars, carried, strict=True)]

    def _settled(self, eqn: Any, carried: list[Carried], once: Callable) -> list[Carried]:
        """Ids that one round of a loop leaves as they are, from those that it starts with; else they are lost."""
        for attempt in range(_PASSES):
            new = [joined((a, b), eqn, self.line) for a, b in zip(carried, once(carried), strict=True)]
            if attempt == _PASSES - 2:
                new = [_unstable(a, b, eqn, self.line) for a, b in zip(carried, new, strict=True)]
            if all(map(_same_ids, carried, new)):
                break
            carried = new
        return carried

    def _made(self, eqn: Any, operands: list, carried: list[Carried]) -> list[Made | None]:
        """The product that each result comes from, entry by entry."""
        nothing: list[Made | None] = [None] * len(eqn.outvars)
        owners = [i for i, x in enumerate(operands) if isinstance(x, Data) and x.made is not None]
        if not owners:
            return nothing
        name = eqn.primitive.name
        if is_elementwise(name):
            shape = eqn.outvars[0].aval.shape
            for i in owners:
                self._learn(operands[i].made, carried[0])
            owners = [i for i in owners if operands[i].type.shape == shape]
            if len(owners) != 1:
                return nothing
            (i,) = owners
            return [_followed(operands[i].made, name, [x for j, x in enumerate(operands) if j != i], i)]
        made = operands[owners[0]].made
        parts = name == "concatenate" and len(owners) == len(operands)
        if (parts and all(x.made.same(made) for x in operands)) or (is_layout(name) and len(owners) == 1):
            given = [x.made.axes if j in owners else () for j, x in enumerate(operands)]
            moved = carried_through(eqn, given, self.loops, lambda j: _constant(operands[j]), self.line)
            return [
                dataclasses.replace(made, axes=axes)
                if len(axes) == len(made.axes) and not any(isinstance(x, Lost) for x in axes)
                else None
                for axes in moved
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


def _constant(x: Any) -> np.ndarray | None:
    if not isinstance(x, Data):
        return np.asarray(x)
    if x.constant is None:
        return None
    value = x.constant()
    return None if is_traced(value) else np.asarray(value)


def _once(function: Callable) -> Callable:
    return functools.lru_cache(maxsize=None)(function)


def _item(values: Callable, i: int) -> Any:
    return values()[i]


def _computed(eqn: Any, operands: list) -> list:
    """The results of an equation of constants."""
    with jax.ensure_compile_time_eval():
        return bind(eqn, [x.constant() if isinstance(x, Data) and x.constant else x for x in operands])


def _entered(x: Any, kind: Any, how: str, loops: int) -> Any:
    """What the body of a loop sees of a constant, or of a slice, of type ``kind``."""
    if isinstance(x, View):
        return x.inside(Data(kind), how)
    if isinstance(x, Known):
        return Known(_entered(x.value, kind, how, loops), x.params)
    if not isinstance(x, Data):
        return x
    if how == "stacked":
        return Data(kind, x.ids, units=x.units)
    units = tuple(one for one in _beside_loop(x.units, loops) if isinstance(one, Ids))
    return Data(kind, _beside_loop(x.ids, loops), None, x.constant, units=units)


def _beside_loop(carried: Carried, loops: int) -> Carried:
    """Ids of what is the same in every iteration of a loop inside of ``loops`` others."""
    return tuple(x if isinstance(x, Lost) else Ids(x.kind, np.expand_dims(x.values, loops)) for x in carried)


def _made_in_each(made: Made | None, length: int, loops: int) -> Made | None:
    """A product in the iterations of a loop, whose results lie side by side."""
    if made is None or made.use.loops[loops:][: 1 + made.loops].count("shared") != 1 + made.loops:
        return None
    (ndim,) = {x.values.ndim - loops for x in made.axes} or {1}
    steps = along(f"iteration {made.loops}", np.arange(length), [0], ndim, loops)
    return dataclasses.replace(made, axes=(steps, *made.axes), sizes=(length, *made.sizes), loops=made.loops + 1)


def _after_loop(carried: Carried, loops: int) -> Carried:
    return tuple(x if isinstance(x, Lost) else Ids(x.kind, x.values.squeeze(loops)) for x in carried)


def _kept_between(carried: Carried, loops: int, eqn: Any, line: Callable) -> Carried:
    """Of what a loop hands on: its state belongs to no position of its own, but must belong to one row."""
    found: list[Ids | Lost] = []
    for x in carried:
        if isinstance(x, Lost) or x.values.shape[loops] == 1:
            found.append(x)
        elif x.kind == "row":
            found.append(Lost(x.kind, eqn.primitive.name, line(eqn), "it goes from one row to the next"))
    return tuple(found)


def _same_ids(a: Carried, b: Carried) -> bool:
    if len(a) != len(b):
        return False
    return all(
        (isinstance(x, Lost) and isinstance(y, Lost) and x.kind == y.kind)
        or (isinstance(x, Ids) and isinstance(y, Ids) and x.kind == y.kind and x.same(y))
        for x, y in zip(a, b, strict=True)
    )


def _unstable(before: Carried, after: Carried, eqn: Any, line: Callable) -> Carried:
    if _same_ids(before, after):
        return after
    kinds = dict.fromkeys(x.kind for x in after)
    return tuple(Lost(kind, eqn.primitive.name, line(eqn), "they move from round to round") for kind in kinds)


def _followed(made: Made, name: str, others: list, index: int) -> Made:
    """A product after one more elementwise operation; what a soft cap is made of is recognised."""
    stage, cap = made.cap or ("", 0.0)
    number = float(others[0]) if len(others) == 1 and not isinstance(others[0], Data) else None
    if made.other is None:
        if not made.after and number and (name == "mul" or (name == "div" and index == 0)):
            return dataclasses.replace(made, after=True, cap=("scaled", number if name == "div" else 1 / number))
        if stage == "scaled" and name == "tanh":
            return dataclasses.replace(made, cap=("bounded", cap))
        if stage == "bounded" and name == "mul" and number and abs(cap / number - 1) < 1e-6:
            return dataclasses.replace(made, cap=("capped", number))
    return dataclasses.replace(made, after=True, other=made.other or name)


def _whose(kind: str, output: Data, inputs: tuple) -> Carried:
    """Ids of what a use meets."""
    if kind in ("dense", "embedding"):
        return _ids_of(inputs[0])
    return () if kind == "generic" else output.ids


def _facts(view: View, kind: str, eqn: Any, index: int, apply: Any, order: int, ids: Carried, around: str) -> Use:
    """The static facts of a use of a view."""
    name, where = ("output", "") if eqn is None else (eqn.primitive.name, user_line(eqn) or around)
    operand, chain = shape_of(view.value), (view.segments, view.loops)
    if apply is None:
        return Use(kind, name, where, *chain, operand, None, order=order)
    roles, key = _roles(eqn, kind, index), (index, *signature(eqn))
    numbers = view.factor, view.moved
    return Use(kind, name, where, *chain, operand, apply, roles, index, eqn.params, key, order, *numbers, ids)


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
    return ("both" if kind == "scale" else "row",) * len(axes)

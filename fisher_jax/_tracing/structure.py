"""What a model's program says of its parameters, rows and positions, found once for each program."""

import dataclasses
import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support.jax_internals import is_traced, opened, struct, user_line, walk
from fisher_jax._tracing.dense import experts_of, operand_axes, token_axes
from fisher_jax._tracing.ids import NOBODY, Carried, Ids, Link, Lost, along, compressed
from fisher_jax._tracing.made import Made
from fisher_jax._tracing.places import input_token_axes
from fisher_jax._tracing.routing import Routed, routed_equations
from fisher_jax._tracing.rows import SMALL, Rows, rows_of
from fisher_jax._tracing.survey import Survey
from fisher_jax._tracing.tracing import evaluate
from fisher_jax._tracing.uses import Data, Experts, Spec, Use, View

__all__ = ["Head", "Structure", "Structures"]

Tree = Any
_HELD = 4  # programs of one function: some shapes of batches


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """The product that the outputs come from, each token of the outputs from one token of the product.

    Attributes:
        leaf, use: of the product.
        tokens: for every token of the outputs, ravelled, its token of the product (iterations of loops first), int32;
            ``None``: the same order.
        bias: leaf of the bias of the outputs.
        scale, soft_cap: the outputs are ``c * tanh(s * z / c)`` of ``z = hidden @ head.T + bias``, or ``s * z``.
        is_last: whether nothing but a bias follows the product.
        other: an operation that follows and is neither bias, scale nor soft cap.
    """

    leaf: int
    use: Use
    tokens: np.ndarray | None
    bias: int | None
    scale: float
    soft_cap: float | None
    is_last: bool
    other: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What the program of ``function(params, *inputs)`` says.

    Attributes:
        survey: all uses, in program order, part by part.
        outputs: ``jax.ShapeDtypeStruct`` of each result.
        ids: of each result, whose row and position its entries are.
        head: see `Head`; ``None`` where the outputs come from no product of a parameter.
        headless: what the outputs come from instead.
        biases: leaf of a bias, by the leaf of the kernel to whose output it is added.
        inputs: of each input the axes of rows, and of positions after them, as far as it has them.
        rows: whether rows depend on each other, and where.
    """

    survey: Survey
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    ids: tuple[Carried, ...]
    head: Head | None
    headless: str
    biases: dict[int, int]
    inputs: tuple[tuple[int, ...], ...]
    rows: Rows

    @property
    def specs(self) -> list[Spec]:
        return self.survey.specs

    def uses(self, leaf: int) -> list[Spec]:
        """All uses of one leaf."""
        return [spec for spec in self.specs if spec.leaf == leaf]

    def changed(self, change: Callable[[Spec], Use]) -> "Structure":
        """With other facts about uses."""
        survey = _everywhere(self.survey, lambda spec: dataclasses.replace(spec, use=change(spec)))
        return dataclasses.replace(self, survey=survey)


class Structures:
    """Structures of one function's programs, the last few; nothing but shapes and facts is kept.

    Attributes:
        walks: through a program.
        shown: what values have shown of a link between rows, see `fisher_jax._tracing.alone`.

    `of` gives the one of a traced program; it goes through the program only where it has not seen the same one,
    constants of integers included.
    """

    def __init__(self):
        self._held: OrderedDict[bytes, Structure] = OrderedDict()
        self.walks = 0
        self.shown: dict[tuple[Link, bool], str | None] = {}

    def of(
        self, traced: Any, follow: tuple[bool, ...], lead: tuple[int, ...] | None = (), leads: Callable | None = None
    ) -> Structure:
        """
        Args:
            traced: a closed jaxpr whose first arguments are the parameters.
            follow: for every parameter whether it is one to follow.
            lead: rows, and positions of a row, along the leading axes of the other arguments; ``None``: those of the
                result.
            leads: ``leads(lead)`` says what each of the other arguments has of them; ``None``: what fits its shape.
        """
        key = _fingerprint(traced, follow, lead)
        if key not in self._held:
            self.walks += 1
            self._held[key] = _surveyed(traced, follow, lead, leads)
            while len(self._held) > _HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


def _fingerprint(traced: Any, follow: tuple[bool, ...], lead: tuple[int, ...] | None) -> bytes:
    """The same for programs that do the same; values count where they may be indices, or laid on rows."""
    found = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", str(traced)).encode())
    found.update(repr((follow, lead, [str(var.aval) for var in opened(traced)[0].inputs])).encode())
    for value in _constants(traced):
        if jnp.issubdtype(jnp.result_type(value), jnp.floating) and np.size(value) > SMALL:
            continue
        found.update(b"traced" if is_traced(value) else np.asarray(jax.device_get(value)).tobytes())
    return found.digest()


def _constants(traced: Any) -> list:
    """Arrays that a program holds, and those of functions inside of it."""
    body, found = opened(traced)

    def inner(eqn, values):
        for part in eqn.params.values():
            for one in part if isinstance(part, tuple | list) else (part,):
                if hasattr(one, "jaxpr") or hasattr(one, "eqns"):
                    found.extend(_constants(one))
        return [None] * len(eqn.outvars)

    walk(body, [None] * len(body.inputs), inner)
    return [x for x in found if hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jax.dtypes.extended)]


def _surveyed(
    traced: Any, follow: tuple[bool, ...], lead: tuple[int, ...] | None, leads: Callable | None
) -> Structure:
    body, _ = opened(traced)
    params, inputs = body.arguments[: len(follow)], body.arguments[len(follow) :]
    if lead is None:
        lead = body.results[0].aval.shape[:-1] if len(body.results) == 1 else ()
    views = [View.of(Data(var.aval), i) if follow[i] else Data(var.aval) for i, var in enumerate(params)]
    own = [_fitting(var.aval.shape, lead) for var in inputs] if leads is None else leads(lead)

    def surveyed(time_major: bool) -> tuple[Survey, list, list, list]:
        axes = [_axes_of_input(var.aval.shape, one, lead, time_major) for var, one in zip(inputs, own, strict=True)]
        given = [
            Data(var.aval, _ids_of_input(len(var.aval.shape), lead, one))
            for var, one in zip(inputs, axes, strict=True)
        ]
        survey = Survey()
        outs = [survey.generic(x, None) for x in evaluate(traced, [*views, *given], survey)]
        return survey, axes, given, outs

    survey, axes, given, outs = surveyed(time_major=False)
    if len(lead) > 1 and lead[0] == lead[1] and _are_swapped(outs):
        survey, axes, given, outs = surveyed(time_major=True)
    outputs = tuple(struct(var.aval) for var in body.results)
    head, other = (None, "several arrays")
    if len(outs) == 1 and isinstance(outs[0], Data):
        head, other = _head(outs[0]), _named(outs[0].maker)
    learned = survey.findings.learned
    single = head is not None and not head.use.loops
    of_outputs = [(head.use.order, _token_ids(head, survey))] if head and single else _tokens_of_parts(outs, survey)
    for order, one in of_outputs:
        learned[order] = (*learned.get(order, ()), one)
    survey = _with_experts(_with_attention(_with_ids(survey, learned)), routed_equations(traced))
    ids = tuple(x.ids if isinstance(x, Data) else () for x in outs)
    links = rows_of([x for x in outs if isinstance(x, Data)], given, lead)
    return Structure(survey, outputs, ids, head, other, survey.findings.biases, tuple(axes), links)


def _named(maker: Any) -> str:
    """An operation and its line."""
    if maker is None:
        return "an input"
    line = user_line(maker)
    of = ", neither side of which is a parameter as it is" if maker.primitive.name == "dot_general" else ""
    return f"{maker.primitive.name}{f' at {line}' if line else ''}{of}"


def _are_swapped(outs: list) -> bool:
    """Whether what was taken for positions is what the results have rows of."""
    first: dict[Any, bool] = {}
    for x in outs:
        first |= {one.kind: isinstance(one, Ids) and 0 in one.axes for one in (x.ids if isinstance(x, Data) else ())}
    return first.get("position", False) and not first.get("row", False)


def _fitting(shape: tuple[int, ...], lead: tuple[int, ...]) -> tuple[int, ...]:
    """The part of ``lead`` that a shape begins with."""
    return next((part for part in (lead, lead[:1]) if part and shape[: len(part)] == part), ())


def _axes_of_input(
    shape: tuple[int, ...], own: tuple[int, ...], lead: tuple[int, ...], time_major: bool
) -> tuple[int, ...]:
    """Axes of rows and of positions: the first ones, or positions before rows."""
    swapped = len(lead) > 1 and shape[:2] == (lead[1], lead[0])
    if swapped and (lead[0] != lead[1] or (time_major and len(own) > 1)):
        return (1, 0, *range(2, len(lead))) if shape[2 : len(lead)] == lead[2:] else (1,)
    return tuple(range(len(own)))


def _ids_of_input(ndim: int, lead: tuple[int, ...], axes: tuple[int, ...]) -> tuple[Ids, ...]:
    if not axes:
        return ()
    row = along("row", np.arange(lead[0]), axes[:1], ndim)
    if len(axes) == 1:
        return (row,)
    places = np.arange(math.prod(lead[1:])).reshape(lead[1:])
    return row, along("position", places, axes[1:], ndim)


def _token_ids(head: Head, survey: Survey) -> Ids:
    """The token of the outputs that comes from each token of the head, over what it meets."""
    (spec,) = [spec for spec in survey.specs if spec.use.order == head.use.order]
    shape = spec.output.shape if head.use.kind == "conv" else spec.inputs[0].shape
    axes = input_token_axes(head.use, len(shape))
    values = np.full([shape[i] for i in axes], NOBODY, np.int32)
    flat = values.reshape(-1)
    if head.tokens is None:
        flat[:] = np.arange(flat.size)
    else:
        flat[head.tokens] = np.arange(head.tokens.size)
    return along("token", values, axes, len(shape))


def _tokens_of_parts(outs: list, survey: Survey) -> list[tuple[int, Ids | Lost]]:
    """The same of the products of one leaf that the outputs are put together from, chunk by chunk, by their order."""
    tokens = outs[0].tokens if len(outs) == 1 and isinstance(outs[0], Data) else ()
    if len({one.kind[0] for one in tokens}) != 1:
        return []
    shape = outs[0].type.shape
    specs = {spec.use.order: spec for spec in survey.specs}
    owners = np.zeros(shape[:-1], np.int32)
    found: list[tuple[int, Ids | Lost]] = []
    for one in tokens:
        spec = specs[one.kind[1]]
        if isinstance(one, Lost):
            found.append((spec.use.order, dataclasses.replace(one, kind="token")))
            continue
        if one.values.shape[-1:] != (1,):
            return []
        places = np.broadcast_to(one.values[..., 0], shape[:-1])
        owners += places != NOBODY
        loops, met = len(spec.lengths), spec.output if spec.use.kind == "conv" else spec.inputs[0]
        own = met.shape[loops:]
        axes = input_token_axes(spec.use, len(own))
        values = np.full([*spec.lengths, *(own[i] for i in axes)], NOBODY, np.int32)
        flat = values.reshape(-1)
        flat[places[places != NOBODY]] = np.flatnonzero(places != NOBODY)
        if len(np.unique(places)) != (places != NOBODY).sum() + bool((places == NOBODY).any()):
            return []
        full = [1] * len(own)
        for axis in axes:
            full[axis] = own[axis]
        order = np.argsort(axes)
        values = values.transpose([*range(loops), *(loops + i for i in order)])
        found.append((spec.use.order, Ids("token", compressed(values.reshape(*spec.lengths, *full)))))
    return found if (owners <= 1).all() else []


def _with_ids(survey: Survey, learned: dict) -> Survey:
    """The same survey, uses that have no ids of their own with those of what they are joined to."""

    def spec(one: Spec) -> Spec:
        more = learned.get(one.use.order, ())
        return dataclasses.replace(one, use=dataclasses.replace(one.use, ids=(*one.use.ids, *more)))

    return _everywhere(survey, spec)


def _everywhere(survey: Survey, change: Callable[[Spec], Spec]) -> Survey:
    """The same survey with other facts about every use."""
    parts = [_everywhere(part, change) for part in survey.parts]
    own, specs = (list(map(change, specs)) for specs in (survey.own, survey.specs))
    return dataclasses.replace(survey, own=own, parts=parts, specs=specs)


def _with_attention(survey: Survey) -> Survey:
    """The same survey, every use with what it is in attentions."""
    found, leaves = survey.findings.attention, {spec.use.order: spec.leaf for spec in survey.specs}
    parts = found.parts(survey.specs)
    follows = {order: frozenset(leaves[i] for i in uses) for order, uses in found.follows.items()}

    def spec(one: Spec) -> Spec:
        order = one.use.order
        use = dataclasses.replace(one.use, parts=parts.get(order, ()), follows=follows.get(order, frozenset()))
        return dataclasses.replace(one, use=use)

    return _everywhere(survey, spec)


def _with_experts(survey: Survey, routed: dict[int, Routed]) -> Survey:
    """The same survey, every dense use that gates let through with its axes of experts."""
    equations = survey.findings.equations

    def spec(one: Spec) -> Spec:
        found = routed.get(equations[one.use.order])
        if found is None or one.use.kind not in ("dense", "embedding"):
            return one
        ndim = len(one.output.shape) - len(one.lengths)
        experts = experts_of(one.use, found, ndim) if one.use.kind == "dense" else Experts()
        return dataclasses.replace(one, use=dataclasses.replace(one.use, experts=experts))

    return _everywhere(survey, spec) if routed else survey


def _head(outputs: Data) -> Head | None:
    made: Made | None = outputs.made
    shape = outputs.type.shape
    if made is None or made.use.kind not in ("dense", "conv") or len(made.use.loops) != made.loops or not shape:
        return None
    tokens = (*range(made.loops), *(made.loops + i for i in token_axes(made.use, len(made.axes) - made.loops)))
    units = [i for i in range(len(made.axes)) if i not in tokens]
    places = {i: _place(made.axes[i], shape) for i in range(len(made.axes))}
    sizes = made.sizes
    if made.use.kind == "dense" and any(made.use.operand.shape[i] != 1 for i in operand_axes(made.use)[0]):
        return None
    if any(places[i].shape[:-1] != (1,) * (len(shape) - 1) for i in units):
        return None
    if any(places[i].shape[-1] != 1 for i in tokens):
        return None
    unit = _ravelled([places[i] for i in units], [sizes[i] for i in units], (1,) * (len(shape) - 1) + shape[-1:])
    if not np.array_equal(unit.ravel(), np.arange(shape[-1])) or shape[-1] != _product(sizes[i] for i in units):
        return None
    found = _ravelled([places[i] for i in tokens], [sizes[i] for i in tokens], (*shape[:-1], 1)).ravel()
    if len(np.unique(found)) != found.size:
        return None
    in_order = np.array_equal(found, np.arange(_product(sizes[i] for i in tokens)))
    return Head(
        made.leaf, made.use, None if in_order else found.astype(np.int32), made.bias, made.scale, made.cap,
        not made.after, made.other,
    )  # fmt: skip


def _place(ids: Ids | Lost, shape: tuple[int, ...]) -> np.ndarray:
    assert isinstance(ids, Ids)
    return ids.values


def _ravelled(places: list[np.ndarray], sizes: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """One index from those along several axes, for every entry of an array of this shape."""
    found = np.zeros(shape, np.int64)
    for place, size in zip(places, sizes, strict=True):
        found = found * size + place
    return found


def _product(sizes) -> int:
    return int(np.prod(list(sizes), dtype=np.int64))

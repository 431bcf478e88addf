"""What is asked of JAX beyond its documented functions, in one place.

Each function answers one question about a traced program, an equation or a type, from what the object itself holds;
none asks for a version. `tests/support/test_jax_internals.py` has one small program for each question.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jaxpr_core
from jax.extend.core import primitives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

__all__ = [
    "PLACES",
    "Body",
    "Contraction",
    "Convolution",
    "Lookup",
    "Loop",
    "Remat",
    "Repetition",
    "abstract",
    "as_elementwise",
    "bind",
    "branches",
    "broadcast_axes",
    "brought_out",
    "brought_to",
    "called",
    "contraction",
    "convolution",
    "equation",
    "has_constants",
    "inside",
    "instead_of",
    "is_literal",
    "is_plain_ragged",
    "is_traced",
    "lookup",
    "loop",
    "named_axes",
    "opened",
    "permutation",
    "rematerialised",
    "repetition",
    "run",
    "slice_bounds",
    "stacked",
    "struct",
    "unstacked",
    "unstacked_axis",
    "user_line",
    "walk",
    "zeros",
]  # fmt: skip

_JAX = os.path.dirname(jax.__file__) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """A traced function, without the values that it closes over.

    Attributes:
        constants: variables of these values.
        arguments, equations, results: variables, equations in order, and variables or literals.
    """

    constants: list
    arguments: list
    equations: list
    results: list

    @property
    def inputs(self) -> list:
        return [*self.constants, *self.arguments]


def opened(traced: Any) -> tuple[Body, list]:
    """A traced function, whether it carries the values it closes over or not, and these values."""
    jaxpr = getattr(traced, "jaxpr", traced)
    values = list(getattr(traced, "consts", ()))
    return Body(list(jaxpr.constvars), list(jaxpr.invars), list(jaxpr.eqns), list(jaxpr.outvars)), values


def walk(body: Body, values: Sequence[Any], meet: Callable[[Any, list], list]) -> list:
    """Go through a body equation by equation: ``meet(equation, its operands) -> its results``.

    Args:
        values: whatever stands for its `Body.inputs`; what is no longer needed is dropped on the way.

    Returns:
        What stands for its results. A number that is written into the program is given as it is.
    """
    env = dict(zip(body.inputs, values, strict=True))
    wanted = {atom for atom in body.results if not is_literal(atom)}
    last = {atom: i for i, eqn in enumerate(body.equations) for atom in eqn.invars if not is_literal(atom)}

    def read(atom):
        return atom.val if is_literal(atom) else env[atom]

    for i, eqn in enumerate(body.equations):
        env |= zip(eqn.outvars, meet(eqn, list(map(read, eqn.invars))), strict=True)
        for atom in {x for x in eqn.invars if not is_literal(x)} - wanted:
            if last[atom] == i:
                del env[atom]
    return list(map(read, body.results))


def run(body: Body, values: Sequence[Any]) -> list:
    """Evaluate a body on values for its `Body.inputs`."""
    return walk(body, values, bind)


def is_literal(atom: Any) -> bool:
    """Whether an operand is a number written into the program."""
    return isinstance(atom, jaxpr_core.Literal)


def is_traced(x: Any) -> bool:
    """Whether an array has no value yet, inside of ``jax.jit`` and other transformations."""
    return isinstance(x, jax.core.Tracer)


def called(eqn: Any) -> Any:
    """The traced function that an equation calls on its own operands (``jax.jit``); ``None`` for any other."""
    return eqn.params["jaxpr"] if eqn.primitive.name in ("jit", "pjit") else None


def inside(eqn: Any) -> Any:
    """The traced function that an equation evaluates on its own operands, whatever else it does (``jax.jit``,
    ``jax.custom_jvp``, ``jax.checkpoint``, ...); ``None`` for any other."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            body, _ = opened(eqn.params[name])
            same = _shapes(body.arguments) == _shapes(eqn.invars) and _shapes(body.results) == _shapes(eqn.outvars)
            return eqn.params[name] if same else None
    return None


def _shapes(atoms: Sequence[Any]) -> list[Any]:
    return [getattr(atom.aval, "shape", None) for atom in atoms]


def branches(eqn: Any) -> Sequence[Any] | None:
    """The traced functions of which a ``jax.lax.cond`` runs one on its operands but the first; else ``None``."""
    return eqn.params["branches"] if eqn.primitive.name == "cond" else None


class Repetition(NamedTuple):
    """A ``jax.lax.while_loop``: operands are constants of its condition, of its body, and what it carries."""

    condition: Any
    body: Any
    condition_constants: int
    constants: int


def repetition(eqn: Any) -> Repetition | None:
    """The loop without end that an equation is; ``None`` for any other."""
    if eqn.primitive.name != "while":
        return None
    params = eqn.params
    return Repetition(params["cond_jaxpr"], params["body_jaxpr"], params["cond_nconsts"], params["body_nconsts"])


@dataclasses.dataclass(frozen=True)
class Loop:
    """A ``jax.lax.scan``: operands are constants of the body, then the carry, then what is scanned over."""

    traced: Any
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int


def loop(eqn: Any) -> Loop | None:
    """The loop that an equation is; ``None`` for any other."""
    if eqn.primitive.name != "scan":
        return None
    params = eqn.params
    if "num_carry" in params:
        sizes = params["num_consts"], params["num_carry"]
    else:  # operands in three groups, as a tree
        consts, carry, _ = params["ft_in"].unpack()
        sizes = len(consts), len(carry)
    return Loop(params["jaxpr"], *sizes, params["length"], params["reverse"], params["unroll"])


@dataclasses.dataclass(frozen=True)
class Remat:
    """A ``jax.checkpoint``."""

    traced: Any
    policy: Callable | None
    prevent_cse: bool


def rematerialised(eqn: Any) -> Remat | None:
    """The rematerialised function that an equation calls; ``None`` for any other."""
    if eqn.primitive.name not in ("remat2", "checkpoint", "remat"):
        return None
    return Remat(eqn.params["jaxpr"], eqn.params["policy"], eqn.params["prevent_cse"])


def has_constants(eqn: Any) -> bool:
    """Whether a function inside the equation holds arrays of its own, which may be data."""
    return "branches" in eqn.params or any(getattr(p, "consts", ()) for p in eqn.params.values())


def bind(eqn: Any, values: list) -> list:
    """Evaluate one equation of a jaxpr on values, in the context (mesh, precision) that it was traced in."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Before jax 0.10 sub-functions came apart from the parameters.
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*functions, *values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


# Which place on a mesh a result should have.
PLACES = ("sharding", "out_sharding")


def equation(name: str, params: Mapping[str, Any], operand: jax.ShapeDtypeStruct) -> Any:
    """The equation of a layout operation, from its name and its parameters but those of `PLACES`."""
    primitive = getattr(primitives, f"{name}_p", None) or getattr(jax.lax, f"{name}_p")
    placed = {"sharding": None} if name in ("reshape", "broadcast_in_dim", "convert_element_type") else {}
    (eqn,) = jax.make_jaxpr(functools.partial(primitive.bind, **params, **placed))(operand).eqns
    return eqn


def permutation(eqn: Any) -> tuple[int, ...]:
    """Of a ``transpose``: for each axis of the result the axis that it was."""
    return tuple(map(int, eqn.params["permutation"]))


def broadcast_axes(eqn: Any) -> tuple[int, ...]:
    """Of a ``broadcast_in_dim``: for each axis of the operand the axis of the result that it becomes."""
    return tuple(map(int, eqn.params["broadcast_dimensions"]))


def named_axes(eqn: Any) -> tuple[int, ...]:
    """Axes a ``squeeze`` removes (of the operand), an ``expand_dims`` adds (of the result) or a ``rev`` flips."""
    ndim = max(len(x.aval.shape) for x in (eqn.invars[0], eqn.outvars[0]))
    return tuple(int(i) % ndim for i in eqn.params["dimensions"])


def unstacked_axis(eqn: Any) -> int:
    """The axis of the operand along which an ``unstack`` takes it apart, one result for each place."""
    return int(eqn.params["axis"]) % len(eqn.invars[0].aval.shape)


def slice_bounds(eqn: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
    """Of a ``slice``: start, limit and stride of each axis; no strides where all are 1."""
    return eqn.params["start_indices"], eqn.params["limit_indices"], eqn.params["strides"]


def _numbers(options: Mapping[str, Any]) -> Any:
    """Which axes do what in a product, a lookup or a convolution, in JAX's own words."""
    return options["dimension_numbers"]


class Contraction(NamedTuple):
    """Axes of a ``dot_general``, for its first and its second operand."""

    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]


def contraction(options: Mapping[str, Any]) -> Contraction:
    """Which axes a ``dot_general`` contracts and which it keeps apart; its options are those of the equation."""
    contracted, batch = _numbers(options)
    return Contraction(*((tuple(left), tuple(right)) for left, right in (contracted, batch)))


def as_elementwise(eqn: Any, index: int) -> Any:
    """A ``dot_general`` that contracts nothing and keeps all axes of operand ``index`` beside those of the other, as
    a traced function with a ``mul``, at the same line; ``None`` for any other, and on a mesh."""
    contracted, batch = contraction(eqn.params)
    operands = [x.aval for x in eqn.invars]
    own, other = operands[index], operands[1 - index]
    if any(contracted) or len(batch[index]) != len(own.shape) or not own.sharding.mesh.empty:
        return None
    order = (*batch[1 - index], *(i for i in range(len(other.shape)) if i not in batch[1 - index]))
    dtype = eqn.outvars[0].aval.dtype

    def product(*values: Array) -> Array:
        data = jnp.transpose(values[1 - index], order).astype(dtype)
        kept = jax.lax.broadcast_in_dim(values[index].transpose(batch[index]), data.shape, range(len(own.shape)))
        return data * kept.astype(dtype)

    return instead_of(eqn, product, operands)


def instead_of(eqn: Any, function: Callable, operands: Sequence[Any]) -> Any:
    """A function of arrays of these types, traced, all of it at the line of an equation."""
    traced = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))
    same_line = functools.partial(_at_line_of, eqn)
    return traced.jaxpr.replace(eqns=list(map(same_line, traced.jaxpr.eqns)))


def _at_line_of(eqn: Any, other: Any) -> Any:
    return other.replace(source_info=eqn.source_info)


def is_plain_ragged(eqn: Any) -> bool:
    """Whether a ``ragged_dot_general`` is a ``ragged_dot``: rows ``[T, in]`` in groups by ``[E, in, out]``."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    found = [[tuple(x) for x in pair] for pair in (contracted, batch)]
    groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    shapes = [len(atom.aval.shape) for atom in eqn.invars]
    return (
        found == [[(1,), (1,)], [(), ()]]
        and groups == ((0,), (0,))
        and shapes == [2, 3, 1]
        and eqn.params.get("group_offset") is None
    )


class Lookup(NamedTuple):
    """A ``gather``.

    Attributes:
        axes: of the operand, that indices point into.
        collapsed: axes of the operand along which one entry is taken, and that go.
        batching, index_batching: axes of the operand, and of the indices, that are gone through together.
        sizes: of a slice, by axis of the operand.
        row: the axis along which whole slices are picked one by one, as in an embedding; ``None``: it is none.
        column: which of an index's numbers says the place along ``row``; no other says anything.
        offset: axes of the output that are those of a slice; the others are those of the indices.
        clips: whether an index out of range means the nearest row.
    """

    axes: tuple[int, ...]
    collapsed: tuple[int, ...]
    batching: tuple[int, ...]
    index_batching: tuple[int, ...]
    sizes: tuple[int, ...]
    row: int | None
    column: int
    offset: tuple[int, ...]
    clips: bool


def lookup(options: Mapping[str, Any], operand: tuple[int, ...]) -> Lookup:
    """What a ``gather`` picks from an operand of this shape."""
    numbers, sizes = _numbers(options), tuple(options["slice_sizes"])
    axes, collapsed = tuple(numbers.start_index_map), tuple(numbers.collapsed_slice_dims)
    batching = tuple(numbers.operand_batching_dims), tuple(numbers.start_indices_batching_dims)
    offset, mode = tuple(numbers.offset_dims), options["mode"]
    cut = [i for i, n in enumerate(operand) if sizes[i] != n] or list(axes if axes == collapsed else ())
    # Along an axis that is taken whole there is only one place to start, unless a wrong one gives something else.
    told = len(axes) == 1 or mode != jax.lax.GatherScatterMode.FILL_OR_DROP
    row = cut[0] if len(cut) == 1 and cut[0] in axes and sizes[cut[0]] == 1 and not batching[0] and told else None
    column = 0 if row is None else axes.index(row)
    clips = mode == jax.lax.GatherScatterMode.CLIP
    return Lookup(axes, collapsed, *batching, sizes, row, column, offset, clips)


class Convolution(NamedTuple):
    """A ``conv_general_dilated``.

    Attributes:
        numbers: ``jax.lax.ConvDimensionNumbers``.
        inputs, kernel, outputs: axes in the order batch, channels, space; of the kernel outputs, inputs, window.
        groups, batch_groups: ``feature_group_count`` and ``batch_group_count``.
        strides, padding, input_dilation, kernel_dilation: by axis of space.
    """

    numbers: Any
    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: int
    batch_groups: int
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]


def convolution(options: Mapping[str, Any]) -> Convolution:
    """Axes, groups and window of a ``conv_general_dilated``."""
    numbers = _numbers(options)
    specs = (tuple(numbers.lhs_spec), tuple(numbers.rhs_spec), tuple(numbers.out_spec))
    groups = options["feature_group_count"], options["batch_group_count"]
    # Uses that were saved keep no window.
    window: list[Any] = [options.get(x) for x in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")]
    return Convolution(numbers, *specs, *groups, *window)


def user_line(eqn: Any) -> str:
    """``file.py:12`` of the innermost frame of the user's code; empty if JAX does not tell.

    Frames of installed packages count only where there is nothing else.
    """
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    frames = [f for f in getattr(traceback, "frames", ()) or () if not f.file_name.startswith((_JAX, "<"))]
    own = [f for f in frames if not any(part in f.file_name for part in _INSTALLED)]
    for frame in own or frames:
        return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return ""


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, with its sharding on an Explicit mesh and the manual axes that it varies over."""
    return struct(jax.typeof(x))


def struct(kind: Any) -> jax.ShapeDtypeStruct:
    """The same of a type, as `jax.typeof` gives it and variables of a traced function have it."""
    return jax.ShapeDtypeStruct(
        kind.shape, kind.dtype, sharding=_named(kind.sharding), manual_axis_type=kind.manual_axis_type
    )


def brought_out(x: Any) -> Any:
    """An array, or a type, from axes of the mesh that are Auto for a while to the mesh as it is outside."""
    sharding, mesh = jax.typeof(x).sharding, jax.sharding.get_abstract_mesh()
    if not _is_inside(sharding.mesh, mesh):
        return x
    outside = NamedSharding(mesh, P(*(None for _ in x.shape)))
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=outside, manual_axis_type=x.manual_axis_type)
    return jax.reshard(x, outside)


def brought_to(x: Any, sharding: Any) -> Any:
    """The way back."""
    return jax.reshard(x, sharding) if _is_inside(sharding.mesh, jax.typeof(x).sharding.mesh) else x


def _is_inside(inner: Any, outer: Any) -> bool:
    """Whether Explicit axes of one mesh are Auto in the other."""
    return (
        not inner.empty
        and inner.axis_names == outer.axis_names
        and any(
            a == AxisType.Auto and b == AxisType.Explicit
            for a, b in zip(inner.axis_types, outer.axis_types, strict=True)
        )
    )


def stacked(x: jax.ShapeDtypeStruct, length: int) -> jax.ShapeDtypeStruct:
    """The type of ``length`` arrays of type ``x``, along a new first axis."""
    sharding = None if x.sharding is None else NamedSharding(x.sharding.mesh, P(None, *x.sharding.spec))
    return jax.ShapeDtypeStruct(
        (length, *x.shape), x.dtype, sharding=sharding, manual_axis_type=getattr(x, "manual_axis_type", None)
    )


def unstacked(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The type of one of the arrays that were stacked."""
    named = _named(x.sharding)
    sharding = None if named is None else NamedSharding(named.mesh, P(*named.spec[1:]))
    return jax.ShapeDtypeStruct(
        x.shape[1:], x.dtype, sharding=sharding, manual_axis_type=getattr(x, "manual_axis_type", None)
    )


def zeros(x: jax.ShapeDtypeStruct) -> Array:
    """Zeros of a type."""
    out = jnp.zeros(x.shape, x.dtype, out_sharding=_named(x.sharding))
    varying = getattr(getattr(x, "manual_axis_type", None), "varying", None)
    return jax.lax.pcast(out, tuple(varying), to="varying") if varying else out


def _named(sharding: Any) -> NamedSharding | None:
    """A sharding that is part of a type; ``None`` without a mesh."""
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None

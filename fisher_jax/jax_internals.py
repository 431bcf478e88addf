"""What is asked of JAX beyond its documented functions, in one place.

Each function answers one question about a traced program, an equation or a type, from what the object itself holds;
none asks for a version. `tests/core/test_jax_internals.py` has one small program for each question.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jaxpr_core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

__all__ = [
    "Body", "Loop", "Remat", "abstract", "bind", "called", "has_constants", "inside", "is_literal", "loop", "opened",
    "rematerialised", "run", "stacked", "unstacked", "user_line", "zeros",
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


def run(body: Body, values: Sequence[Any]) -> list:
    """Evaluate a body on values for its `Body.inputs`; what is no longer needed is dropped on the way."""
    env = dict(zip(body.inputs, values, strict=True))
    wanted = {atom for atom in body.results if not is_literal(atom)}
    last = {atom: i for i, eqn in enumerate(body.equations) for atom in eqn.invars if not is_literal(atom)}

    def read(atom):
        return atom.val if is_literal(atom) else env[atom]

    for i, eqn in enumerate(body.equations):
        env |= zip(eqn.outvars, bind(eqn, list(map(read, eqn.invars))), strict=True)
        for atom in {x for x in eqn.invars if not is_literal(x)} - wanted:
            if last[atom] == i:
                del env[atom]
    return list(map(read, body.results))


def is_literal(atom: Any) -> bool:
    """Whether an operand is a number written into the program."""
    return isinstance(atom, jaxpr_core.Literal)


def called(eqn: Any) -> Any:
    """The traced function that an equation calls on its own operands (``jax.jit``); ``None`` for any other."""
    return eqn.params["jaxpr"] if eqn.primitive.name in ("jit", "pjit") else None


def inside(eqn: Any) -> Any:
    """The traced function that an equation evaluates on its own operands, whatever else it does (``jax.jit``,
    ``jax.custom_jvp``, ``jax.checkpoint``, ...); ``None`` for any other."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            body, _ = opened(eqn.params[name])
            return eqn.params[name] if len(body.arguments) == len(eqn.invars) else None
    return None


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
    kind = jax.typeof(x)
    return jax.ShapeDtypeStruct(
        kind.shape, kind.dtype, sharding=_named(kind.sharding), manual_axis_type=kind.manual_axis_type
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

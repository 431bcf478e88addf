"""What is asked of JAX beyond its documented functions, in one place: equations, their origin, types of arrays."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

__all__ = ["abstract", "bind", "stacked", "unstacked", "user_line", "zeros"]

_JAX = os.path.dirname(jax.__file__) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


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

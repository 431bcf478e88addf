"""What is asked of JAX beyond its documented modules, in one place: evaluating an equation, and its origin."""

import os
from typing import Any

import jax

__all__ = ["bind", "user_line"]

_OURS = os.path.dirname(__file__) + os.sep
_JAX = os.path.dirname(jax.__file__) + os.sep


def bind(eqn: Any, values: list) -> list:
    """Evaluate one equation of a jaxpr on values, in the context (mesh, precision) that it was traced in."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Before jax 0.10 sub-functions came apart from the parameters.
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*functions, *values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def user_line(eqn: Any) -> str:
    """``file.py:12`` of the innermost frame outside JAX and this library; empty if JAX does not tell."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    for frame in getattr(traceback, "frames", ()) or ():
        if not frame.file_name.startswith((_OURS, _JAX, "<")):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return ""

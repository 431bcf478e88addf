"""Following every parameter through a traced program, to where it meets data.

A parameter is a `View` until it is used: the chain of layout operations that it went through, and its present value.
A *way* meets every use: a `Survey` notes it, without running anything; a `Replay` hands a perturbation to it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support.jax_internals import (
    Loop,
    Remat,
    as_elementwise,
    bind,
    brought_out,
    brought_to,
    called,
    has_constants,
    is_plain_ragged,
    lookup,
    loop,
    opened,
    rematerialised,
    walk,
)
from fisher_jax._tracing.uses import Data, Known, Step, View, plain, real_number

__all__ = ["Way", "evaluate"]

# Operations that only move a parameter's numbers around, or change their type.
_LAYOUT = {
    "transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p",
    "sharding_constraint", "slice", "split", "unstack", "rev", "reduce_precision", "layout_constraint", "reshard",
    "mesh_cast", "pvary", "pcast", "tile",
}  # fmt: skip

# Where a parameter meets data: the kind of tap, by primitive.
_USES = {
    "dot_general": "dense", "gather": "embedding", "mul": "scale", "add": "bias", "add_any": "bias", "sub": "bias",
    "conv_general_dilated": "conv", "ragged_dot_general": "ragged",
}  # fmt: skip


class Way(Protocol):
    """What is done at every equation, and at every use of a parameter."""

    def constant(self, value: Any) -> Any:
        """What stands for an array that the program holds."""

    def bind(self, eqn: Any, values: list) -> list:
        """Results of an equation without parameters."""

    def instead(self, eqn: Any, values: list) -> Any:
        """A traced function of the parameter alone that does what a lookup in it does; ``None``: there is none."""

    def use(self, view: View, kind: str, eqn: Any, index: int, output: Callable, apply: Any, inputs: tuple) -> Any:
        """The result of a use, which ``output()`` gives; the parameter is operand ``index`` of the equation."""

    def beside(self, view: View, eqn: Any, values: list) -> Any:
        """What stands for a parameter that is laid beside data, as a learned token is."""

    def generic(self, x: Any, eqn: Any) -> Any:
        """A parameter where no tap fits is plain data from here on."""

    def remat(self, eqn: Any, remat: Remat, values: list) -> list:
        """Results of a rematerialised part with parameters."""

    def scan(self, eqn: Any, scan: Loop, values: list) -> list:
        """Results of a loop with parameters."""


def evaluate(traced: Any, args: list, way: Way) -> list:
    """Go through a traced function; parameters among the arguments and results are `View`s."""
    body, constants = opened(traced)

    def meet(eqn, values):
        outs = _meet(eqn, values, way) if any(isinstance(v, View) for v in values) else way.bind(eqn, values)
        if all(isinstance(v, View | Known) or _is_number(v) for v in values) and not has_constants(eqn):
            params = any(isinstance(v, View) or (isinstance(v, Known) and v.params) for v in values)
            outs = [x if isinstance(x, View | Known) else Known(x, params) for x in outs]
        return outs

    return walk(body, [*map(way.constant, constants), *args], meet)


def _is_number(x: Any) -> bool:
    """A number that stands in the program itself."""
    return not isinstance(x, View | Known | Data | jax.Array) and np.ndim(x) == 0


def _meet(eqn: Any, values: list, way: Way) -> list:
    """An equation with a parameter among its operands."""
    name = eqn.primitive.name
    views = [i for i, v in enumerate(values) if isinstance(v, View)]
    first = values[views[0]]
    if (inner := called(eqn)) is not None:
        return evaluate(inner, values, way)
    if (remat := rematerialised(eqn)) is not None:
        return way.remat(eqn, remat, values)
    if (scan := loop(eqn)) is not None:
        return way.scan(eqn, scan, values)
    if name == "stop_gradient":
        return way.bind(eqn, [first.value])
    if name == "name":
        return [first.scaled(way.bind(eqn, [first.value])[0])]
    if name in _LAYOUT and len(values) == 1 and _stays_a_parameter(eqn):
        return [first.through(x, Step(eqn, i)) for i, x in enumerate(way.bind(eqn, [first.value]))]
    if name in ("gather", "dynamic_slice") and views == [0] and (sliced := way.instead(eqn, values)) is not None:
        return evaluate(sliced, [first], way)
    factor = _factor(name, values)
    if factor is not None:
        return [first.scaled(way.bind(eqn, list(map(plain, values)))[0], factor)]
    if name == "concatenate" and any(isinstance(v, Data | jax.Array) for v in values):
        return way.bind(eqn, [_beside(eqn, i, values, way) if i in views else plain(v) for i, v in enumerate(values)])
    if name == "dot_general" and len(views) == 1 and (product := as_elementwise(eqn, views[0])) is not None:
        return evaluate(product, values, way)
    if name in _USES and len(views) == 1 and _fits(eqn, views[0], values):
        return [_use(eqn, views[0], values, way)]
    return way.bind(eqn, [way.generic(v, eqn) for v in values])


def _stays_a_parameter(eqn: Any) -> bool:
    """Whether a tap can follow a parameter through a layout operation.

    Cast to integers it has no gradient; a complex one is no longer a real parameter.
    """
    return all(bool(jnp.issubdtype(var.aval.dtype, jnp.floating)) for var in eqn.outvars)


def _factor(name: str, values: list) -> float | None:
    """``f`` where the equation is ``f * parameter + constant`` with numbers of the program; otherwise ``None``."""
    if name == "neg":
        return -1.0
    if name not in ("add", "sub", "mul", "div") or sum(map(_is_number, values)) != 1:
        return None
    first = isinstance(values[0], View)
    if (number := real_number(values[1 if first else 0])) is None:
        return None
    if name == "add":
        return 1.0
    if name == "sub":
        return 1.0 if first else -1.0
    if name == "mul":
        return number if math.isfinite(number) else None
    return 1 / number if first and number != 0 and math.isfinite(number) else None


def _fits(eqn: Any, index: int, values: list) -> bool:
    """Whether a use is of the known form: the parameter where parameters stand, and data on the other side.

    A product with a constant, or a sum with another parameter, is a function of parameters alone and no use.
    """
    name, others = eqn.primitive.name, [v for i, v in enumerate(values) if i != index]
    if any(isinstance(v, Known) and v.params for v in others):
        return False
    if name == "gather":
        return index == 0 and lookup(eqn.params, eqn.invars[0].aval.shape).row is not None
    if name == "conv_general_dilated":
        return index == 1
    if name == "ragged_dot_general":
        return index == 1 and is_plain_ragged(eqn)
    return name == "dot_general" or not any(isinstance(v, Known) or _is_number(v) for v in others)


def _use(eqn: Any, index: int, values: list, way: Way) -> Any:
    view, name = values[index], eqn.primitive.name
    inputs = tuple(_as_data(plain(v)) for i, v in enumerate(values) if i != index)

    def output():
        return way.bind(eqn, list(map(plain, values)))[0]

    if name == "sub" and index == 1:
        # x - w is x + (-w): the cotangent of a bias is that of a sum.
        return way.use(view.scaled(view.value, -1.0), "bias", eqn, index, output, jnp.add, inputs)
    return way.use(view, _USES[name], eqn, index, output, functools.partial(_applied, eqn, index), inputs)


def _beside(eqn: Any, index: int, values: list, way: Way) -> Any:
    """A parameter that is a part of an array is added to nothing."""
    output = functools.partial(way.beside, values[index], eqn, values)
    return way.use(values[index], "bias", eqn, index, output, _itself, ())


def _itself(operand: Any) -> Any:
    return operand


def _as_data(x: Any) -> Any:
    return x if isinstance(x, Data) else jnp.asarray(x)


def _applied(eqn: Any, index: int, operand: Any, *others: Any) -> Any:
    """The output of a use, linear in its operand."""
    values = [*others[:index], operand, *others[index:]]
    inside = [brought_to(x, var.aval.sharding) for x, var in zip(values, eqn.invars, strict=True)]
    return brought_out(bind(eqn, inside)[0])

"""How K-FAC's blocks use their parameters, as data: layout operations by name, from a closed list.

A restored use arranges gradients as the saved one did. It cannot run the model: the operation itself is not kept.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support.jax_internals import PLACES, equation
from fisher_jax._tracing.uses import Experts, Segment, Step, Use
from fisher_jax.checkpoint.facts import DamagedError, check

_TEXTS = ("kind", "primitive", "where")
_OPTIONS = ("dimension_numbers", "feature_group_count", "batch_group_count")
_MOVES = (
    "transpose",
    "reshape",
    "broadcast_in_dim",
    "squeeze",
    "convert_element_type",
    "slice",
    "split",
    "unstack",
    "rev",
    "reduce_precision",
    "tile",
)
# What these do to numbers is nothing.
_PLACES = ("copy", "copy_p", "sharding_constraint", "layout_constraint", "reshard", "mesh_cast", "pvary", "pcast")


def fields(use: Use) -> dict[str, Any]:
    """
    Raises:
        TypeError: a layout operation that is not known here.
    """
    options = _OPTIONS if use.kind in ("dense", "conv") else ()
    return {
        **{name: getattr(use, name) for name in _TEXTS}, "segments": tuple(map(_chain, use.segments)),
        "loops": use.loops, "operand": _shape(use.operand), "roles": use.roles, "index": use.index,
        "options": {name: _data(use.options[name]) for name in options if name in use.options} | _experts(use),
        "signature": _data(use.signature),
    }  # fmt: skip


def _chain(segment: Segment) -> dict[str, Any]:
    steps = [step for step in segment.steps if step.eqn.primitive.name not in _PLACES]
    return {"source": _shape(segment.source), "steps": tuple(map(_step, steps))}


def _shape(x: Any) -> dict[str, Any]:
    return {"shape": tuple(int(n) for n in x.shape), "dtype": jnp.dtype(x.dtype).name}


def _step(step: Step) -> dict[str, Any]:
    name = step.eqn.primitive.name
    if name not in _MOVES:
        raise TypeError(f"the layout operation {name} of a parameter cannot be saved")
    params = {key: _data(x) for key, x in step.eqn.params.items() if key not in PLACES}
    return {"operation": name, "params": params, "source": _shape(step.eqn.invars[0].aval), "output": step.output}


def _data(x: Any) -> Any:
    if x is None or type(x) in (bool, int, float, str):
        return x
    if isinstance(x, jax.lax.ConvDimensionNumbers):
        return {"convolution": (tuple(x.lhs_spec), tuple(x.rhs_spec), tuple(x.out_spec))}
    if isinstance(x, tuple | list):
        return tuple(_data(part) for part in x)
    if isinstance(x, int | np.integer):
        return int(x)
    try:
        return {"dtype": jnp.dtype(x).name}
    except TypeError:
        raise TypeError(f"{type(x).__name__} in a layout operation of a parameter cannot be saved") from None


def rebuilt(found: dict[str, Any]) -> Use:
    """
    Raises:
        DamagedError: not what `fields` gives.
    """
    try:
        texts = {name: found[name] for name in _TEXTS}
        tuples = {name: tuple(found[name]) for name in ("loops", "roles", "signature")}
        options = {name: _value(x) for name, x in found["options"].items() if name != "experts"}
        described: dict[str, Any] = {**texts, **tuples, "index": found["index"], "options": options}
        segments = tuple(map(_segment, found["segments"]))
        experts = _restored_experts(found["options"]["experts"]) if "experts" in found["options"] else None
        use = Use(segments=segments, operand=_struct(found["operand"]), apply=None, experts=experts, **described)
        names = (*texts.values(), *use.loops, *use.roles)
        numbers = (use.index, *use.signature)
        known = all(type(x) is str for x in names) and all(type(x) in (int, str) for x in numbers)
    except Exception as error:
        raise DamagedError(f"the use of a parameter is not described ({type(error).__name__})") from error
    check(known, "the use of a parameter is not described")
    return use


def _experts(use: Use) -> dict[str, Any]:
    """Among the options, which older files have too."""
    return {} if use.experts is None else {"experts": dataclasses.asdict(use.experts)}


def _restored_experts(found: dict[str, Any]) -> Experts:
    outputs, inputs, by_input = (found[name] for name in ("outputs", "inputs", "by_input"))
    check(all(type(i) is int for i in (*outputs, *inputs)) and type(by_input) is bool, "experts are not described")
    return Experts(tuple(outputs), tuple(inputs), by_input)


def _segment(found: dict[str, Any]) -> Segment:
    source = _struct(found["source"])
    return Segment(source, tuple(_restored_step(step) for step in found["steps"]))


def _restored_step(found: dict[str, Any]) -> Step:
    check(found["operation"] in _MOVES, "an operation is not known")
    params = {key: _value(x) for key, x in found["params"].items()}
    eqn = equation(found["operation"], params, _struct(found["source"]))
    output = found["output"]
    check(type(output) is int and 0 <= output < len(eqn.outvars), "an operation has no such output")
    return Step(eqn, output)


def _struct(found: dict[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(found["shape"]), jnp.dtype(found["dtype"]))


def _value(x: Any) -> Any:
    if isinstance(x, dict):
        ((kind, value),) = x.items()
        return jnp.dtype(value) if kind == "dtype" else jax.lax.ConvDimensionNumbers(*value)
    return tuple(_value(part) for part in x) if isinstance(x, tuple | list) else x

"""Following every parameter through a traced program, to where it meets data.

A program is evaluated equation by equation. A parameter is a `View` until it is used: the chain of layout operations
that it went through, and its present value. The `Recorder` meets every use, first to note it (probing), then to hand
its perturbation to it.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._support.jax_internals import (
    Loop,
    Remat,
    bind,
    called,
    has_constants,
    is_literal,
    lookup,
    loop,
    opened,
    rematerialised,
)
from fisher_jax._tracing.provenance import Known, Step, View, alike, plain
from fisher_jax._tracing.recorder import Recorder

__all__ = ["LAYOUT", "evaluate"]

# Operations that only move a parameter's numbers around, or change their type.
LAYOUT = {
    "transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p",
    "sharding_constraint", "slice", "split", "unstack", "rev", "reduce_precision", "layout_constraint", "reshard",
    "mesh_cast", "pvary", "pcast",
}  # fmt: skip

# Where a parameter meets data: the kind of tap, by primitive.
_USES = {
    "dot_general": "dense", "gather": "embedding", "mul": "scale", "add": "bias", "add_any": "bias", "sub": "bias",
    "conv_general_dilated": "conv",
}  # fmt: skip


def evaluate(traced: Any, args: list, recorder: Recorder) -> list:
    """Evaluate a traced function; parameters among the arguments and results are `View`s."""
    body, constants = opened(traced)
    env: dict = dict(zip(body.inputs, [*constants, *args], strict=True))

    def read(atom):
        return atom.val if is_literal(atom) else env[atom]

    for eqn in body.equations:
        values = [read(atom) for atom in eqn.invars]
        if any(isinstance(v, View) for v in values):
            outs = _meet(eqn, values, recorder)
        else:
            outs = bind(eqn, list(map(plain, values)))
        if all(isinstance(v, View | Known) or _is_number(v) for v in values) and not has_constants(eqn):
            params = any(isinstance(v, View) or (isinstance(v, Known) and v.params) for v in values)
            outs = [x if isinstance(x, View | Known) else Known(x, params) for x in outs]
        env |= zip(eqn.outvars, outs, strict=True)
    return [read(atom) for atom in body.results]


def _is_number(x: Any) -> bool:
    """A number that stands in the program itself."""
    return not isinstance(x, View | Known | jax.Array) and np.ndim(x) == 0


def _meet(eqn: Any, values: list, recorder: Recorder) -> list:
    """An equation with a parameter among its operands."""
    name = eqn.primitive.name
    views = [i for i, v in enumerate(values) if isinstance(v, View)]
    first = values[views[0]]
    if (inner := called(eqn)) is not None:
        return evaluate(inner, values, recorder)
    if (remat := rematerialised(eqn)) is not None:
        return _remat(eqn, remat, values, recorder)
    if (scan := loop(eqn)) is not None:
        return _scan(eqn, scan, values, recorder)
    if name == "stop_gradient":
        return bind(eqn, [first.value])
    if name == "name":
        return [first.scaled(bind(eqn, [first.value])[0])]
    if name in LAYOUT and len(values) == 1:
        outs = bind(eqn, [first.value])
        if all(map(functools.partial(_stays_a_parameter, first.value), outs)):
            return [first.through(x, Step(eqn, i)) for i, x in enumerate(outs)]
    factor = _factor(name, values)
    if factor is not None:
        return [first.scaled(bind(eqn, list(map(plain, values)))[0], factor)]
    if name in _USES and len(views) == 1 and _fits(eqn, views[0], values):
        return [_use(eqn, views[0], values, recorder)]
    return bind(eqn, [recorder.generic(v, eqn) for v in values])


def _stays_a_parameter(before: Array, after: Array) -> bool:
    """Whether a tap can follow a parameter through a layout operation.

    Cast to integers it has no gradient; a complex one is no longer a real parameter. Where Explicit axes turn into
    Auto ones (``x.at[i].get(out_sharding=...)`` does it inside) a perturbation from outside has another type.
    """
    same_mesh = jax.typeof(before).sharding.mesh == jax.typeof(after).sharding.mesh
    return same_mesh and bool(jnp.issubdtype(after.dtype, jnp.floating))


def _factor(name: str, values: list) -> float | None:
    """``f`` where the equation is ``f * parameter + constant`` with numbers of the program; otherwise ``None``."""
    if name == "neg":
        return -1.0
    if name not in ("add", "sub", "mul", "div") or sum(map(_is_number, values)) != 1:
        return None
    first = isinstance(values[0], View)
    number = float(values[1 if first else 0])
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
        return index == 0 and lookup(eqn.params, eqn.invars[0].aval.shape).whole
    if name == "conv_general_dilated":
        return index == 1
    return name == "dot_general" or not any(isinstance(v, Known) or _is_number(v) for v in others)


def _use(eqn: Any, index: int, values: list, recorder: Recorder) -> Array:
    view, name = values[index], eqn.primitive.name
    inputs = tuple(jnp.asarray(plain(v)) for i, v in enumerate(values) if i != index)
    output = bind(eqn, list(map(plain, values)))[0]

    def apply(operand, *others):
        return bind(eqn, [*others[:index], operand, *others[index:]])[0]

    if name == "sub" and index == 1:
        # x - w is x + (-w): the cotangent of a bias is that of a sum.
        return recorder.use(view.scaled(view.value, -1.0), "bias", eqn, index, output, jnp.add, inputs)
    return recorder.use(view, _USES[name], eqn, index, output, apply, inputs)


def _remat(eqn: Any, remat: Remat, values: list, recorder: Recorder) -> list:
    """Keep a rematerialised part rematerialised; its perturbations become arguments."""
    shell = [dataclasses.replace(v, value=None) if isinstance(v, View | Known) else None for v in values]

    def body(inner, arrays):
        args = [a if s is None else dataclasses.replace(s, value=a) for s, a in zip(shell, arrays, strict=True)]
        outs = [inner.generic(v, eqn) for v in evaluate(remat.traced, args, inner)]
        return outs, inner.inputs

    arrays = list(map(plain, values))
    if recorder.probing:
        probe = Recorder(recorder.reduce)
        outs, _ = body(probe, arrays)
        recorder.nested.append(probe)
        recorder.specs += probe.specs
        return outs
    probe = next(recorder.nested)
    perturbations = [next(recorder.perturbations) for _ in probe.specs]
    run = jax.checkpoint(lambda p, a: body(probe.replay(p), a), policy=remat.policy, prevent_cse=remat.prevent_cse)
    outs, inputs = run(perturbations, arrays)
    recorder.inputs += inputs
    return outs


def _scan(eqn: Any, scan: Loop, values: list, recorder: Recorder) -> list:
    """A loop: perturbations and inputs of its body are stacked over the iterations."""
    num_consts, num_carry = scan.num_consts, scan.num_carry
    head = num_consts + num_carry
    consts, xs = values[:num_consts], values[head:]
    carry = [recorder.generic(v, eqn) for v in values[num_consts:head]]
    probes: list[Recorder] = []

    def inside(part, slices, loop):
        return [v.inside(a, loop) if isinstance(v, View) else alike(v, a) for v, a in zip(part, slices, strict=True)]

    def body(carry, x):
        perturbations, slices = x
        inner = Recorder(recorder.reduce) if probe is None else probe.replay(perturbations)
        if probe is None:
            probes.append(inner)  # it keeps shapes; the other one has arrays of this trace
        args = [*inside(consts, map(plain, consts), "shared"), *carry, *inside(xs, slices, "stacked")]
        outs = [inner.generic(v, eqn) for v in evaluate(scan.traced, args, inner)]
        return outs[:num_carry], (outs[num_carry:], inner.inputs)

    probe = None if recorder.probing else next(recorder.nested)
    perturbations = [] if probe is None else [next(recorder.perturbations) for _ in probe.specs]
    carry, (ys, inputs) = jax.lax.scan(
        body,
        carry,
        (perturbations, list(map(plain, xs))),
        length=scan.length,
        reverse=scan.reverse,
        unroll=scan.unroll,
    )
    if recorder.probing:
        recorder.nested.append(probes[-1])
        recorder.specs += [spec.stacked(scan.length) for spec in probes[-1].specs]
    recorder.inputs += inputs
    return [*carry, *ys]

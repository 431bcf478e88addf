"""Which dense use gives the outputs of a model (its head), and which bias is added to which dense output.

A walk over the model's jaxpr that follows two things: parameters through layout operations, and the output of each
dense use through operations that keep its entries where they are. `fisher_jax._tracing.readout` asks for more, and
finds less: the product itself and what runs before it, behind nothing but a bias and a soft cap.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisher_jax._support.jax_internals import convolution, inside, is_literal, loop, opened
from fisher_jax._tracing.tracing import LAYOUT

__all__ = ["Structure", "structure"]

# What a parameter goes through and stays one, in one piece and in order.
_LAYOUT = LAYOUT - {"split", "unstack", "rev"} | {"name", "optimization_barrier"}
# Keep the entries of an array in row-major order.
_IN_PLACE = _LAYOUT - {"transpose", "slice", "broadcast_in_dim"}
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "neg", "tanh", "logistic", "exp", "log", "max", "min", "pow", "integer_pow", "sqrt",
    "rsqrt", "erf", "select_n", "abs", "sin", "cos", "log1p", "expm1", "clamp", "log2", "one_minus_square",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Tag:
    """``param``; ``dense``: the output of a dense use itself; ``after``: an elementwise function of it; ``channels``:
    the output of a convolution whose channels are not its last axis."""

    kind: str
    leaf: int


@dataclasses.dataclass
class Structure:
    """What the walk found.

    Attributes:
        head: leaf whose dense use gives the outputs, each output from its own position alone; ``None`` if there is
            none.
        head_is_last: whether nothing but a bias stands between that use and the outputs (no soft cap).
        biases: leaf of a bias, by the leaf of the kernel to whose output it is added.
    """

    head: int | None = None
    head_is_last: bool = False
    biases: dict[int, int] = dataclasses.field(default_factory=dict)


def structure(apply_fn: Callable, params: Any, inputs: Any) -> Structure:
    """Walk the jaxpr of ``apply_fn(params, inputs)``."""
    leaves, treedef = jax.tree.flatten(params)
    traced = jax.make_jaxpr(lambda leaves, inputs: apply_fn(jax.tree.unflatten(treedef, leaves), inputs))(
        leaves, inputs
    )
    tags: list[_Tag | None] = [
        _Tag("param", i) if jnp.issubdtype(x.dtype, jnp.floating) else None for i, x in enumerate(leaves)
    ]
    tags += [None] * len(jax.tree.leaves(inputs))
    found = Structure()
    (out,) = _walk(traced, tags, found)
    if out is not None and out.kind in ("dense", "after"):
        found.head, found.head_is_last = out.leaf, out.kind == "dense"
    return found


def _walk(traced: Any, tags: list[_Tag | None], found: Structure) -> list[_Tag | None]:
    body, _ = opened(traced)
    env = {var: tag for var, tag in zip(body.arguments, tags, strict=True) if tag is not None}

    def read(atom):
        return None if is_literal(atom) else env.get(atom)

    for eqn in body.equations:
        given = [read(atom) for atom in eqn.invars]
        if any(tag is not None for tag in given):
            env |= {v: t for v, t in zip(eqn.outvars, _equation(eqn, given, found), strict=True) if t is not None}
    return [read(atom) for atom in body.results]


def _equation(eqn: Any, given: list[_Tag | None], found: Structure) -> list[_Tag | None]:
    name = eqn.primitive.name
    nothing: list[_Tag | None] = [None] * len(eqn.outvars)
    if (scan := loop(eqn)) is not None:
        # Inside a loop there are biases, but no head.
        _walk(scan.traced, [t if t and t.kind == "param" else None for t in given], found)
        return nothing
    if (inner := inside(eqn)) is not None:
        return _walk(inner, given, found)
    if name == "unstack":
        return [given[0] if given[0] and given[0].kind == "param" else None] * len(eqn.outvars)
    if len(eqn.outvars) != 1:
        return nothing
    if name == "dot_general":
        params = [t for t in given if t is not None and t.kind == "param"]
        return [_Tag("dense", params[0].leaf)] if len(params) == 1 else [None]
    if name == "conv_general_dilated":
        params = [t for t in given if t is not None and t.kind == "param"]
        if params != given[1:]:
            return [None]
        last = eqn.outvars[0].aval.ndim - 1
        in_order = convolution(eqn.params).outputs == (0, last, *range(1, last))
        return [_Tag("dense" if in_order else "channels", params[0].leaf)]
    if name in _LAYOUT:
        (tag,) = given[:1]
        if tag is not None and tag.kind != "param" and name not in _IN_PLACE:
            return [None]
        return [tag]
    return [_elementwise(eqn, given, found)] if name in _ELEMENTWISE else [None]


def _elementwise(eqn: Any, given: list[_Tag | None], found: Structure) -> _Tag | None:
    shape = eqn.outvars[0].aval.shape
    outputs = [t for t, x in zip(given, eqn.invars, strict=True) if t and t.kind != "param" and x.aval.shape == shape]
    biases = [t for t in given if t is not None and t.kind == "param"]
    if len(outputs) != 1:
        return None
    (output,) = outputs
    if (
        eqn.primitive.name == "add"
        and output.kind in ("dense", "channels")
        and len(biases) == 1
        and output.leaf not in found.biases
    ):
        found.biases[output.leaf] = biases[0].leaf
        return output
    return None if output.kind == "channels" else _Tag("after", output.leaf)

"""The head of a model: the product that its outputs come from, found in the program itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.jax_internals import Body, contraction, is_literal, opened, permutation, run
from fisher_jax._tracing.dense import operand_axes
from fisher_jax._tracing.provenance import Segment, Step, Use, View
from fisher_jax._tracing.recorder import Recorder, facts
from fisher_jax._tracing.tracing import LAYOUT, evaluate

__all__ = ["Readout", "readout"]

Tree = Any
_WAY_OUT = "use fj.lm_head.estimator(hidden_fn, head_fn), which is told hidden states and head"


@dataclasses.dataclass(frozen=True)
class Readout:
    """``outputs = soft_cap * tanh((hidden @ head.T + bias) / soft_cap)``.

    Attributes:
        leaf: index of the head among the leaves of the parameters.
        use: how it is used, a dense `Use`.
        soft_cap: or ``None``.
        parts: ``parts(params, inputs) -> (hidden [..., H], head [V, H], bias [V] | None)``; computes no outputs.
    """

    leaf: int
    use: Use
    soft_cap: float | None
    parts: Callable[[Tree, Any], tuple[Array, Array, Array | None]]


def readout(apply_fn: Callable, params: Tree, inputs: Any) -> Readout:
    """Follow the outputs back to a product with a parameter.

    Raises:
        ValueError: outputs that come from anything else.
    """
    leaves = jax.tree.leaves(params)
    traced, shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, inputs)
    number = len(leaves)

    def flat(*arrays):
        views = [
            View.of(x, i) if i < number and jnp.issubdtype(x.dtype, jnp.floating) else x for i, x in enumerate(arrays)
        ]
        recorder = Recorder(None)
        outs = evaluate(traced, views, recorder)
        return [recorder.generic(x, None) for x in outs]

    # Traced once more without inner functions around parameters.
    body, constants = opened(jax.make_jaxpr(flat)(*jax.tree.leaves((params, inputs))))
    if len(body.results) != 1 or not hasattr(shape, "shape"):
        raise ValueError(f"estimator='head' needs one array of outputs; {_WAY_OUT}")
    walk = _Walk(body, number)
    product, index, bias, soft_cap = walk.to_product(body.results[0])
    leaf, use = walk.use(product, index)
    if operand_axes(use)[0] or index == 0:
        raise ValueError(f"the product at the outputs is no plain hidden @ head; {_WAY_OUT}")
    position = body.equations.index(product)
    wanted = [product.invars[0], product.invars[1], *([] if bias is None else [bias])]
    before = dataclasses.replace(body, equations=body.equations[:position], results=wanted)
    lead, contracted = shape.shape[:-1], contraction(product.params).contracted[0]

    def parts(params, inputs):
        hidden, kernel, *rest = run(before, [*constants, *jax.tree.leaves((params, inputs))])
        _, rows, outputs = operand_axes(use)
        width = hidden.size // max(1, _size(lead))
        head = jnp.transpose(kernel, (*outputs, *rows)).reshape(-1, width)
        kept = [i for i in range(hidden.ndim) if i not in contracted]
        hidden = jnp.transpose(hidden, (*kept, *contracted)).reshape(*lead, width)
        return hidden, head, rest[0].reshape(-1) if rest else None

    return Readout(leaf, use, soft_cap, parts)


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


class _Walk:
    """Backwards through the equations of a flat program."""

    def __init__(self, body: Body, number: int):
        self.makers = {var: eqn for eqn in body.equations for var in eqn.outvars}
        self.params = {var: i for i, var in enumerate(body.arguments[:number])}

    def to_product(self, var: Any) -> tuple[Any, int, Any, float | None]:
        """The product, which operand is the parameter, the bias and the soft cap."""
        bias, soft_cap = None, None
        while True:
            eqn: Any = self.makers.get(var)
            name = "an input" if eqn is None else eqn.primitive.name
            if name == "dot_general":
                for index in (1, 0):
                    if self.leaf(eqn.invars[index]) is not None:
                        return eqn, index, bias, soft_cap
            same = eqn is not None and _keeps_outputs(eqn)
            if same and name in LAYOUT:
                var = eqn.invars[0]
            elif name == "add" and bias is None and any(self.leaf(x) is not None for x in eqn.invars):
                side = 0 if self.leaf(eqn.invars[0]) is not None else 1
                bias, var = self.vector(eqn.invars[side], eqn.outvars[0].aval.shape[-1]), eqn.invars[1 - side]
            elif name == "mul" and soft_cap is None and bias is None:
                soft_cap, var = self.capped(eqn)
            else:
                raise ValueError(
                    f"estimator='head' follows the outputs back to hidden @ head (+ bias, capped by c * tanh(z / c)) "
                    f"and found {name}; {_WAY_OUT}"
                )

    def leaf(self, var: Any) -> int | None:
        """The parameter that a variable is, after layout operations."""
        while not is_literal(var) and var not in self.params:
            eqn = self.makers.get(var)
            if eqn is None or eqn.primitive.name not in LAYOUT:
                return None
            var = eqn.invars[0]
        return None if is_literal(var) else self.params[var]

    def vector(self, var: Any, size: int) -> Any:
        """The bias as a parameter, before it was broadcast to every token."""
        while var not in self.params:
            var = self.makers[var].invars[0]
        if var.aval.size != size:
            raise ValueError(f"the bias of the outputs has shape {list(var.aval.shape)}, not [{size}]; {_WAY_OUT}")
        return var

    def capped(self, eqn: Any) -> tuple[float, Any]:
        """``c`` and ``z`` of ``c * tanh(z / c)``."""
        numbers = [x for x in eqn.invars if is_literal(x)]
        others = [x for x in eqn.invars if not is_literal(x)]
        tanh = self.makers.get(others[0]) if len(numbers) == 1 else None
        inner = self.makers.get(tanh.invars[0]) if tanh is not None and tanh.primitive.name == "tanh" else None
        if inner is not None and inner.primitive.name in ("div", "mul") and is_literal(inner.invars[1]):
            cap, factor = float(numbers[0].val), float(inner.invars[1].val)
            if abs((factor if inner.primitive.name == "div" else 1 / factor) / cap - 1) < 1e-6:
                return cap, inner.invars[0]
        raise ValueError(f"the outputs are a product by a number that is no soft cap c * tanh(z / c); {_WAY_OUT}")

    def use(self, eqn: Any, index: int) -> tuple[int, Use]:
        """The facts of the product's use of the parameter."""
        steps, var = [], eqn.invars[index]
        while var not in self.params:
            maker = self.makers[var]
            steps.append(Step(maker, maker.outvars.index(var)))
            var = maker.invars[0]
        source, operand = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in (var, eqn.invars[index]))
        view = View(operand, self.params[var], (Segment(source, tuple(reversed(steps))),))
        return view.leaf, facts(view, "dense", eqn, index, lambda *_: None)


def _keeps_outputs(eqn: Any) -> bool:
    """Whether the last axis is the same before and after, and the tokens keep their order."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    name = eqn.primitive.name
    if name in ("slice", "split", "unstack", "rev", "broadcast_in_dim"):
        return False
    if name == "transpose":
        return permutation(eqn) == tuple(range(len(before)))
    return bool(before and after and before[-1] == after[-1])

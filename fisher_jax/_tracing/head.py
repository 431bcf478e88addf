"""A softmax head in closed form: its hidden states, kernel and bias, without the outputs."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.jax_internals import Loop, Remat, bind, contraction
from fisher_jax._tracing.dense import operand_axes
from fisher_jax._tracing.program import Program
from fisher_jax._tracing.replay import Replay, zero
from fisher_jax._tracing.structure import Head, Structure
from fisher_jax._tracing.survey import Survey
from fisher_jax._tracing.tracing import evaluate
from fisher_jax._tracing.uses import Spec, View, plain

__all__ = ["Parts", "head_of", "parts"]

_WAY_OUT = "use fj.lm_head.estimator(hidden_fn, head_fn), which is told hidden states and head"


def head_of(structure: Structure) -> Head:
    """The head of a model whose outputs are ``soft_cap * tanh(scale * (hidden @ head.T + bias) / soft_cap)``.

    Raises:
        ValueError: outputs that come from anything else.
    """
    head = structure.head
    if head is None or head.other is not None:
        found = structure.headless if head is None else head.other
        raise ValueError(
            "estimator='head' follows the outputs back to s * (hidden @ head + bias), capped by c * tanh(z / c), and "
            f"found {found}; {_WAY_OUT}"
        )
    if head.use.kind != "dense" or any(head.use.operand.shape[i] != 1 for i in operand_axes(head.use)[0]):
        raise ValueError(f"the product at the outputs is not a plain hidden @ head; {_WAY_OUT}")
    return head


@dataclasses.dataclass(frozen=True)
class Parts:
    """``outputs = hidden [..., H] @ head [V, H].T + bias [V]``, with ``head = factor * leaf + constant``.

    A scale of the outputs is in the hidden states and the bias.
    """

    hidden: Array
    head: Array
    bias: Array | None
    factor: float


def parts(program: Program) -> Parts:
    """The head's own arrays of a program; its outputs are not computed."""
    head = head_of(program.structure)
    hidden, kernel = (_met_in_loops if head.use.loops else _met)(program, head)
    apart, rows, outputs = operand_axes(head.use)
    width = math.prod(head.use.operand.shape[i] for i in rows)
    met = contraction(head.use.options)
    contracted = [len(head.use.loops) + i for i in met.contracted[1 - head.use.index]]
    kept = [i for i in range(hidden.ndim) if i not in contracted]
    tokens = jnp.transpose(hidden, (*kept, *contracted))
    (out,) = program.structure.outputs
    if head.tokens is not None:
        tokens = tokens.reshape(-1, width)[head.tokens]
    matrix = jnp.transpose(kernel, (*apart, *outputs, *rows)).reshape(-1, width)
    bias = None if head.bias is None else program.leaves[head.bias]
    if bias is not None and bias.size != out.shape[-1]:
        raise ValueError(f"the bias of the outputs has shape {list(bias.shape)}, not [{out.shape[-1]}]; {_WAY_OUT}")
    flat = None if bias is None else bias.reshape(-1)
    if head.scale != 1:
        tokens, flat = head.scale * tokens, None if flat is None else head.scale * flat
    return Parts(tokens.reshape(*out.shape[:-1], width), matrix, flat, head.use.factor)


def _met(program: Program, head: Head) -> tuple[Array, Array]:
    """What the head meets, and its kernel."""
    way = _Until.of(head.use.order, program.structure.survey)
    try:
        program.replayed(program.leaves, program.arguments, way)
    except _ReachedError as reached:
        return reached.hidden, reached.kernel
    raise AssertionError("a use that a survey found is in the program")


def _met_in_loops(program: Program, head: Head) -> tuple[Array, Array]:
    """The same, what it meets in every iteration of the loops around it."""
    if not head.use.moved:
        raise ValueError(f"the head is changed before the loop in which it is used at {head.use.where}; {_WAY_OUT}")
    own = program.structure.uses(head.leaf)
    way = Replay(program.structure.survey, iter([zero(spec, None) for spec in own]), head.leaf.__eq__, None)
    program.replayed(program.leaves, program.arguments, way)
    (index,) = [i for i, spec in enumerate(own) if spec.use.order == head.use.order]
    kernel = functools.reduce(lambda x, segment: segment(x), head.use.segments, program.leaves[head.leaf])
    return way.inputs[index][0], kernel


class _ReachedError(Exception):
    """The head was met; what it meets, and the kernel."""

    def __init__(self, hidden: Array, kernel: Array):
        super().__init__()
        self.hidden, self.kernel = hidden, kernel


@dataclasses.dataclass
class _Until:
    """Runs a program up to one use."""

    order: int
    own: Iterator[Spec]
    parts: Iterator[Survey]
    lookups: Iterator[Any]

    @classmethod
    def of(cls, order: int, survey: Survey) -> "_Until":
        return cls(order, iter(survey.own), iter(survey.parts), iter(survey.lookups))

    def constant(self, value: Any) -> Any:
        return value

    def bind(self, eqn: Any, values: list) -> list:
        return bind(eqn, list(map(plain, values)))

    def use(self, view: View, kind: str, eqn: Any, index: int, output: Any, apply: Any, inputs: tuple) -> Any:
        if next(self.own).use.order == self.order:
            raise _ReachedError(inputs[0], view.value)
        return output()

    def instead(self, eqn: Any, values: list) -> Any:
        return next(self.lookups)

    def beside(self, view: View, eqn: Any, values: list) -> Any:
        return view.value

    def generic(self, x: Any, eqn: Any) -> Any:
        if isinstance(x, View):
            next(self.own)
        return plain(x)

    def remat(self, eqn: Any, remat: Remat, values: list) -> list:
        inner = _Until.of(self.order, next(self.parts))
        return [inner.generic(v, eqn) for v in evaluate(remat.traced, values, inner)]

    def scan(self, eqn: Any, scan: Loop, values: list) -> list:
        for x in values[scan.num_consts : scan.num_consts + scan.num_carry]:
            self.generic(x, eqn)
        next(self.parts)
        return self.bind(eqn, values)

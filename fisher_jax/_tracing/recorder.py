"""Meeting the uses of parameters: to note them, or to put a perturbation beside each."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.jax_internals import (
    Body,
    abstract,
    contraction,
    convolution,
    lookup,
    opened,
    run,
    user_line,
    zeros,
)
from fisher_jax._tracing.provenance import Spec, Use, View, plain, signature

__all__ = ["Recorder", "facts", "zero"]

Tree = Any


@dataclasses.dataclass
class Recorder:
    """Meets every use in program order: notes it (probing), or hands its perturbation to it.

    Attributes:
        reduce: ``reduce(leaf, use, inputs, cotangent)``, what is kept of a use in place of its inputs and cotangent.
        perturbations: one for each use; ``None`` while probing.
        nested: recorders that probed the rematerialised parts and loops, in order; filled while probing.
    """

    reduce: Callable | None
    perturbations: Any = None
    nested: Any = dataclasses.field(default_factory=list)
    specs: list[Spec] = dataclasses.field(default_factory=list)
    inputs: list[tuple] = dataclasses.field(default_factory=list)

    @property
    def probing(self) -> bool:
        return self.perturbations is None

    def replay(self, perturbations: list) -> "Recorder":
        """A recorder for the same program, with perturbations."""
        return Recorder(self.reduce, iter(perturbations), iter(self.nested))

    def use(
        self,
        view: View,
        kind: str,
        eqn: Any,
        index: int,
        output: Array,
        apply: Callable | None,
        inputs: tuple[Array, ...],
    ) -> Array:
        """``output``, after the perturbation; the parameter is operand ``index`` of the equation."""
        reduce = None
        if self.probing or self.reduce is not None:
            own = facts(view, kind, eqn, index, apply)
            reduce = self.reduce and functools.partial(self.reduce, view.leaf, own)
        if self.probing:
            shapes = tuple(map(abstract, inputs))
            result = abstract(output) if reduce is None else _result(reduce, shapes, abstract(output))
            self.specs.append(Spec(view.leaf, own, abstract(output), shapes, result))
            return output
        if reduce is None:
            self.inputs.append(inputs)
            return _tapped(None, view.factor, output, None, next(self.perturbations))
        backward, constants = _Reduction.trace(reduce, inputs, output)
        kept = jax.lax.stop_gradient((inputs, constants))
        return _tapped(backward, view.factor, output, kept, next(self.perturbations))

    def generic(self, x: Any, eqn: Any) -> Any:
        """A parameter where no tap fits: its own perturbation, and plain data from here on."""
        return self.use(x, "generic", eqn, 0, x.value, None, ()) if isinstance(x, View) else plain(x)


def zero(spec: Spec) -> Tree:
    """The perturbation of a use; its gradient is the tap."""
    return jax.tree.map(zeros, spec.result)


def facts(view: View, kind: str, eqn: Any, index: int, apply: Callable | None) -> Use:
    """The static facts of a use of a view."""
    name, where = ("output", "") if eqn is None else (eqn.primitive.name, user_line(eqn))
    operand, chain = abstract(view.value), (view.segments, view.loops)
    if apply is None:
        return Use(kind, name, where, *chain, operand, None)
    roles, key = _roles(eqn, kind, index), (index, *signature(eqn))
    return Use(kind, name, where, *chain, operand, apply, roles, index, eqn.params, key)


def _roles(eqn: Any, kind: str, index: int) -> tuple[str, ...]:
    """What each axis of operand ``index`` is, see `Use`."""
    axes, params = range(len(eqn.invars[index].aval.shape)), eqn.params
    if kind == "dense":
        contracted, batch = (sides[index] for sides in contraction(params))
        return tuple("column" if i in contracted else "both" if i in batch else "row" for i in axes)
    if kind == "embedding":
        rows = lookup(params, eqn.invars[index].aval.shape).axes
        return tuple("row" if i in rows else "column" for i in axes)
    if kind == "conv":
        conv = convolution(params)
        out, inside, *_ = conv.kernel
        grouped = conv.groups != 1 or conv.batch_groups != 1
        return tuple(
            "row" if i == out else "window" if i != inside else "grouped" if grouped else "column" for i in axes
        )
    return ("both" if kind == "scale" else "row",) * len(axes)


def _result(reduce: Callable, inputs: tuple, cotangent: jax.ShapeDtypeStruct) -> Tree:
    result = jax.eval_shape(reduce, inputs, cotangent)
    for x in jax.tree.leaves(result):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"reduce= returns floating arrays, since they leave through a backward pass; found dtype {x.dtype}: "
                "convert it"
            )
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class _Reduction:
    """``reduce`` as a function of all that it reads: a backward pass cannot close over traced arrays."""

    body: Body
    structure: Any

    @classmethod
    def trace(cls, reduce: Callable, inputs: tuple, cotangent: Array) -> tuple["_Reduction", list]:
        traced, result = jax.make_jaxpr(reduce, return_shape=True)(inputs, cotangent)
        body, constants = opened(traced)
        return cls(body, jax.tree.structure(result)), constants

    def __call__(self, kept: tuple, cotangent: Array) -> Tree:
        inputs, constants = kept
        return jax.tree.unflatten(self.structure, run(self.body, [*constants, *inputs, cotangent]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tapped(reduction, factor, output, kept, perturbation):
    """``output``; the gradient of ``perturbation`` is what is kept of this use, formed in the backward pass."""
    del reduction, factor, kept, perturbation
    return output


def _tapped_forward(reduction, factor, output, kept, perturbation):
    del reduction, factor, perturbation
    return output, kept


def _tapped_backward(reduction, factor, kept, cotangent):
    own = cotangent if factor == 1 else cotangent * jnp.asarray(factor, cotangent.dtype)
    return cotangent, None, own if reduction is None else reduction(kept, own)


_tapped.defvjp(_tapped_forward, _tapped_backward)

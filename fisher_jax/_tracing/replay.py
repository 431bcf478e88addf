"""Going through a program once more, a perturbation beside every use of a parameter."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.dtypes import is_narrow, wide
from fisher_jax._support.jax_internals import (
    Body,
    Loop,
    Remat,
    abstract,
    bind,
    brought_out,
    brought_to,
    opened,
    run,
    stacked,
    unstacked,
    zeros,
)
from fisher_jax._tracing.survey import Survey
from fisher_jax._tracing.tracing import evaluate
from fisher_jax._tracing.uses import Known, Spec, View, alike, plain

__all__ = ["Replay", "zero"]

Tree = Any


@dataclasses.dataclass
class Replay:
    """Hands its perturbation to every use, in the order in which a survey met them.

    Gradients that a lookup or a loop adds up, of many tokens in one entry, are added up in float32 also where the
    parameter is narrow: 256 ones and one more are 256 in bfloat16. The values of the program stay what they are.

    Attributes:
        survey: of this program.
        perturbations: one for each use of a followed leaf, those inside of loops and of rematerialised parts among
            them.
        follow: whether a leaf is perturbed.
        reduce: ``reduce(spec, iteration, inputs, cotangent)``, what is kept of a use in place of its inputs and
            cotangent.
        iteration: of each of the loops around this part.
        inputs: of the uses, where nothing is reduced.
    """

    survey: Survey
    perturbations: Iterator
    follow: Callable[[int], bool]
    reduce: Callable | None
    iteration: tuple[Array, ...] = ()
    inputs: list[tuple] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self._own, self._parts = iter(self.survey.own), iter(self.survey.parts)
        self._lookups = iter(self.survey.lookups)

    def constant(self, value: Any) -> Any:
        return value

    def bind(self, eqn: Any, values: list) -> list:
        return bind(eqn, list(map(plain, values)))

    def instead(self, eqn: Any, values: list) -> Any:
        return next(self._lookups)

    def beside(self, view: View, eqn: Any, values: list) -> Array:
        return view.value

    def _inside(self, part: Survey, perturbations: list, *iteration: Array) -> "Replay":
        return Replay(part, iter(perturbations), self.follow, self.reduce, (*self.iteration, *iteration))

    def _perturbations_of(self, part: Survey) -> list:
        return [next(self.perturbations) for spec in part.specs if self.follow(spec.leaf)]

    def use(
        self, view: View, kind: str, eqn: Any, index: int, output: Callable, apply: Any, inputs: tuple[Array, ...]
    ) -> Array:
        """``output()``, after the perturbation."""
        spec, narrow = next(self._own), view.value.dtype
        if kind == "embedding" and is_narrow(narrow):
            found = self.bind(eqn, [wide(view.value), *inputs])[0].astype(narrow)
        else:
            found = output()
        if not self.follow(view.leaf):
            return found
        # Where Explicit axes of the mesh are Auto inside of a lookup, a perturbation is added outside.
        place, inputs = jax.typeof(found).sharding, tuple(map(brought_out, inputs))
        return brought_to(self._tapped(spec, view.factor, brought_out(found), inputs), place)

    def _tapped(self, spec: Spec, factor: float, found: Array, inputs: tuple[Array, ...]) -> Array:
        if self.reduce is None:
            self.inputs.append(inputs)
            return _tapped(None, factor, found, None, next(self.perturbations))
        backward, constants = _Reduction.trace(functools.partial(self.reduce, spec, self.iteration), inputs, found)
        kept = jax.lax.stop_gradient((inputs, constants))
        return _tapped(backward, factor, found, kept, next(self.perturbations))

    def generic(self, x: Any, eqn: Any) -> Any:
        """A parameter where no tap fits: its own perturbation, and plain data from here on."""
        return self.use(x, "generic", eqn, 0, lambda: x.value, None, ()) if isinstance(x, View) else plain(x)

    def remat(self, eqn: Any, remat: Remat, values: list) -> list:
        """A rematerialised part stays rematerialised; its perturbations become arguments."""
        shell = [dataclasses.replace(v, value=None) if isinstance(v, View | Known) else None for v in values]
        part = next(self._parts)

        def body(perturbations, arrays):
            inner = self._inside(part, perturbations)
            args = [a if s is None else dataclasses.replace(s, value=a) for s, a in zip(shell, arrays, strict=True)]
            outs = [inner.generic(v, eqn) for v in evaluate(remat.traced, args, inner)]
            return outs, inner.inputs

        repeated = jax.checkpoint(body, policy=remat.policy, prevent_cse=remat.prevent_cse)
        outs, inputs = repeated(self._perturbations_of(part), list(map(plain, values)))
        self.inputs += inputs
        return outs

    def scan(self, eqn: Any, scan: Loop, values: list) -> list:
        """A loop: perturbations and inputs of its body are stacked over the iterations."""
        first = scan.num_consts
        head = first + scan.num_carry
        consts, xs = values[:first], values[head:]
        carry = [self.generic(v, eqn) for v in values[first:head]]
        part = next(self._parts)

        def inside(part, slices, loop):
            pairs = zip(part, slices, strict=True)
            return [v.inside(a, loop) if isinstance(v, View) else alike(v, a) for v, a in pairs]

        shared = list(map(plain, consts))
        held = [wide(x) if is_narrow(jnp.result_type(x)) else x for x in shared]

        def body(carry, x):
            perturbations, slices, iteration = x
            inner = self._inside(part, perturbations, iteration)
            own = [x if x is y else x.astype(y.dtype) for x, y in zip(held, shared, strict=True)]
            args = [*inside(consts, own, "shared"), *carry, *inside(xs, slices, "stacked")]
            outs = [inner.generic(v, eqn) for v in evaluate(scan.traced, args, inner)]
            return outs[: scan.num_carry], (outs[scan.num_carry :], inner.inputs)

        scanned = (self._perturbations_of(part), list(map(plain, xs)), jnp.arange(scan.length, dtype=jnp.int32))
        carry, (ys, inputs) = jax.lax.scan(
            body, carry, scanned, length=scan.length, reverse=scan.reverse, unroll=scan.unroll
        )
        self.inputs += inputs
        return [*carry, *ys]


def zero(spec: Spec, reduce: Callable | None) -> Tree:
    """The perturbation of a use; its gradient is the tap, or what ``reduce`` makes of it."""
    if reduce is None:
        return zeros(spec.output)
    output, inputs = spec.output, spec.inputs
    for _ in spec.lengths:
        output, inputs = unstacked(output), tuple(map(unstacked, inputs))
    iteration = tuple(jax.ShapeDtypeStruct((), jnp.int32) for _ in spec.lengths)
    result = jax.eval_shape(functools.partial(reduce, spec), iteration, inputs, output)
    for x in jax.tree.leaves(result):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"reduce= returns floating arrays, since they leave through a backward pass; found dtype {x.dtype}: "
                "convert it"
            )
    for length in reversed(spec.lengths):
        result = jax.tree.map(functools.partial(stacked, length=length), result)
    return jax.tree.map(zeros, result)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reduction:
    """``reduce`` as a function of all that it reads: a backward pass cannot close over traced arrays."""

    body: Body
    structure: Any

    @classmethod
    def trace(cls, reduce: Callable, inputs: tuple, cotangent: Array) -> tuple["_Reduction", list]:
        shapes = tuple(map(abstract, inputs)), abstract(cotangent)
        traced, result = jax.make_jaxpr(reduce, return_shape=True)(*shapes)
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

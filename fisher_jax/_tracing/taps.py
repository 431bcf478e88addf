"""Capture: run a loss once, forward and backward, and hand back a tap for every use of every parameter.

The loss is traced to a jaxpr. Every parameter leaf is followed through layout and dtype operations to where it
meets data (`fisher_jax._tracing.tracing`); there a perturbation is put beside the result, and the loss is
differentiated with respect to the perturbations. No parameter gradient is formed, and the model and its value are
not changed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.outline import outline
from fisher_jax._tracing.program import Tap, differentiate, frozen, gradient_of_use, real_scalar, trace
from fisher_jax._tracing.structure import Structures
from fisher_jax._tracing.uses import Spec, Use

__all__ = ["Coverage", "Tap", "Use", "capture", "coverage", "gradients_from_taps", "value_grad_and_taps"]

Tree = Any


def capture(
    loss_fn: Callable, reduce: Callable | None = None, *, reduce_tap: Callable[[Tap], Tree] | None = None
) -> Callable:
    """``capture(loss_fn)(params, *args) -> (value, taps)``: the loss, and a tap for every use of every parameter.

    A use is ``y = op(w, x)``, linear in the parameter ``w`` (after pure layout and dtype operations, and arithmetic
    with numbers of the program: ``1 + w``, ``w / 2``, whose factor goes into the cotangent) and in the data ``x``.
    Its tap holds ``x`` and ``d loss / d y``; a parameter used twice has two taps. Recognised: ``dot_general``
    (``dense``), ``gather`` of whole slices (``embedding``), ``mul`` (``scale``), ``add`` and ``sub`` (``bias``),
    convolution (``conv``), ``ragged_dot`` (``ragged``); anything else, and every function of parameters alone (weight
    decay, weight normalisation, ``w + a b``), is ``generic``, with the gradient of the parameter at that place.
    Followed into ``jit``, ``checkpoint`` (which stays rematerialised) and ``scan``; in ``cond``, ``while``,
    ``shard_map``, custom derivatives and where Explicit mesh axes become Auto (``.at[i].get(out_sharding=...)``)
    parameters are generic.

    Leaves of integers, booleans and PRNG keys are frozen: no taps, and float0 zeros for gradients, as in
    ``jax.grad(allow_int=True)``. A leaf that no gradient can reach (unused, ``stop_gradient``) has no taps; a
    use whose result the loss ignores has a tap of zeros (also with ``reduce``, which is then not called).

    Args:
        loss_fn: ``loss_fn(params, *args, **kwargs)`` returns one real number. Use a *sum* over tokens where
            cotangents are to be per-token scores. Arguments are pytrees of arrays, traced as under ``jax.jit``;
            Python numbers stay what they are.
        reduce: ``reduce(inputs, cotangents)`` returns a tree of floating arrays; it is formed inside the backward
            pass of each use, so that rematerialised and scanned layers never hold their activations together. It
            sees one iteration of a loop at a time, and may close over traced arrays.
        reduce_tap: the same as a function of the whole `Tap`, for statistics that depend on the leaf or the use.

    Returns:
        ``(value, taps)``: a list of `Tap`, in program order. Leading axes of a tap are loops, see `Use`.

    Raises:
        ValueError: a loss that is not a real scalar, complex parameters, leaves that are no arrays, a reduction to
            integers, each naming the leaf or the argument; both ways to reduce.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
        >>> value, taps = fj.capture(loss)({"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
        >>> [(tap.path, tap.kind, tap.inputs[0].shape, tap.cotangents.shape) for tap in taps]
        [("['w']", 'dense', (4, 3), (4, 2))]
    """
    kept, structures = _reduction(reduce, reduce_tap), Structures()

    def run(params: Tree, *args: Any, **kwargs: Any) -> tuple[Array, list[Tap]]:
        program = trace(loss_fn, params, args, kwargs, structures, check=real_scalar)
        value, _, taps = differentiate(program, reduce=kept)
        return value, taps

    return run


def _reduction(reduce: Callable | None, reduce_tap: Callable[[Tap], Tree] | None) -> Callable[[Tap], Tree] | None:
    if reduce is not None and reduce_tap is not None:
        raise ValueError("reduce= and reduce_tap= are two forms of one argument: give one of them")
    return reduce_tap if reduce is None else lambda tap: reduce(tap.inputs, tap.cotangents)


def value_grad_and_taps(
    loss_fn: Callable, reduce: Callable | None = None, *, reduce_tap: Callable[[Tap], Tree] | None = None
) -> Callable:
    """``value_grad_and_taps(loss_fn)(params, *args) -> (value, grads, taps)``, from one forward and backward pass.

    Args, taps and errors are those of `capture`; gradients those of ``jax.grad(allow_int=True)``.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.sum(x @ params["w"])
        >>> value, grads, taps = fj.value_grad_and_taps(loss)({"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
        >>> grads["w"].tolist()
        [[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]
    """
    kept, structures = _reduction(reduce, reduce_tap), Structures()

    def run(params: Tree, *args: Any, **kwargs: Any) -> tuple[Array, Tree, list[Tap]]:
        program = trace(loss_fn, params, args, kwargs, structures, check=real_scalar)
        value, grads, taps = differentiate(program, reduce=kept, gradients=lambda leaf: True)
        return value, jax.tree.unflatten(jax.tree.structure(params), grads), taps

    return run


def gradients_from_taps(taps: list[Tap], params: Tree) -> Tree:
    """What ``jax.grad`` gives, rebuilt from the taps: ``sum over uses of (d y / d w)^T cotangent``.

    Args:
        taps: from `capture` without ``reduce``.
        params: the tree that was captured; a leaf that was never used gets zeros, a frozen one float0 zeros.

    Raises:
        ValueError: taps that were reduced.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
        >>> _, taps = fj.capture(loss)(params, jnp.ones((4, 3)))
        >>> rebuilt = fj.gradients_from_taps(taps, params)
        >>> bool(jnp.allclose(rebuilt["w"], jax.grad(loss)(params, jnp.ones((4, 3)))["w"]))
        True
    """
    leaves, treedef = jax.tree.flatten(params)
    grads = [jnp.zeros_like(x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else frozen(x) for x in leaves]
    for tap in taps:
        if tap.cotangents is None:
            raise ValueError(f"the tap of {tap.path} was reduced; capture without reduce= to rebuild gradients")
        grads[tap.leaf] = grads[tap.leaf] + gradient_of_use(tap.use, 0, tap.inputs or (), tap.cotangents)
    return jax.tree.unflatten(treedef, grads)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How every parameter leaf was recognised; ``print`` it.

    Attributes:
        rows: ``(path, shape, kinds)`` of each leaf, kinds a tuple of `Tap.kind` in program order, empty where no
            gradient of the loss reaches the leaf.
        lines: for every leaf the lines of the user's code, aligned with its kinds.
        loops: for every leaf, aligned with its kinds, the loops that the use is in, outermost first, as
            ``("stacked", 16)`` (16 layers) or ``("shared", 7)`` (the same numbers in 7 iterations).
    """

    rows: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...]
    lines: tuple[tuple[str, ...], ...]
    loops: tuple[tuple[tuple[tuple[str, int], ...], ...], ...]

    def __repr__(self) -> str:
        return outline(self)

    def __str__(self) -> str:
        width = max([len(path) for path, _, _ in self.rows], default=4)
        shapes = max([len(str(list(shape))) for _, shape, _ in self.rows], default=5)
        lines = []
        for (path, shape, kinds), where, loops in zip(self.rows, self.lines, self.loops, strict=True):
            shown = ", ".join(map(_shown, kinds, where, loops)) or "not used by the loss"
            lines.append(f"{path:{width}}  {list(shape)!s:{shapes}}  {shown}")
        return "\n".join(lines)


def _shown(kind: str, where: str, loops: tuple[tuple[str, int], ...]) -> str:
    """``dense (16 stacked)``, ``generic at model.py:12``."""
    place = f" at {where}" if kind == "generic" and where else ""
    inside = f" ({', '.join(f'{length} {loop}' for loop, length in loops)})" if loops else ""
    return kind + inside + place


def coverage(loss_fn: Callable, params: Tree, *args: Any, **kwargs: Any) -> Coverage:
    """A table that says how `capture` recognises every parameter leaf; nothing is computed.

    Parameters and arguments may be ``jax.ShapeDtypeStruct``s.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))
        >>> print(fj.coverage(loss, {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "c": jnp.zeros(1)}, jnp.ones((4, 3))))
        ['b']  [2]     bias
        ['c']  [1]     not used by the loss
        ['w']  [3, 2]  dense
    """
    program = trace(loss_fn, params, args, kwargs, check=real_scalar)
    found: list[list[Spec]] = [program.structure.uses(i) for i in range(len(program.leaves))]
    rows = tuple(
        (path, tuple(leaf.shape), tuple(s.use.kind for s in specs))
        for path, leaf, specs in zip(program.paths, program.leaves, found, strict=True)
    )
    lines = tuple(tuple(s.use.where for s in specs) for specs in found)
    return Coverage(
        rows, lines, tuple(tuple(tuple(zip(s.use.loops, s.lengths, strict=True)) for s in specs) for specs in found)
    )

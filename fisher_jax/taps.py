"""Capture: run a loss once, forward and backward, and hand back a tap for every use of every parameter.

The loss is traced to a jaxpr. Every parameter leaf is followed through layout and dtype operations to where it
meets data (`fisher_jax.tracing`); there a perturbation is put beside the result, and the loss is differentiated
with respect to the perturbations. No parameter gradient is formed, and the model and its value are not changed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax.jaxprs import zeros
from fisher_jax.tracing import Recorder, Spec, Use, View, evaluate, zero

__all__ = ["Coverage", "Tap", "Use", "capture", "coverage", "gradients_from_taps", "value_grad_and_taps"]

Tree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "cotangents", "reduced"],
    meta_fields=["path", "kind", "leaf", "use"],
)
@dataclasses.dataclass(frozen=True)
class Tap:
    """One use of one parameter leaf.

    Attributes:
        path: of the leaf, as ``jax.tree_util.keystr`` writes it.
        kind: what the use is, see `Use`.
        leaf: index of the leaf in ``jax.tree.leaves(params)``.
        inputs: what the parameter met: a tuple of arrays (activations of a dense use, indices of an embedding).
        cotangents: of the use's output; for ``generic`` of the parameter itself.
        reduced: the result of ``reduce`` where one was given; ``inputs`` and ``cotangents`` are then ``None``.
        use: the static facts.
    """

    path: str
    kind: str
    leaf: int
    use: Use
    inputs: tuple[Array, ...] | None = None
    cotangents: Array | None = None
    reduced: Tree = None


@dataclasses.dataclass(frozen=True)
class _Program:
    """A traced loss, ready to run with perturbations."""

    jaxpr: Any
    leaves: list
    arguments: list
    paths: list[str]
    probe: Recorder

    def run(self, leaves: list, arguments: list, recorder: Recorder) -> Array:
        views = [View.of(x, i) if jnp.issubdtype(x.dtype, jnp.floating) else x for i, x in enumerate(leaves)]
        (value,) = evaluate(self.jaxpr.jaxpr, self.jaxpr.consts, [*views, *arguments], recorder)
        return jnp.asarray(recorder.generic(value, None))


_SCALARS = (bool, int, float, complex)
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def _is_array(x: Any) -> bool:
    if isinstance(x, np.ndarray | np.generic):
        return x.dtype.kind not in "OUSMm"
    return isinstance(x, _SCALARS + _ARRAYS)


def _array(x: Any) -> Any:
    return x if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else jnp.asarray(x)


def _program(loss_fn: Callable, reduce: Callable | None, params: Tree, args: tuple, kwargs: dict) -> _Program:
    """Trace the loss, and probe it for uses."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path) for path, _ in with_paths]
    leaves = [_parameter(path, x) for path, (_, x) in zip(paths, with_paths, strict=True)]
    flat, args_tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    for path, x in flat:
        if not isinstance(x, _SCALARS + _ARRAYS) or (
            isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "OUSV"
        ):
            raise ValueError(
                f"{_name(path)} of the loss is of type {type(x).__name__}; arguments are pytrees of arrays and "
                "Python numbers: bind anything else first, as in functools.partial(loss_fn, mode=...)"
            )
    # Python numbers stay what they are, as in jax.grad: a model may loop over them.
    traced = [not isinstance(x, _SCALARS) for _, x in flat]
    arguments = [_array(x) for (_, x), is_traced in zip(flat, traced, strict=True) if is_traced]

    def loss(leaves, arguments):
        moving = iter(arguments)
        values = [next(moving) if is_traced else x for (_, x), is_traced in zip(flat, traced, strict=True)]
        positional, named = jax.tree.unflatten(args_tree, values)
        return _real_scalar(loss_fn(jax.tree.unflatten(treedef, leaves), *positional, **named))

    jaxpr = jax.make_jaxpr(loss)(leaves, arguments)
    program = _Program(jaxpr, leaves, arguments, paths, Recorder(reduce))
    jax.eval_shape(lambda leaves, arguments: program.run(leaves, arguments, program.probe), leaves, arguments)
    return program


def _parameter(path: str, x: Any) -> Any:
    if not _is_array(x):
        raise ValueError(
            f"parameter {path} is of type {type(x).__name__}; parameters are arrays: split off the rest of the model "
            "first (nnx.split, equinox.partition)"
        )
    x = _array(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"parameter {path} has dtype {x.dtype}; store its real and imaginary part as two parameters")
    return x


def _name(path: tuple) -> str:
    """``argument 1``, ``argument 1['x']`` or ``argument mode``, of a path in ``(args, kwargs)``."""
    first = getattr(path[1], "idx", None)
    # The parameters come before the arguments.
    name = path[1].key if first is None else first + 1
    return f"argument {name}{jax.tree_util.keystr(path[2:])}"


def _real_scalar(value: Any) -> Any:
    if not isinstance(value, _SCALARS + _ARRAYS):
        raise ValueError(f"the loss returns one real number, found {type(value).__name__}: return the number alone")
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        shape = list(jnp.shape(value))
        raise ValueError(f"the loss returns one real number, found shape {shape} and dtype {jnp.result_type(value)}")
    return value


def capture(loss_fn: Callable, reduce: Callable | None = None) -> Callable:
    """``capture(loss_fn)(params, *args) -> (value, taps)``: the loss, and a tap for every use of every parameter.

    A use is ``y = op(w, x)``, linear in the parameter ``w`` (after pure layout and dtype operations, and arithmetic
    with numbers of the program: ``1 + w``, ``w / 2``, whose factor goes into the cotangent) and in the data
    ``x``. Its tap holds ``x`` and ``d loss / d y``; a parameter used twice has two taps. Recognised:
    ``dot_general`` (``dense``), ``gather`` of whole slices (``embedding``), ``mul`` (``scale``), ``add`` and
    ``sub`` (``bias``), convolution (``conv``); anything else, and every function of parameters alone (weight
    decay, weight normalisation, ``w + a b``), is ``generic``, with the gradient of the parameter at that place.
    Followed into ``jit``, ``checkpoint`` (which stays rematerialised) and ``scan``; in ``cond``, ``while``,
    ``shard_map``, custom derivatives and where Explicit mesh axes become Auto
    (``.at[i].get(out_sharding=...)``) parameters are generic.

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

    Returns:
        ``(value, taps)``: a list of `Tap`, in program order. Leading axes of a tap are loops, see `Use`.

    Raises:
        ValueError: a loss that is not a real scalar, complex parameters, leaves that are no arrays, a reduction to
            integers; each names the leaf or the argument.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
        >>> value, taps = fj.capture(loss)({"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
        >>> [(tap.path, tap.kind, tap.inputs[0].shape, tap.cotangents.shape) for tap in taps]
        [("['w']", 'dense', (4, 3), (4, 2))]
    """

    def run(params: Tree, *args: Any, **kwargs: Any) -> tuple[Array, list[Tap]]:
        value, _, taps = _differentiate(_program(loss_fn, reduce, params, args, kwargs), with_gradients=False)
        return value, taps

    return run


def value_grad_and_taps(loss_fn: Callable) -> Callable:
    """``value_grad_and_taps(loss_fn)(params, *args) -> (value, grads, taps)``, from one forward and backward pass.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.sum(x @ params["w"])
        >>> value, grads, taps = fj.value_grad_and_taps(loss)({"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
        >>> grads["w"].tolist()
        [[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]
    """

    def run(params: Tree, *args: Any, **kwargs: Any) -> tuple[Array, Tree, list[Tap]]:
        value, grads, taps = _differentiate(_program(loss_fn, None, params, args, kwargs), with_gradients=True)
        return value, jax.tree.unflatten(jax.tree.structure(params), grads), taps

    return run


def _differentiate(program: _Program, with_gradients: bool) -> tuple[Array, list, list[Tap]]:
    probe = program.probe
    moves = [with_gradients and jnp.issubdtype(x.dtype, jnp.floating) for x in program.leaves]

    def loss(perturbations, moving):
        following = iter(moving)
        leaves = [next(following) if moved else x for x, moved in zip(program.leaves, moves, strict=True)]
        recorder = probe.replay(perturbations)
        return program.run(leaves, program.arguments, recorder), recorder.inputs

    moving = [x for x, moved in zip(program.leaves, moves, strict=True) if moved]
    value, pullback, inputs = jax.vjp(loss, [zero(spec) for spec in probe.specs], moving, has_aux=True)
    found, moved_grads = pullback(jnp.ones_like(value))
    taps = []
    for index, (spec, result) in enumerate(zip(probe.specs, found, strict=True)):
        tap = Tap(program.paths[spec.leaf], spec.use.kind, spec.leaf, spec.use)
        if probe.reduce is None:
            taps.append(dataclasses.replace(tap, inputs=tuple(inputs[index]), cotangents=result))
        else:
            taps.append(dataclasses.replace(tap, reduced=result))
    following = iter(moved_grads)
    grads = [next(following) if moved else _frozen(x) for x, moved in zip(program.leaves, moves, strict=True)]
    return value, grads, taps


def _frozen(x: Any) -> np.ndarray:
    """What ``jax.grad(allow_int=True)`` gives for a leaf that is not a real number."""
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


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
    grads = [jnp.zeros_like(x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else _frozen(x) for x in leaves]
    for tap in taps:
        if tap.cotangents is None:
            raise ValueError(f"the tap of {tap.path} was reduced; capture without reduce= to rebuild gradients")
        grads[tap.leaf] = grads[tap.leaf] + _gradient(tap.use, 0, tap.inputs or (), tap.cotangents)
    return jax.tree.unflatten(treedef, grads)


def _gradient(use: Use, depth: int, inputs: tuple, cotangent: Array) -> Array:
    """Cotangent of the value at the start of segment ``depth``."""
    if depth < len(use.loops):
        inside = jax.vmap(functools.partial(_gradient, use, depth + 1))(inputs, cotangent)
        found = inside.sum(0).astype(inside.dtype) if use.loops[depth] == "shared" else inside
    elif (apply := use.apply) is None:
        found = cotangent
    else:
        _, pullback = jax.vjp(lambda w: apply(w, *inputs), zeros(use.operand))
        (found,) = pullback(cotangent)
    return use.segments[depth].transpose(found)


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
    program = _program(loss_fn, None, params, args, kwargs)
    found: list[list[Spec]] = [[s for s in program.probe.specs if s.leaf == i] for i in range(len(program.leaves))]
    rows = tuple(
        (path, tuple(leaf.shape), tuple(s.use.kind for s in specs))
        for path, leaf, specs in zip(program.paths, program.leaves, found, strict=True)
    )
    lines = tuple(tuple(s.use.where for s in specs) for specs in found)
    return Coverage(
        rows, lines, tuple(tuple(tuple(zip(s.use.loops, s.lengths, strict=True)) for s in specs) for specs in found)
    )

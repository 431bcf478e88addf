"""A traced loss, and its derivative with respect to perturbations at the uses of its parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._support.jax_internals import zeros
from fisher_jax._tracing.provenance import Use, View
from fisher_jax._tracing.recorder import Recorder, zero
from fisher_jax._tracing.tracing import evaluate

__all__ = ["Program", "Tap", "differentiate", "frozen", "gradient_of_use", "trace"]

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
class Program:
    """A traced loss, ready to run with perturbations."""

    traced: Any
    leaves: list
    arguments: list
    paths: list[str]
    followed: list[bool]
    probe: Recorder

    def run(self, leaves: list, arguments: list, recorder: Recorder) -> Array:
        views = [View.of(x, i) if self.followed[i] else x for i, x in enumerate(leaves)]
        (value,) = evaluate(self.traced, [*views, *arguments], recorder)
        return jnp.asarray(recorder.generic(value, None))


_SCALARS = (bool, int, float, complex)
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def _is_array(x: Any) -> bool:
    if isinstance(x, np.ndarray | np.generic):
        return x.dtype.kind not in "OUSMm"
    return isinstance(x, _SCALARS + _ARRAYS)


def _array(x: Any) -> Any:
    return x if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else jnp.asarray(x)


def trace(
    loss_fn: Callable,
    params: Tree,
    args: tuple,
    kwargs: dict,
    reduce: Callable[[Tap], Tree] | None = None,
    follow: Callable[[int], bool] = lambda leaf: True,
) -> Program:
    """Trace the loss, and probe it for uses of the leaves to ``follow``."""
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

    made = jax.make_jaxpr(loss)(leaves, arguments)
    followed = [bool(jnp.issubdtype(x.dtype, jnp.floating)) and follow(i) for i, x in enumerate(leaves)]

    def kept(leaf: int, use: Use, inputs: tuple, cotangent: Array) -> Tree:
        assert reduce is not None
        return reduce(Tap(paths[leaf], use.kind, leaf, use, inputs, cotangent))

    program = Program(made, leaves, arguments, paths, followed, Recorder(kept if reduce else None))
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


def differentiate(
    program: Program, gradients: Callable[[int], bool] = lambda leaf: False
) -> tuple[Array, list, list[Tap]]:
    """Value, gradients of the leaves whose index is in ``gradients``, and taps, from one backward pass."""
    probe = program.probe
    moves = [bool(jnp.issubdtype(x.dtype, jnp.floating)) and gradients(i) for i, x in enumerate(program.leaves)]

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
    grads = [next(following) if moved else frozen(x) for x, moved in zip(program.leaves, moves, strict=True)]
    return value, grads, taps


def frozen(x: Any) -> np.ndarray:
    """What ``jax.grad(allow_int=True)`` gives for a leaf that is not a real number."""
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def gradient_of_use(use: Use, depth: int, inputs: tuple, cotangent: Array) -> Array:
    """Cotangent of the value at the start of segment ``depth``."""
    if depth < len(use.loops):
        inside = jax.vmap(functools.partial(gradient_of_use, use, depth + 1))(inputs, cotangent)
        found = inside.sum(0).astype(inside.dtype) if use.loops[depth] == "shared" else inside
    elif (apply := use.apply) is None:
        found = cotangent
    else:
        _, pullback = jax.vjp(lambda w: apply(w, *inputs), zeros(use.operand))
        (found,) = pullback(cotangent)
    return use.segments[depth].transpose(found)

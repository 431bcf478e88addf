"""A traced function, and its derivative with respect to perturbations at the uses of its parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._support.dtypes import check_not_complex, is_narrow, wide
from fisher_jax._support.jax_internals import zeros
from fisher_jax._support.outline import outline
from fisher_jax._support.selection import no_array
from fisher_jax._tracing.ids import Carried, Lost
from fisher_jax._tracing.leads import leads_of
from fisher_jax._tracing.replay import Replay, zero
from fisher_jax._tracing.structure import Structure, Structures
from fisher_jax._tracing.tracing import evaluate
from fisher_jax._tracing.uses import Spec, Use, View
from fisher_jax.batch.arguments import explained

__all__ = [
    "Program",
    "Tap",
    "check_parameters",
    "differentiate",
    "frozen",
    "gradient_of_use",
    "is_free",
    "real_scalar",
    "trace",
    "with_ids",
    "with_wide_sums",
]

Tree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "cotangents", "reduced", "iteration"],
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
        iteration: while a tap is reduced, the iteration of each of its loops.
    """

    path: str
    kind: str
    leaf: int
    use: Use
    inputs: tuple[Array, ...] | None = None
    cotangents: Array | None = None
    reduced: Tree = None
    iteration: tuple[Array, ...] = ()

    def __repr__(self) -> str:
        return outline(self)


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function of parameters and arguments, with its structure.

    Attributes:
        structure: of the program.
        traced: the function of all leaves and arguments.
        followed: for every parameter whether it is followed, or data.
        leaves, treedef, paths: the parameters.
        arguments: those that are traced.
        shape: of the function's result, a tree of ``jax.ShapeDtypeStruct``s.
    """

    structure: Structure
    traced: Any
    followed: tuple[bool, ...]
    leaves: list
    treedef: Any
    paths: list[str]
    arguments: list
    shape: Tree

    @property
    def specs(self) -> list[Spec]:
        return self.structure.specs

    def on(self, *args: Any) -> "Program":
        """The same program on other arguments of the same types, all of them arrays."""
        return dataclasses.replace(self, arguments=list(map(_array, jax.tree.leaves(args))))

    def __call__(self) -> Tree:
        """What the function returns."""
        way = Replay(self.structure.survey, iter(()), lambda leaf: False, None)
        return self.replayed(self.leaves, self.arguments, way)

    def replayed(self, leaves: list, arguments: list, way: Any) -> Tree:
        """The function, in which ``way`` meets every use of a parameter."""
        views = [View.of(x, i) if self.followed[i] else x for i, x in enumerate(leaves)]
        values = [jnp.asarray(way.generic(x, None)) for x in evaluate(self.traced, [*views, *arguments], way)]
        return jax.tree.unflatten(jax.tree.structure(self.shape), values)


_SCALARS = (bool, int, float, complex)
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def is_free(x: Any) -> bool:
    """Whether a parameter has a gradient."""
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def _is_array(x: Any) -> bool:
    if isinstance(x, np.ndarray | np.generic):
        return x.dtype.kind not in "OUSMm"
    return isinstance(x, _SCALARS + _ARRAYS)


def _array(x: Any) -> Any:
    return x if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else jnp.asarray(x)


def trace(
    function: Callable,
    params: Tree,
    args: tuple,
    kwargs: dict | None = None,
    structures: Structures | None = None,
    lead: tuple[int, ...] | None = (),
    check: Callable[[Any], Any] = lambda result: result,
    follow: Callable[[str], bool] = lambda path: True,
) -> Program:
    """Trace a function of parameters, and find its structure, or know it from before.

    Args:
        structures: of this function, held by who calls it again.
        lead: rows, and positions of a row, along the leading axes of the arguments; ``None``: those of the outputs.
        check: what the function returns is passed through it while it is traced.
        follow: says of a path whether it is followed; other leaves are data.
    """
    kwargs = {} if kwargs is None else kwargs
    check_parameters(params)
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path) for path, _ in with_paths]
    leaves = [_array(x) for _, x in with_paths]
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

    def of_arrays(leaves, arguments):
        moving = iter(arguments)
        values = [next(moving) if is_traced else x for (_, x), is_traced in zip(flat, traced, strict=True)]
        positional, named = jax.tree.unflatten(args_tree, values)
        return check(explained(function)(jax.tree.unflatten(treedef, leaves), *positional, **named))

    made, shape = jax.make_jaxpr(of_arrays, return_shape=True)(leaves, arguments)
    structures = Structures() if structures is None else structures
    followed = tuple(is_free(x) and follow(path) for path, x in zip(paths, leaves, strict=True))

    def leads(lead: tuple[int, ...]) -> list[tuple[int, ...]]:
        return leads_of(lambda others: of_arrays(leaves, others), arguments, lead)

    structure = structures.of(made, followed, lead, leads)
    return Program(structure, made, followed, leaves, treedef, paths, arguments, shape)


def check_parameters(params: Tree) -> None:
    """Raise for a leaf that is no array, as the functions of a whole module are, and for a complex one."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if not _is_array(x):
            raise ValueError(no_array(name, x))
        check_not_complex(name, x)


def _name(path: tuple) -> str:
    """``argument 1``, ``argument 1['x']`` or ``argument mode``, of a path in ``(args, kwargs)``."""
    first = getattr(path[1], "idx", None)
    # The parameters come before the arguments.
    name = path[1].key if first is None else first + 1
    return f"argument {name}{jax.tree_util.keystr(path[2:])}"


def real_scalar(value: Any) -> Any:
    """The value of a loss, checked."""
    if not isinstance(value, _SCALARS + _ARRAYS):
        raise ValueError(f"the loss returns one real number, found {type(value).__name__}: return the number alone")
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        shape = list(jnp.shape(value))
        raise ValueError(f"the loss returns one real number, found shape {shape} and dtype {jnp.result_type(value)}")
    return value


def differentiate(
    program: Program,
    objective: Callable[[Tree], Array] = lambda value: value,
    *,
    reduce: Callable[[Tap], Tree] | None = None,
    follow: Callable[[int], bool] = lambda leaf: True,
    gradients: Callable[[int], bool] = lambda leaf: False,
) -> tuple[Array, list, list[Tap]]:
    """``objective`` of the program's result, gradients of leaves, and taps, from one backward pass.

    Args:
        objective: a real number from what the program returns.
        reduce: what is kept of a tap, formed inside the backward pass.
        follow: leaves that have taps.
        gradients: leaves that have gradients.
    """
    specs = [spec for spec in program.specs if follow(spec.leaf)]
    moves = [is_free(x) and gradients(i) for i, x in enumerate(program.leaves)]

    def tap(spec: Spec) -> Tap:
        return Tap(program.paths[spec.leaf], spec.use.kind, spec.leaf, spec.use)

    def kept(spec: Spec, iteration: tuple, inputs: tuple, cotangent: Array) -> Tree:
        assert reduce is not None
        return reduce(dataclasses.replace(tap(spec), inputs=inputs, cotangents=cotangent, iteration=iteration))

    keep = None if reduce is None else kept

    def loss(perturbations, moving):
        following = iter(moving)
        leaves = [next(following) if moved else x for x, moved in zip(program.leaves, moves, strict=True)]
        way = Replay(program.structure.survey, iter(perturbations), follow, keep)
        return objective(program.replayed(leaves, program.arguments, way)), way.inputs

    moving = [x for x, moved in zip(program.leaves, moves, strict=True) if moved]
    value, pullback, inputs = jax.vjp(loss, [zero(spec, keep) for spec in specs], moving, has_aux=True)
    found, moved_grads = pullback(jnp.ones_like(value))
    taps = []
    for index, (spec, result) in enumerate(zip(specs, found, strict=True)):
        if reduce is None:
            taps.append(dataclasses.replace(tap(spec), inputs=tuple(inputs[index]), cotangents=result))
        else:
            taps.append(dataclasses.replace(tap(spec), reduced=result))
    following = iter(moved_grads)
    grads = [next(following) if moved else frozen(x) for x, moved in zip(program.leaves, moves, strict=True)]
    return value, grads, taps


def with_ids(taps: list[Tap], structure: Structure) -> list[Tap]:
    """Taps of a training loss, with the rows, positions and experts that the model alone says of their uses."""
    found = []
    for tap in taps:
        own = [spec.use for spec in structure.uses(tap.leaf) if spec.use.kind != "generic"]
        same = [other for other in taps if other.leaf == tap.leaf and other.kind != "generic"]
        alike = [(a.kind, a.operand.shape) for a in own] == [(b.kind, b.use.operand.shape) for b in same]
        experts = tap.use.experts
        if tap.kind == "generic":
            ids: Carried = ()
        elif alike:
            model = own[[other is tap for other in same].index(True)]
            ids, experts = model.ids, model.experts
        else:
            reason = "the training loss uses it otherwise than the model"
            ids = tuple(Lost(kind, tap.use.primitive, tap.use.where, reason) for kind in ("row", "position", "token"))
        found.append(dataclasses.replace(tap, use=dataclasses.replace(tap.use, ids=ids, experts=experts)))
    return found


def frozen(x: Any) -> np.ndarray:
    """What ``jax.grad(allow_int=True)`` gives for a leaf that is not a real number."""
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def with_wide_sums(apply_fn: Callable) -> Callable:
    """The same function, whose gradients of narrow parameters are added up in float32 (see `Replay`)."""

    def run(params: Tree, *args: Any) -> Tree:
        if not any(is_narrow(jnp.result_type(x)) for x in jax.tree.leaves(params)):
            return apply_fn(params, *args)
        return trace(apply_fn, params, args, lead=None)()

    return run


def _applied_wide(use: Use, operand: Array, inputs: tuple) -> Array:
    """The output of a use, whose pullback adds up the rows of a narrow table in float32."""
    assert use.apply is not None
    if use.kind != "embedding":
        return use.apply(operand, *inputs)
    return use.apply(wide(operand), *inputs).astype(operand.dtype)


def gradient_of_use(use: Use, depth: int, inputs: tuple, cotangent: Array) -> Array:
    """Cotangent of the value at the start of segment ``depth``."""
    if depth < len(use.loops):
        inside = jax.vmap(functools.partial(gradient_of_use, use, depth + 1))(inputs, cotangent)
        found = inside.sum(0).astype(inside.dtype) if use.loops[depth] == "shared" else inside
    elif use.apply is None:
        found = cotangent
    else:
        _, pullback = jax.vjp(lambda w: _applied_wide(use, w, inputs), zeros(use.operand))
        (found,) = pullback(cotangent)
    return use.segments[depth].transpose(found)

"""Capture: run a loss once, forward and backward, and hand back a tap for every use of every parameter.

The loss is traced to a jaxpr. Every parameter leaf is followed through layout and dtype operations to where it meets
data; there a zero perturbation is added to the result, and the loss is differentiated with respect to the
perturbations. No parameter gradient is formed, and the model is not changed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jaxpr_core
from jaxtyping import Array

from fisher_jax.jaxprs import bind, user_line

__all__ = ["Tap", "capture", "coverage", "gradients_from_taps", "value_grad_and_taps"]

Tree = Any

# Operations that only move a parameter's numbers around, or change their type.
_LAYOUT = {
    "transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p",
    "sharding_constraint", "slice", "rev", "reduce_precision", "layout_constraint", "reshard", "pvary", "pcast",
}  # fmt: skip

# Where a parameter meets data: the kind of tap, by primitive.
_USES = {
    "dot_general": "dense", "gather": "embedding", "mul": "scale", "add": "bias", "add_any": "bias", "sub": "bias",
    "conv_general_dilated": "conv",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Segment:
    """A chain of layout operations, from one array to one array."""

    shape: tuple[int, ...]
    dtype: Any
    steps: tuple[Callable[[Array], Array], ...] = ()

    def __call__(self, x: Array) -> Array:
        return functools.reduce(lambda value, step: step(value), self.steps, x)

    def transpose(self, cotangent: Array) -> Array:
        if not self.steps:
            return cotangent
        (result,) = jax.linear_transpose(self, jax.ShapeDtypeStruct(self.shape, self.dtype))(cotangent)
        return result


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """Static facts of one use: how the parameter got there, and the operation that is linear in it.

    Attributes:
        kind: ``dense``, ``embedding``, ``scale``, ``bias``, ``conv`` or ``generic``.
        primitive, where: the JAX operation and the line of the user's code.
        segments: layout chains; between two of them lies a loop.
        loops: for every loop, outermost first, ``"stacked"`` (each iteration has its own slice: layers) or
            ``"shared"`` (all iterations use the same numbers: time). Inputs and cotangents have these leading axes.
        apply: ``apply(operand, *inputs) -> output``, linear in the operand up to a constant; ``None`` for generic.
    """

    kind: str
    primitive: str
    where: str
    segments: tuple[_Segment, ...]
    loops: tuple[str, ...]
    operand: jax.ShapeDtypeStruct
    apply: Callable | None

    def _key(self):
        return (self.kind, self.primitive, self.where, self.loops, self.operand.shape, str(self.operand.dtype))

    def __eq__(self, other):
        return isinstance(other, Use) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())


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
class _View:
    """A parameter leaf on its way through the program."""

    value: Array
    leaf: int
    segments: tuple[_Segment, ...]
    loops: tuple[str, ...]

    def through(self, step: Callable) -> "_View":
        last = dataclasses.replace(self.segments[-1], steps=(*self.segments[-1].steps, step))
        return dataclasses.replace(self, value=step(self.value), segments=(*self.segments[:-1], last))

    def inside(self, value: Array, loop: str) -> "_View":
        """The view that the body of a loop has of this one."""
        return _View(value, self.leaf, (*self.segments, _Segment(value.shape, value.dtype)), (*self.loops, loop))


@dataclasses.dataclass(frozen=True)
class _Spec:
    """A use found by tracing: its leaf, static facts and the shapes that its tap will have."""

    leaf: int
    use: Use
    output: jax.ShapeDtypeStruct
    inputs: tuple[jax.ShapeDtypeStruct, ...]


class _Recorder:
    """Meets every use in program order: notes it, and adds its perturbation if there are any."""

    def __init__(self, perturb: Iterator[Callable] | None):
        self.perturb, self.specs, self.inputs = perturb, [], []

    def use(self, view: _View, kind: str, eqn: Any, apply: Callable | None, inputs: tuple[Array, ...]) -> Array:
        output = view.value if apply is None else apply(view.value, *inputs)
        operand = jax.ShapeDtypeStruct(view.value.shape, view.value.dtype)
        name, where = ("output", "") if eqn is None else (eqn.primitive.name, user_line(eqn))
        facts = Use(kind, name, where, view.segments, view.loops, operand, apply)
        self.specs.append(_Spec(view.leaf, facts, _abstract(output), tuple(map(_abstract, inputs))))
        self.inputs.append(inputs)
        return output if self.perturb is None else next(self.perturb)(output, inputs)

    def generic(self, x: Any, eqn: Any) -> Any:
        """A parameter where no tap fits: its own perturbation, and plain data from here on."""
        return self.use(x, "generic", eqn, None, ()) if isinstance(x, _View) else x


def _abstract(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype)


def _run(jaxpr: Any, consts: list, args: list, recorder: _Recorder) -> list:
    """Evaluate a jaxpr; parameters among the arguments are `_View`s."""
    env: dict = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jaxpr_core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        meets = any(isinstance(v, _View) for v in values)
        outs = _meet(eqn, values, recorder) if meets else bind(eqn, values)
        env |= zip(eqn.outvars, outs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _meet(eqn: Any, values: list, recorder: _Recorder) -> list:
    """An equation with a parameter among its operands."""
    name = eqn.primitive.name
    views = [i for i, v in enumerate(values) if isinstance(v, _View)]
    if name == "jit":
        closed = eqn.params["jaxpr"]
        return _run(closed.jaxpr, closed.consts, values, recorder)
    if name in ("remat2", "checkpoint"):
        return _remat(eqn, values, recorder)
    if name == "scan":
        return _scan(eqn, values, recorder)
    if name in _LAYOUT and views == [0] and len(values) == 1:
        return [values[0].through(lambda x: bind(eqn, [x])[0])]
    if name in _USES and len(views) == 1 and _fits(name, views[0], eqn):
        (index,) = views
        inputs = tuple(v for i, v in enumerate(values) if i != index)
        arrays = tuple(jnp.asarray(v) for v in inputs)

        def apply(operand, *others):
            return bind(eqn, [*others[:index], operand, *others[index:]])[0]

        return [recorder.use(values[index], _USES[name], eqn, apply, arrays)]
    return bind(eqn, [recorder.generic(v, eqn) for v in values])


def _fits(name: str, index: int, eqn: Any) -> bool:
    """Whether a use is of the known form: positions on the data's side, the parameter where parameters stand."""
    if name == "gather":
        return index == 0
    if name == "conv_general_dilated":
        return index == 1
    # A constant is not data: 1 + scale is a function of the parameter alone.
    other = eqn.invars[1 - index]
    return name == "dot_general" or not isinstance(other, jaxpr_core.Literal)


def _remat(eqn: Any, values: list, recorder: _Recorder) -> list:
    """Keep a rematerialised part rematerialised; its perturbations become arguments."""
    jaxpr = eqn.params["jaxpr"]
    shell = [dataclasses.replace(v, value=None) if isinstance(v, _View) else None for v in values]
    count: list[int] = []

    def body(perturbations, *arrays):
        inner = _Recorder(None if perturbations is None else iter(perturbations))
        args = [a if s is None else dataclasses.replace(s, value=a) for s, a in zip(shell, arrays, strict=True)]
        outs = [inner.generic(v, eqn) for v in _run(jaxpr, [], args, inner)]
        specs.append(inner.specs)
        return outs, inner.inputs

    specs: list = []
    arrays = [v.value if isinstance(v, _View) else v for v in values]
    jax.eval_shape(functools.partial(body, None), *arrays)
    recorder.specs += specs[-1]
    count.append(len(specs[-1]))
    if recorder.perturb is None:
        outs, inputs = body(None, *arrays)
    else:
        perturbations = [next(recorder.perturb) for _ in range(count[0])]
        policy, prevent = eqn.params["policy"], eqn.params["prevent_cse"]
        outs, inputs = jax.checkpoint(body, policy=policy, prevent_cse=prevent)(perturbations, *arrays)
    recorder.inputs += inputs
    return outs


def _scan(eqn: Any, values: list, recorder: _Recorder) -> list:
    """A loop: perturbations and inputs of its body are stacked over the iterations."""
    closed, p = eqn.params["jaxpr"], eqn.params
    num_consts, num_carry = p["num_consts"], p["num_carry"]
    head = num_consts + num_carry
    consts, carry, xs = values[:num_consts], values[num_consts:head], values[head:]
    carry = [recorder.generic(v, eqn) for v in carry]

    def arrays(part):
        return [v.value if isinstance(v, _View) else v for v in part]

    def views(part, slices, loop):
        return [v.inside(a, loop) if isinstance(v, _View) else a for v, a in zip(part, slices, strict=True)]

    specs: list = []

    def body(carry, x):
        perturbations, slices = x
        inner = _Recorder(None if perturbations is None else iter(perturbations))
        args = [*views(consts, arrays(consts), "shared"), *carry, *views(xs, slices, "stacked")]
        outs = [inner.generic(v, eqn) for v in _run(closed.jaxpr, closed.consts, args, inner)]
        specs.append(inner.specs)
        return outs[:num_carry], (outs[num_carry:], inner.inputs)

    first = [jax.eval_shape(lambda a: a[0], a) for a in arrays(xs)]
    jax.eval_shape(lambda c, x: body(c, (None, x)), carry, first)
    length = p["length"]
    recorder.specs += [_stacked(spec, length) for spec in specs[-1]]
    perturbations = None if recorder.perturb is None else [next(recorder.perturb) for _ in specs[-1]]
    carry, (ys, inputs) = jax.lax.scan(
        body, carry, (perturbations, arrays(xs)), length=length, reverse=p["reverse"], unroll=p["unroll"]
    )
    recorder.inputs += inputs
    return [*carry, *ys]


def _stacked(spec: _Spec, length: int) -> _Spec:
    def stack(x):
        return jax.ShapeDtypeStruct((length, *x.shape), x.dtype)

    return dataclasses.replace(spec, output=stack(spec.output), inputs=tuple(map(stack, spec.inputs)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["zero"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Add:
    """A zero that is added to a use's output; its gradient is the cotangent."""

    zero: Array

    def __call__(self, output: Array, inputs: tuple) -> Array:
        del inputs
        return output + self.zero


@functools.partial(jax.tree_util.register_dataclass, data_fields=["zero"], meta_fields=["reduce"])
@dataclasses.dataclass(frozen=True)
class _Reduce:
    """A zero whose gradient is ``reduce(inputs, cotangent)``, formed inside the backward pass of the use."""

    zero: Tree
    reduce: Callable

    def __call__(self, output: Array, inputs: tuple) -> Array:
        return _reduced(self.reduce, output, jax.lax.stop_gradient(inputs), self.zero)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduced(reduce, output, inputs, zero):
    del reduce, inputs, zero
    return output


def _reduced_forward(reduce, output, inputs, zero):
    del reduce, zero
    return output, inputs


def _reduced_backward(reduce, inputs, cotangent):
    def no_gradient(x):
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jax.dtypes.float0
        return jnp.zeros(x.shape, dtype) if dtype != jax.dtypes.float0 else _float0(x.shape)

    return cotangent, jax.tree.map(no_gradient, inputs), reduce(inputs, cotangent)


def _float0(shape):
    import numpy as np

    return np.zeros(shape, jax.dtypes.float0)


_reduced.defvjp(_reduced_forward, _reduced_backward)


@dataclasses.dataclass(frozen=True)
class _Program:
    """A traced loss, ready to run with perturbations."""

    jaxpr: Any
    leaves: list
    arguments: list
    paths: list[str]
    specs: list[_Spec]

    def run(self, leaves: list, perturbations: list | None) -> tuple[Array, list]:
        """The loss, and the inputs of every use."""
        views = [_View(x, i, (_Segment(x.shape, x.dtype),), ()) for i, x in enumerate(leaves)]
        views = [v if jnp.issubdtype(v.value.dtype, jnp.inexact) else v.value for v in views]
        recorder = _Recorder(None if perturbations is None else iter(perturbations))
        outs = _run(self.jaxpr.jaxpr, self.jaxpr.consts, [*views, *self.arguments], recorder)
        (value,) = [recorder.generic(v, None) for v in outs]
        self.specs[:] = recorder.specs
        return value, recorder.inputs


def _program(loss_fn: Callable, params: Tree, args: tuple) -> _Program:
    paths, leaves = (
        zip(*jax.tree_util.tree_leaves_with_path(params), strict=True) if jax.tree.leaves(params) else ((), ())
    )
    arrays = [jnp.asarray(x) for x in leaves]
    treedef = jax.tree.structure(params)
    flat_args, args_tree = jax.tree.flatten(args)
    flat_args = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in flat_args]

    def flat(leaves, arguments):
        value = loss_fn(jax.tree.unflatten(treedef, leaves), *jax.tree.unflatten(args_tree, arguments))
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                f"the loss is one real number, found shape {list(jnp.shape(value))} and dtype {jnp.result_type(value)}"
            )
        return value

    jaxpr = jax.make_jaxpr(flat)(arrays, flat_args)
    program = _Program(jaxpr, arrays, flat_args, [jax.tree_util.keystr(p) for p in paths], [])
    jax.eval_shape(lambda leaves: program.run(leaves, None)[0], arrays)
    return program


def capture(loss_fn: Callable, reduce: Callable | None = None) -> Callable:
    """``capture(loss_fn)(params, *args) -> (value, taps)``: the loss, and a tap for every use of every parameter.

    A use is ``y = op(w, x)``, linear in the parameter ``w`` (after pure layout and dtype operations) and in the data
    ``x``. Its tap holds ``x`` and ``d loss / d y``; a parameter used twice has two taps. Recognised: ``dot_general``
    (``dense``), ``gather`` (``embedding``), ``mul`` (``scale``), ``add`` (``bias``), convolution (``conv``); anything
    else is ``generic``, with the gradient of the parameter at that place. Followed into ``jit``, ``checkpoint``
    (which stays rematerialised) and ``scan``; in ``cond``, ``while``, ``shard_map`` and custom derivatives parameters
    are generic.

    Args:
        loss_fn: ``loss_fn(params, *args)`` returns one real number. Use a *sum* over tokens where cotangents are to
            be per-token scores.
        reduce: ``reduce(inputs, cotangents)`` returns a tree of floating arrays; it is formed inside the backward
            pass of each use, so that rematerialised and scanned layers never hold their activations together. It
            sees one iteration of a loop at a time.

    Returns:
        ``(value, taps)``: a list of `Tap`, in program order. Leading axes of a tap are loops, see `Use`.

    Raises:
        ValueError: a loss that is not a real scalar.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
        >>> value, taps = fj.capture(loss)({"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
        >>> [(tap.path, tap.kind, tap.inputs[0].shape, tap.cotangents.shape) for tap in taps]
        [("['w']", 'dense', (4, 3), (4, 2))]
    """

    def run(params: Tree, *args: Any) -> tuple[Array, list[Tap]]:
        program = _program(loss_fn, params, args)
        value, taps, _ = _differentiate(program, reduce, with_gradients=False)
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

    def run(params: Tree, *args: Any) -> tuple[Array, Tree, list[Tap]]:
        program = _program(loss_fn, params, args)
        value, taps, grads = _differentiate(program, None, with_gradients=True)
        return value, jax.tree.unflatten(jax.tree.structure(params), grads), taps

    return run


def _differentiate(program: _Program, reduce: Callable | None, with_gradients: bool):
    specs = list(program.specs)

    def zeros(spec):
        if reduce is None:
            return _Add(jnp.zeros(spec.output.shape, spec.output.dtype))
        depth = len(spec.use.loops)
        inner = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[depth:], x.dtype), (spec.inputs, spec.output))
        lead = spec.output.shape[:depth]
        found = jax.eval_shape(reduce, *inner)
        return _Reduce(jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), found), reduce)

    perturbations = [zeros(spec) for spec in specs]
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in program.leaves]
    free = [x for x, ok in zip(program.leaves, inexact, strict=True) if ok and with_gradients]

    def loss(perturbations, free):
        moving = iter(free)
        leaves = [next(moving) if ok and with_gradients else x for x, ok in zip(program.leaves, inexact, strict=True)]
        value, inputs = program.run(leaves, perturbations)
        return value, inputs if reduce is None else None

    value, pullback, inputs = jax.vjp(loss, perturbations, free, has_aux=True)
    cotangents, free_grads = pullback(jnp.ones_like(value))
    taps = []
    for index, (spec, found) in enumerate(zip(specs, cotangents, strict=True)):
        path = program.paths[spec.leaf]
        if reduce is None:
            taps.append(Tap(path, spec.use.kind, spec.leaf, spec.use, tuple(inputs[index]), found.zero))
        else:
            taps.append(Tap(path, spec.use.kind, spec.leaf, spec.use, reduced=found.zero))
    moving = iter(free_grads)
    grads = [
        (next(moving) if ok else _float0(x.shape)) if with_gradients else None
        for x, ok in zip(program.leaves, inexact, strict=True)
    ]
    return value, taps, grads


def gradients_from_taps(taps: list[Tap], params: Tree) -> Tree:
    """What ``jax.grad`` gives, rebuilt from the taps: ``sum over uses of (d y / d w)^T cotangent``.

    Args:
        taps: from `capture` without ``reduce``.
        params: the tree that was captured; a leaf that was never used gets zeros.

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
    grads = [jnp.zeros_like(x) for x in leaves]
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
    elif use.apply is None:
        found = cotangent
    else:
        _, pullback = jax.vjp(lambda w: use.apply(w, *inputs), jnp.zeros(use.operand.shape, use.operand.dtype))
        (found,) = pullback(cotangent)
    return use.segments[depth].transpose(found)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How every parameter leaf was recognised; ``print`` it.

    Attributes:
        rows: ``(path, shape, kinds)`` of each leaf, kinds a tuple of `Tap.kind` in program order, empty where the
            loss does not use the leaf.
        lines: for every leaf the lines of the user's code, aligned with its kinds.
    """

    rows: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...]
    lines: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        width = max([len(path) for path, _, _ in self.rows], default=4)
        shapes = max([len(str(list(shape))) for _, shape, _ in self.rows], default=5)
        lines = []
        for (path, shape, kinds), where in zip(self.rows, self.lines, strict=True):
            shown = ", ".join(f"{k} at {w}" if k == "generic" and w else k for k, w in zip(kinds, where, strict=True))
            lines.append(f"{path:{width}}  {list(shape)!s:{shapes}}  {shown or 'not used by the loss'}")
        return "\n".join(lines)


def coverage(loss_fn: Callable, params: Tree, *args: Any) -> Coverage:
    """A table that says how `capture` recognises every parameter leaf; nothing is computed.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))
        >>> print(fj.coverage(loss, {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "c": jnp.zeros(1)}, jnp.ones((4, 3))))
        ['b']  [2]     bias
        ['c']  [1]     not used by the loss
        ['w']  [3, 2]  dense
    """
    program = _program(loss_fn, params, args)
    found: list[list[_Spec]] = [[s for s in program.specs if s.leaf == i] for i in range(len(program.leaves))]
    rows = tuple(
        (path, tuple(leaf.shape), tuple(s.use.kind for s in specs))
        for path, leaf, specs in zip(program.paths, program.leaves, found, strict=True)
    )
    return Coverage(rows, tuple(tuple(s.use.where for s in specs) for specs in found))

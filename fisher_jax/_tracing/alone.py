"""Whether the rows of a batch may run alone: what the program says, and where it does not say, what values show."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._support import meshes
from fisher_jax._support.jax_internals import abstract, called, is_traced, opened, stacked, unstacked, walk
from fisher_jax._tracing.ids import Link
from fisher_jax._tracing.program import Program, is_free, trace
from fisher_jax._tracing.structure import Structures

__all__ = ["Alone", "Asking", "check_apart", "rows_alone", "rows_apart"]

Tree = Any
_COMPARED = 4  # rows that run alone where values decide


class Alone(NamedTuple):
    """A model's program of a batch, and that of one row."""

    batch: Program
    row: Program


class Asking(NamedTuple):
    """Who runs the rows of a model alone, and what else one can do.

    Attributes:
        apply_fn, structures: the model and what is known of its programs, also what values have shown.
        independent: the user's word, see `fisher_jax.group_fisher`.
        who: what runs rows apart, the beginning of an error.
        way_out: its end.
    """

    apply_fn: Callable
    structures: Structures
    independent: bool | None
    who: str
    way_out: str


def rows_alone(
    asking: Asking, params: Tree, inputs: Tree, values: tuple[Tree, Tree] | None = None, number: int = 1
) -> Alone:
    """The programs of a batch and of one row, or a ``number`` of them, where rows do not depend on each other.

    Args:
        values: parameters and inputs to look at, where those to trace have none.

    Raises:
        ValueError: they do, or it is not known; inputs or outputs whose first axis is not that of the rows.
    """
    batch = trace(asking.apply_fn, params, (inputs,), None, asking.structures, None)
    (out,) = batch.structure.outputs
    rows = out.shape[0]
    for (path, x), axes in zip(jax.tree_util.tree_leaves_with_path(inputs), batch.structure.inputs, strict=False):
        name = f"inputs{jax.tree_util.keystr(path)}"
        if jnp.shape(x)[:1] != (rows,):
            raise ValueError(
                f"observations of rows need inputs whose leading axis has {rows} rows, as the outputs; {name} "
                f"have shape {list(jnp.shape(x))}"
            )
        if axes[:1] != (0,) and not asking.independent:
            raise ValueError(
                f"{asking.who}, and the first axis of {name}, of shape {list(jnp.shape(x))}, is not one of rows "
                f"in this model, though as long: give every row its own, {asking.way_out}, or pass "
                "rows_independent=True if it is"
            )
    links = batch.structure.rows.links
    if links and links[0].certain and not asking.independent:
        raise _refusal(asking, links[0])
    try:
        row = trace(
            asking.apply_fn,
            params,
            (jax.tree.map(functools.partial(_first, number), inputs),),
            None,
            asking.structures,
            None,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{asking.who}, and this model cannot run {_rows(number)}: take the number of rows from the inputs, or "
            f"{asking.way_out}; the model said: {error}"
        ) from error
    shape = row.structure.outputs[0].shape
    if shape != (number, *out.shape[1:]):
        raise ValueError(
            f"{_rows(number)} of the batch alone gives outputs of shape {list(shape)} where each of {rows} together "
            f"has {list(out.shape[1:])}: observations of rows run every row alone, so take the number of rows from "
            "the inputs, keep what all rows share (such as a table of as many entries) out of the inputs, in a "
            "closure, or give taps= of the whole batch"
        )
    links = links if links or rows < 2 else _of_numbers(batch, row)
    if links and not asking.independent:
        _ask_values(asking, links[0], *((params, inputs) if values is None else values), alone=True)
    return Alone(batch, row)


def rows_apart(asking: Asking, params: Tree, inputs: Tree) -> Program:
    """The program of a batch, where no row depends on others; on its place in the batch it may.

    Raises:
        ValueError: they do, or it is not known.
    """
    batch = trace(asking.apply_fn, params, (inputs,), None, asking.structures, None)
    link = next((one for one in batch.structure.rows.links if one.mixes), None)
    if link is not None and not asking.independent:
        if link.certain:
            raise _refusal(asking, link)
        _ask_values(asking, link, params, inputs, alone=False)
    return batch


def check_apart(asking: Asking, params: Tree, inputs: Tree, number: int = 1) -> None:
    """Raise where `rows_alone` does, on shapes without the places on a mesh that arrays have."""
    shape_of = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)))
    rows_alone(asking, shape_of(params), shape_of(inputs), (params, inputs), number)


def _ask_values(asking: Asking, link: Link, params: Tree, inputs: Tree, alone: bool) -> None:
    """Raise where values show that a link is one, or where there are none."""
    shown, key = asking.structures.shown, (link, alone)
    if shown.get(key) is None and _is_concrete((params, inputs)):
        shown[key] = _shown(asking.apply_fn, params, inputs, alone)
    found = shown.get(key)
    if found is None:
        raise ValueError(
            f"{asking.who}, and the program does not say whether rows of this model depend on each other: {link}; "
            "give init finite parameters and an example= of rows that differ, whose values decide (or call this once "
            f"outside of jit), pass rows_independent=True if you know that they do not, or {asking.way_out}"
        )
    if found:
        raise _refusal(asking, link, f", and {found}")


def _refusal(asking: Asking, link: Link, shown: str = "") -> ValueError:
    recipe = f"{link.recipe}, " if link.recipe else ""
    return ValueError(
        f"{asking.who}, and rows of this model depend on each other: {link}{shown}; "
        f"{recipe}{asking.way_out}, or pass rows_independent=True if you know better"
    )


def _first(number: int, x: Any) -> jax.ShapeDtypeStruct:
    kind = x if isinstance(x, jax.ShapeDtypeStruct) else abstract(meshes.with_all_rows(jnp.asarray(x)))
    return stacked(unstacked(kind), number)


def _rows(number: int) -> str:
    return "one row" if number == 1 else f"{number} rows"


def _of_numbers(batch: Program, row: Program) -> tuple[Link, ...]:
    """A number of the batch's program that one row alone does not have: it may be the number of rows."""
    single = _numbers(row.traced)
    for value, eqn in _numbers(batch.traced).items():
        if value not in single:
            name, where = eqn.primitive.name, batch.structure.survey.line(eqn)
            reason = f"has the number {value:g}, which the program of one row alone has not"
            return (Link(name, where, reason, False, "leave the number of rows out of the model"),)
    return ()


def _numbers(traced: Any) -> dict[float, Any]:
    """Real numbers that are written into a program and go into its results, and the equation of each."""
    return _joined(_results(traced, None))


def _results(traced: Any, given: list[dict] | None) -> list[dict]:
    """The numbers in each result of a traced function, from those in its arguments."""
    body, _ = opened(traced)
    constants: list[dict] = [{} for _ in body.constants]

    def meet(eqn, values):
        found = [x if isinstance(x, dict) else {y: eqn for y in _written(x)} for x in values]
        if (inner := called(eqn)) is not None:
            return _results(inner, found)
        for part in eqn.params.values():
            for one in part if isinstance(part, tuple | list) else (part,):
                if hasattr(one, "jaxpr") or hasattr(one, "eqns"):
                    found += _results(one, None)
        return [_joined(found)] * len(eqn.outvars)

    given = [{} for _ in body.arguments] if given is None else given
    return [x if isinstance(x, dict) else {} for x in walk(body, [*constants, *given], meet)]


def _joined(parts: list[dict]) -> dict:
    return {value: eqn for part in parts for value, eqn in part.items()}


def _written(x: Any) -> list[float]:
    """A real number of the program itself."""
    is_number = np.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.floating) and not math.isnan(x)
    return [float(x)] if is_number else []


def _is_concrete(tree: Tree) -> bool:
    return not any(is_traced(x) or isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def _shown(apply_fn: Callable, params: Tree, inputs: Tree, alone: bool) -> str | None:
    """What a model's values show: how a row of a batch differs from the same row alone; ``""`` where it does not.

    Outputs and their derivatives are compared, at the parameters and near them, where no gate is shut by zeros.
    ``None`` where values cannot show anything.

    Args:
        alone: or among other rows, at its place in the batch.
    """
    inputs = jax.tree.map(lambda x: meshes.with_all_rows(jnp.asarray(x)), inputs)
    number = jax.tree.leaves(inputs)[0].shape[0]
    if not any(map(_differ, jax.tree.leaves(inputs))):
        return None
    leaves, treedef = jax.tree.flatten(params)
    free = list(map(is_free, leaves))

    def model(moving, inputs):
        left = iter(moving)
        joined = [next(left) if moves else x for x, moves in zip(leaves, free, strict=True)]
        return apply_fn(jax.tree.unflatten(treedef, joined), inputs)

    @jax.jit
    def pulled(moving, inputs, cotangent):
        outputs, pullback = jax.vjp(lambda moving: model(moving, inputs), moving)
        return outputs, pullback(cotangent.astype(outputs.dtype))[0]

    def others(row):
        """The inputs without the other rows, or with others in their place."""
        if alone:
            return [jax.tree.map(lambda x: x[row : row + 1], inputs)]
        own = jnp.arange(number) == row
        copies = jax.tree.map(lambda x: x[jnp.full(number, row)], inputs)
        return [copies, jax.tree.map(lambda x: _turned(x, own), inputs)]

    def differs(moving, row, cotangents):
        outputs, together = pulled(moving, inputs, cotangents)
        for here in others(row):
            one, single = pulled(moving, here, cotangents[row : row + 1] if alone else cotangents)
            for what, a, b in (("outputs", [outputs[row]], [one[0 if alone else row]]), ("scores", together, single)):
                if not all(bool(jnp.isfinite(x).all()) for x in (*a, *b)):
                    return None
                if _apart(a, b, math.sqrt(max(float(jnp.finfo(x.dtype).eps) for x in (outputs, *moving)))):
                    return f"row {row} {'alone' if alone else 'among other rows'} has other {what} than in its batch"
        return ""

    given = [jnp.asarray(x) for x, moves in zip(leaves, free, strict=True) if moves]
    whole = jax.eval_shape(model, given, inputs)
    every = jax.random.normal(jax.random.key(1), whole.shape)
    for moving in (given, _near(given)):
        for row in sorted({round(i * (number - 1) / (_COMPARED - 1)) for i in range(_COMPARED)}):
            here = (jnp.arange(number) == row).reshape(-1, *(1,) * (len(whole.shape) - 1))
            if (found := differs(moving, row, jnp.where(here, every, 0))) != "":
                return found
    return ""


def _turned(x: Array, own: Array) -> Array:
    """Numbers of the opposite sign in all rows but one."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where(own.reshape(-1, *(1,) * (x.ndim - 1)), x, -x)


def _differ(x: Array) -> bool:
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x = jax.random.key_data(x)
    return bool((x != x[:1]).any())


def _near(given: list[Array]) -> list[Array]:
    keys = jax.random.split(jax.random.key(0), max(1, len(given)))

    def moved(x, key):
        size = 0.1 * jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))) + 0.01 if x.size else 0.0
        return (x + size * jax.random.normal(key, x.shape)).astype(x.dtype)

    return list(map(moved, given, keys))


def _apart(a: list, b: list, tolerance: float) -> bool:
    a, b = ([np.asarray(x, np.float64) for x in y] for y in (a, b))
    most = max([np.abs(x).max(initial=0) for x in (*a, *b)], default=0)
    scales = [max(np.abs(x).max(initial=0), np.abs(y).max(initial=0), 1e-3 * most) for x, y in zip(a, b, strict=True)]
    return any(np.abs(x - y).max(initial=0) > tolerance * s for x, y, s in zip(a, b, scales, strict=True))

"""Squared scores of every row from taps that a training step has, without another backward pass."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._support import meshes, rejection
from fisher_jax._support.dtypes import is_floating, wide, wide_dtype
from fisher_jax._support.jax_internals import abstract, convolution
from fisher_jax._tracing.alone import rows_apart
from fisher_jax._tracing.dense import token_axes
from fisher_jax._tracing.places import UnfollowedError, input_token_axes, row_ids
from fisher_jax._tracing.program import Tap, gradient_of_use, with_ids
from fisher_jax._tracing.roles import Grouping
from fisher_jax._tracing.uses import Spec
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import tokens_of, unit_ids
from fisher_jax.estimators import gram
from fisher_jax.estimators.loss_of_taps import of_another_loss
from fisher_jax.estimators.problem import Problem, square, zeros_like
from fisher_jax.welford import moments as moments_room
from fisher_jax.welford.moments import Moments

__all__ = ["by_taps"]

Tree = Any
_WAY_OUT = "leave taps= out, and the rows are differentiated one by one"


def by_taps(problem: Problem, params: Tree, batch: Batch, taps: list[Tap], scale: Any) -> tuple[Moments, Array]:
    """``(scale * sum_t d loss / d params)**2 / w_u`` of every row ``u``, and the reasons to reject the batch."""
    if problem.kind != "empirical":
        raise ValueError("taps of a training step give the empirical Fisher, not the true one")
    structure = rows_apart(problem.asking("of taps takes rows apart"), params, batch.inputs).structure
    (out,) = structure.outputs
    tokens, bad = tokens_of(problem.likelihood, out, batch)
    num_rows = out.shape[0]
    taps = with_ids(taps, structure)
    places = [_rows_of(tap, num_rows) for tap in taps]
    leaves, treedef = jax.tree.flatten(params)

    def run(taps, weights, ids):
        def value(row):
            found: list = [None] * len(leaves)
            for i, (x, one) in enumerate(zip(leaves, problem.groupings, strict=True)):
                if one is not None and is_floating(x):
                    own = [(tap, place) for tap, place in zip(taps, places, strict=True) if tap.leaf == i]
                    found[i] = _leaf(x, one, own, row, scale)
            sums = jax.tree.unflatten(treedef, found)
            return sums if problem.combine is None else problem.combine(sums)

        def step(carry, part):
            row, weight, unit_id = part
            return moments_room.fold(carry, value(row), weight, unit_id), None

        like = jax.eval_shape(value, jax.ShapeDtypeStruct((), jnp.int32))
        first = moments_room.start(zeros_like(like), problem.unit)
        parts = (jnp.arange(num_rows, dtype=jnp.int32), weights.reshape(num_rows, -1).sum(1), ids)
        return moments_room.finish(jax.lax.scan(step, first, parts)[0])

    moments = meshes.replicating(run, taps, tokens.weights, unit_ids(problem.unit, batch.units, num_rows))
    finite = functools.reduce(
        jnp.logical_and, [jnp.all(jnp.isfinite(jnp.asarray(t.cotangents))) for t in taps], jnp.bool_(True)
    )
    bad |= of_another_loss(problem.likelihood, structure.head, params, taps, tokens, scale)
    return moments, bad | rejection.reason_mask(non_finite=~finite)


def _leaf(x: Array, one: Grouping, own: list[tuple[Tap, "_Rows"]], row: Array, scale: Any) -> Tree:
    """Groups of the squared score of one row, ``sum_t w_t f_t`` without the division by the row's weight."""
    taps = [tap for tap, _ in own]
    parts = [place.of(tap, row) for tap, place in own]
    specs = [
        Spec(t.leaf, t.use, abstract(c), tuple(map(abstract, inputs)), c.shape[: len(t.use.loops)])
        for t, (inputs, c) in zip(taps, parts, strict=True)
    ]
    if gram.fits(specs, one):
        (use,), ((inputs, cotangents),) = [t.use for t in taps], parts
        by_gram, by_gradient = gram.cost(specs[0])
        sums = functools.partial(gram.squared_sums, use, str(one.side), by_gram=by_gram <= by_gradient)
        for _ in use.loops:
            sums = jax.vmap(sums)
        found = sums(inputs, _scaled(cotangents, scale))
        return one.finish(found)
    total = jnp.zeros(x.shape, wide_dtype(x.dtype))
    for tap, (inputs, cotangents) in zip(taps, parts, strict=True):
        total = total + gradient_of_use(tap.use, 0, inputs, cotangents).astype(total.dtype)
    return one(square(_scaled(total, scale)))


def _scaled(x: Array, scale: Any) -> Array:
    return wide(x) * jnp.asarray(scale, wide_dtype(x.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """Where the tokens of each row lie in a tap.

    Attributes:
        axes: of the inputs and of the cotangents, loops counted; ``None`` where every row has all of the inputs.
        index: ``[rows, tokens of a row]``, places along these axes; ``None``: there is one row.
    """

    axes: tuple[int | None, int]
    index: np.ndarray | None

    def of(self, tap: Tap, row: Array) -> tuple[tuple, Array]:
        """Inputs and cotangents of one row: cut out, or where an operation has a fixed shape, all others zero."""
        inputs, cotangents = tap.inputs or (), jnp.asarray(tap.cotangents)
        if self.index is None:
            return inputs, cotangents
        x_axis, axis = self.axes
        if x_axis is None:
            owner = np.zeros(self.index.size, np.int32)
            owner[self.index] = np.arange(len(self.index))[:, None]
            shape = [-1 if i == axis else 1 for i in range(cotangents.ndim)]
            return inputs, jnp.where(owner.reshape(shape) == row, cotangents, 0)
        x, *others = inputs
        return (self._cut(x, row, x_axis), *others), self._cut(cotangents, row, axis)

    def _cut(self, x: Array, row: Array, axis: int) -> Array:
        assert self.index is not None
        size = self.index.shape[1]
        if np.array_equal(self.index.ravel(), np.arange(self.index.size)):
            return jax.lax.dynamic_slice_in_dim(x, row * size, size, axis)
        return jnp.take(x, jnp.asarray(self.index)[row], axis)


def _rows_of(tap: Tap, num_rows: int) -> _Rows:
    if tap.cotangents is None:
        raise ValueError(
            f"the tap of {tap.path} was reduced; fj.value_grad_and_taps without reduce= keeps rows apart"
        )
    if tap.kind == "generic":
        at = f" at {tap.use.where}" if tap.use.where else ""
        raise ValueError(
            f"parameter {tap.path} is used by {tap.use.primitive}{at}, whose tap is the gradient of "
            f"all rows together: {_WAY_OUT}"
        )
    use, loops, cotangents = tap.use, len(tap.use.loops), jnp.asarray(tap.cotangents)
    try:
        ids = row_ids(use)
    except UnfollowedError as error:
        raise ValueError(
            f"the tap of {tap.path} at {use.where} cannot be cut into rows: {error}: {_WAY_OUT}"
        ) from None
    if not ids.axes and num_rows == 1:
        return _Rows((None, 0), None)
    met = cotangents if use.kind in ("conv", "scale", "bias") else jnp.asarray((tap.inputs or ())[0])
    values = ids.values.ravel()
    counts = np.bincount(values[values >= 0], minlength=num_rows)
    if len(ids.axes) != 1 or ids.axes[0] < loops or (counts * num_rows != len(values)).any():
        raise ValueError(
            f"the rows of the batch are not one axis of the tap of {tap.path} at {use.where}: {_WAY_OUT}"
        )
    (axis,) = ids.axes
    if met.shape[axis] != len(values):
        raise ValueError(
            f"the tap of {tap.path} has {met.shape[axis]} tokens, which are not {num_rows} rows of the batch: give "
            f"the taps of this batch, or {_WAY_OUT}"
        )
    index = np.argsort(values, kind="stable").reshape(num_rows, -1)
    if use.kind in ("scale", "bias"):
        return _Rows((None, axis), index)
    tokens = input_token_axes(use, met.ndim - loops)
    if use.kind == "conv":
        return _Rows((loops + convolution(use.options).inputs[0], axis), index)
    place = token_axes(use, cotangents.ndim - loops)[tokens.index(axis - loops)]
    return _Rows((axis, loops + place), index)

"""A batch and a model: the tokens of the batch, with inputs of which nothing is read that is not real."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._tracing.met import SHIFT, USED, met
from fisher_jax._tracing.program import trace
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import Tokens, tokens_of
from fisher_jax.likelihoods import Likelihood

__all__ = ["read", "readable_inputs"]

Tree = Any


def read(
    likelihood: Likelihood, apply_fn: Callable, params: Tree, batch: Batch, labels_matter: bool = True
) -> tuple[Tokens, Array, Any]:
    """Tokens of a batch, why it cannot be used, and the shape of the model's outputs. See `tokens_of`."""
    outputs = jax.eval_shape(apply_fn, params, batch.inputs)
    tokens, bad = tokens_of(likelihood, outputs, batch, labels_matter)
    silent = None if batch.weights is None else tokens.weights
    return tokens._replace(inputs=readable_inputs(apply_fn, params, batch, silent)), bad, outputs


def readable_inputs(apply_fn: Callable, params: Tree, batch: Batch, weights: Any = None) -> Tree:
    """Inputs of a batch of which nothing is read that is not real, see `fisher_jax.batch.tokens`.

    - A row in which nothing is real becomes one in which something is. (Rows that depend on each other: here.)
    - A position that is not real becomes 0 in an input that the model meets with a parameter first: looks up, or
      multiplies. What a model compares or adds to other data says to it what is padding, and stays.
    - With ``weights``, what is not finite becomes 0 in a row without any: where no inputs but the loss's are read.
    """
    inputs = batch.inputs
    if batch.real is not None:
        real = jnp.asarray(batch.real).astype(bool)
        leaves, treedef = jax.tree.flatten(inputs)
        order = _order(apply_fn, params, inputs, real.shape)
        found = met(apply_fn, params, inputs, order)
        parts = zip(leaves, found, strict=True)
        inputs = jax.tree.unflatten(
            treedef, [_without_padding(x, real, order(jnp.shape(x)), what) for x, what in parts]
        )
    return inputs if weights is None else _without_silent_rows(inputs, weights)


def _order(apply_fn: Callable, params: Tree, inputs: Tree, real: tuple[int, ...]) -> Callable[[tuple], tuple]:
    """From the shape of an input its axes of rows and positions, in the order of ``real``: as many as it has."""
    swapped = len(real) > 1 and real[0] == real[1] and _is_time_major(apply_fn, params, inputs, real)

    def order(shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(real) > 1 and shape[:2] == (real[1], real[0]) and (swapped or real[0] != real[1]):
            return (1, 0, *range(2, len(real))) if shape[2 : len(real)] == real[2:] else (1,)
        if shape[: len(real)] == real:
            return tuple(range(len(real)))
        return (0,) if shape[:1] == real[:1] else ()

    return order


def _is_time_major(apply_fn: Callable, params: Tree, inputs: Tree, real: tuple[int, ...]) -> bool:
    """Whether ids that are laid on the inputs row by row come out of the model the other way round."""
    return trace(apply_fn, params, (inputs,), lead=real).structure.time_major


def _without_padding(x: Any, real: Array, axes: tuple[int, ...], what: int) -> Any:
    dtype = jnp.result_type(x)
    if not axes or jnp.issubdtype(dtype, jax.dtypes.extended):
        return x
    x = jnp.asarray(x)
    anything = real.reshape(real.shape[0], -1).any(1)
    rows = jnp.expand_dims(anything, [i for i in range(x.ndim) if i != axes[0]])
    other = jax.lax.dynamic_index_in_dim(x, jnp.argmax(anything), axes[0])
    x = jnp.where(rows, x, other)
    if what == USED or len(axes) < real.ndim:
        return x
    places = jnp.where(anything.reshape(-1, *[1] * (real.ndim - 1)), real, real[jnp.argmax(anything)])
    places = places.transpose(axes)  # of rows and positions, or the other way round
    places = places.reshape(places.shape + (1,) * (x.ndim - places.ndim))
    if what == SHIFT:
        places = places | jnp.isfinite(x)
    return jnp.where(places, x, jnp.zeros_like(x))


def _without_silent_rows(inputs: Tree, weights: Array) -> Tree:
    if not jnp.ndim(weights):
        return inputs
    counted = jnp.any((jnp.asarray(weights) > 0).reshape(len(weights), -1), 1)

    def clean(x):
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact) or jnp.shape(x)[:1] != counted.shape:
            return x
        rows = jnp.ones_like(x, bool) & counted.reshape(-1, *[1] * (jnp.ndim(x) - 1))
        return jnp.where(rows | jnp.isfinite(x), x, jnp.zeros_like(x))

    return jax.tree.map(clean, inputs)

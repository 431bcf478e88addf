"""A batch and a model: the tokens of the batch, with inputs of which nothing is read that is not real."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import rejection
from fisher_jax._tracing.met import SHIFT, USED, met
from fisher_jax._tracing.program import trace
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import explained
from fisher_jax.batch.tokens import Tokens, tokens_of
from fisher_jax.likelihoods import Likelihood

__all__ = ["read", "readable_inputs"]

Tree = Any


def read(
    likelihood: Likelihood, apply_fn: Callable, params: Tree, batch: Batch, labels_matter: bool = True
) -> tuple[Tokens, Array, Any]:
    """Tokens of a batch, why it cannot be used, and the shape of the model's outputs. See `tokens_of`."""
    outputs = jax.eval_shape(explained(apply_fn), params, batch.inputs)
    tokens, bad = tokens_of(likelihood, outputs, batch, labels_matter)
    silent = None if batch.weights is None else tokens.weights
    inputs, linked = readable_inputs(apply_fn, params, batch, silent)
    return tokens._replace(inputs=inputs), bad | linked, outputs


def readable_inputs(apply_fn: Callable, params: Tree, batch: Batch, weights: Any = None) -> tuple[Tree, Array]:
    """Inputs of a batch of which nothing is read that is not real, see `fisher_jax.batch.tokens`; reasons against it.

    - A row in which nothing is real becomes one in which something is. Where other rows depend on it, or may, the
      batch is rejected.
    - A position that is not real becomes 0 in an input that the model meets with a parameter first: looks up, or
      multiplies. In one that it adds to other data place by place NaN becomes 0. What it compares, or spreads over
      other places, says to it what is padding, and stays.
    - With ``weights``, what is not finite becomes 0 in a row without any: where no inputs but the loss's are read.
    """
    inputs, bad = batch.inputs, jnp.zeros((), jnp.int32)
    if batch.real is not None:
        real = jnp.asarray(batch.real).astype(bool)
        leaves, treedef = jax.tree.flatten(inputs)
        # Python numbers stay what they are: a model may loop over them.
        where = [i for i, x in enumerate(leaves) if not isinstance(x, bool | int | float | complex)]
        arrays = [leaves[i] for i in where]

        def joined(arrays: list) -> Tree:
            found = dict(zip(where, arrays, strict=True))
            return jax.tree.unflatten(treedef, [found.get(i, x) for i, x in enumerate(leaves)])

        structure = trace(apply_fn, params, (inputs,), lead=real.shape).structure
        meets = met(lambda params, arrays: apply_fn(params, joined(arrays)), params, arrays, structure.inputs)
        parts = zip(arrays, structure.inputs, meets, strict=True)
        inputs = joined([_without_padding(x, real, own, what) for x, own, what in parts])
        if any(link.mixes for link in structure.rows.links):
            empty = ~real.reshape(real.shape[0], -1).any(1)
            bad = rejection.reason_mask(row_of_padding=empty.any() & ~empty.all())
    return inputs if weights is None else _without_silent_rows(inputs, weights), bad


def _without_padding(x: Any, real: Array, axes: tuple[int, ...], what: int) -> Any:
    dtype = jnp.result_type(x)
    if not axes or jnp.issubdtype(dtype, jax.dtypes.extended):
        return x
    x = jnp.asarray(x)
    anything = real.reshape(real.shape[0], -1).any(1)
    rows = jnp.expand_dims(anything, [i for i in range(x.ndim) if i != axes[0]])
    # A sum, not an index: rows that lie on several devices have no slice of one.
    first = jnp.arange(real.shape[0]) == jnp.argmax(anything)
    one = jnp.expand_dims(first, [i for i in range(x.ndim) if i != axes[0]])
    other = jnp.where(one, x, jnp.zeros_like(x)).sum(axes[0], keepdims=True, dtype=x.dtype)
    x = jnp.where(rows, x, other)
    if what == USED or len(axes) < real.ndim:
        return x
    places = jnp.where(anything.reshape(-1, *[1] * (real.ndim - 1)), real, _row(real, first))
    places = places.transpose(axes)  # of rows and positions, or the other way round
    places = places.reshape(places.shape + (1,) * (x.ndim - places.ndim))
    if what == SHIFT:
        # Minus infinity takes a place away; NaN says nothing.
        places = places | ~jnp.isnan(x)
    return jnp.where(places, x, jnp.zeros_like(x))


def _row(real: Array, first: Array) -> Array:
    return (real & first.reshape(-1, *[1] * (real.ndim - 1))).any(0)


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

"""What the tokens of a batch weigh, which of them count, and whether the batch can be used."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import rejection
from fisher_jax._support.dtypes import wide_dtype
from fisher_jax._support.errors import RejectedBatchError
from fisher_jax.batch import Batch
from fisher_jax.likelihoods import Likelihood

__all__ = ["Part", "log_probs", "require_usable", "weigh", "without_padding"]


class Part(NamedTuple):
    """The tokens of a batch, or of some of its rows.

    ``weights`` have the leading shape of the outputs, at least float32, 0 where a token does not count.
    """

    inputs: Any
    targets: Any
    weights: Array


def weigh(likelihood: Likelihood, outputs: Any, batch: Batch, labels_matter: bool) -> tuple[Part, Array]:
    """The tokens of a batch and an int32 mask of reasons why it cannot be used (`fisher_jax._support.rejection`).

    Args:
        outputs: what ``jax.eval_shape`` says of the model's outputs.
        labels_matter: whether targets are read at all.

    Raises:
        ValueError: outputs that are no floating array ``[..., K]``, weights or targets that do not fit them.
    """
    if not hasattr(outputs, "shape") or not jnp.issubdtype(outputs.dtype, jnp.floating) or not outputs.shape:
        raise ValueError(f"apply_fn returns one floating array [..., K], found {_shown(outputs)}")
    lead, dtype = outputs.shape[:-1], wide_dtype(outputs.dtype)
    weights = jnp.ones(lead, dtype) if batch.weights is None else jnp.asarray(batch.weights).astype(dtype)
    if weights.shape != lead:
        raise ValueError(
            f"weights have one value per token, the leading shape of the outputs {list(lead)}, found "
            f"{list(weights.shape)}"
        )
    bad = rejection.reason_mask(negative_weight=~jnp.all((weights >= 0) & jnp.isfinite(weights)))
    targets = None if batch.targets is None else jnp.asarray(batch.targets)
    if labels_matter:
        inside = None if targets is None else likelihood.in_range(outputs, targets)
        if inside is None or inside.shape != lead:
            raise ValueError(
                f"targets of shape {list(getattr(targets, 'shape', ()))} do not fit {likelihood.name} outputs of "
                f"shape {list(outputs.shape)}"
            )
        bad = bad | rejection.reason_mask(target_out_of_range=jnp.any((weights > 0) & ~inside))
    else:
        targets = None
    weights = jnp.where(weights > 0, weights, 0)
    return Part(without_padding(batch.inputs, weights, batch.real), targets, weights), bad


def without_padding(inputs: Any, weights: Array, real: Any = None) -> Any:
    """Inputs in which what is not finite is 0 at padding, and in rows without any weight.

    Zero times NaN would spoil a backward pass through positions that do not count. Finite inputs stay as they are.
    """
    if weights.ndim == 0:
        return inputs
    rows = jnp.any((weights > 0).reshape(weights.shape[0], -1), 1)

    def clean(x):
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            return x
        matters = jnp.ones_like(x, bool)
        for mask in (rows, None if real is None else jnp.asarray(real) != 0):
            if mask is not None and jnp.shape(x)[: mask.ndim] == mask.shape:
                matters &= mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        return jnp.where(matters | jnp.isfinite(x), x, jnp.zeros_like(x))

    return jax.tree.map(clean, inputs)


def log_probs(likelihood: Likelihood, outputs: Array, targets: Any, weights: Array) -> Array:
    """Per-token log-likelihood, 0 where the weight is 0, whatever the outputs and targets are there."""
    # On a mesh of explicit axes the outputs say where the tokens lie, and weights that were not given do not.
    active = (weights > 0) | jnp.zeros_like(outputs, bool).any(-1)
    # Both selections: a NaN that is only hidden in the value would come back in the gradient.
    safe = jnp.where(active[..., None], outputs, jnp.zeros_like(outputs))
    found = likelihood.log_prob(safe, targets)
    return jnp.where(active, found, jnp.zeros_like(found))


def require_usable(bad: Array, total: Array) -> None:
    """Raise for a batch whose values show, outside of any trace, that it cannot be used.

    Raises:
        RejectedBatchError: says why.
    """
    try:
        mask, weight = int(bad), float(total)
    except jax.errors.ConcretizationTypeError:
        return
    if mask:
        raise RejectedBatchError(f"the batch cannot be used: {'; '.join(rejection.reasons(mask))}")
    if weight == 0:
        raise RejectedBatchError("the batch is empty: every weight is 0, and a mean over no tokens is not defined")


def _shown(outputs: Any) -> str:
    if not hasattr(outputs, "shape"):
        return type(outputs).__name__
    return f"shape {list(outputs.shape)} and dtype {outputs.dtype}"

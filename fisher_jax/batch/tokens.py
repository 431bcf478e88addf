"""What a batch says of its tokens: what they weigh, which of them count, and whether the batch can be used.

One meaning for the whole library:

- a token of weight 0 is never read for the loss: its outputs and its target may be anything, NaN too. It may be real
  (a prompt), and then its inputs are read: by the model, and by the input factors of K-FAC.
- a position that is not real (``Batch.real``) is never read at all, and has no loss: without weights only what is
  real counts, and a weight there that is not 0 rejects the batch. What the model looks up, or multiplies by a
  parameter, is replaced by 0 there, and NaN in what it adds to other data. An input that it compares, or spreads over
  other places (a mask, a bias of attention), says to it what is padding, and stays.
- a row in which nothing is real is as if it were not there.
- a weight that is negative, NaN or infinite rejects the batch, and so does a target out of range where the weight is
  not 0, or a value of ``real`` that is neither 0 nor 1. Where nothing is real the batch is empty, as one without
  weight. Shapes that do not fit raise while tracing; values are found in a compiled step and told as reasons.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import meshes, rejection
from fisher_jax._support.dtypes import wide_dtype
from fisher_jax._support.errors import RejectedBatchError
from fisher_jax.batch.batch import Batch, row_ids
from fisher_jax.likelihoods import Likelihood, bernoulli, categorical, gaussian

__all__ = [
    "Tokens",
    "check_outputs",
    "fisher_factor",
    "fisher_product",
    "has_weight",
    "log_probs",
    "mean_of",
    "readable",
    "require_usable",
    "tokens_of",
    "unit_ids",
    "weigh",
    "weights_of",
]


class Tokens(NamedTuple):
    """The tokens of a batch, or of some of its rows, in a form in which everything can be read.

    Attributes:
        inputs: those of the batch; of `fisher_jax._tracing.reading.read` those that can be read.
        targets: those of the batch; ``None`` where labels do not matter.
        weights: in the leading shape of the outputs, at least float32: 0 where a token does not count.
    """

    inputs: Any
    targets: Any
    weights: Array

    @property
    def total_weight(self) -> Array:
        """``sum_t w_t``, what every mean is divided by."""
        return self.weights.sum()


def tokens_of(likelihood: Likelihood, outputs: Any, batch: Batch, labels_matter: bool = True) -> tuple[Tokens, Array]:
    """The tokens of a batch and an int32 mask of reasons why it cannot be used (`fisher_jax._support.rejection`).

    Args:
        outputs: the model's outputs, or what ``jax.eval_shape`` says of them.
        labels_matter: whether targets are read at all.

    Raises:
        ValueError: outputs that are not one floating array ``[..., K]``; weights or targets that do not fit them.
    """
    check_outputs(outputs)
    _check_rows(outputs.shape, batch.inputs)
    weights, bad = weights_of(batch, outputs.shape[:-1], wide_dtype(outputs.dtype))
    targets = None
    if labels_matter:
        targets, outside = _targets(likelihood, outputs, batch.targets, weights)
        bad = bad | outside
    return Tokens(batch.inputs, targets, weights), bad


def weights_of(batch: Batch, lead: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """One usable weight per token, and a mask of reasons to reject those of the batch, or what it says is real.

    Raises:
        ValueError: weights of another shape than ``lead``; ``real`` that does not fit it.
    """
    weights, bad = weigh(batch.weights, lead, dtype)
    if batch.real is None:
        return weights, bad
    real = jnp.asarray(batch.real)
    number = min(real.ndim, len(lead))
    if not real.ndim or real.shape[:number] != lead[:number]:
        raise ValueError(
            f"real has one value per row, or per position of a row, shape {list(lead)}, found {list(real.shape)}"
        )
    odd = jnp.any(real != real.astype(bool).astype(real.dtype))
    # Of outputs for whole rows a row counts in which anything is real.
    anything = real.astype(bool).reshape(*real.shape[:number], -1).any(-1)
    real = anything.reshape(*lead[:number], *[1] * (len(lead) - number))
    if batch.weights is None:
        return jnp.where(real, weights, 0), bad | rejection.reason_mask(not_real_or_not=odd)
    scored = jnp.any((weights > 0) & ~real)
    return weights, bad | rejection.reason_mask(not_real_or_not=odd, weight_of_padding=scored)


def check_outputs(outputs: Any) -> None:
    """Raise for outputs of a model that are not one floating array ``[..., K]``."""
    if not hasattr(outputs, "shape"):
        raise ValueError(
            f"apply_fn returns one floating array [..., K], found {type(outputs).__name__}: of outputs and a new "
            "state (mutable=, hk.transform_with_state) return the outputs alone, and put several outputs side by "
            "side with jnp.concatenate (a policy's mean and log standard deviation, for fj.gaussian_with_scale)"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating) or not outputs.shape:
        raise ValueError(
            f"apply_fn returns one floating array [..., K], found shape {list(outputs.shape)} and dtype "
            f"{outputs.dtype}"
        )


def _check_rows(shape: tuple[int, ...], inputs: Any) -> None:
    """Raise for outputs ``[n]`` of ``n`` rows, which would be those of one token."""
    if len(shape) != 1 or shape[0] < 2:
        return
    if any(jnp.shape(x)[:1] == shape for x in jax.tree.leaves(inputs)):
        raise ValueError(
            f"outputs of shape {list(shape)} are those of one token, and an input has {shape[0]} rows: return "
            f"[{shape[0]}, 1], as in outputs[:, None], for one output of each row (targets too), or give the batch "
            "an axis of rows"
        )


def weigh(weights: Any, lead: tuple[int, ...], dtype: Any, of: str = "token") -> tuple[Array, Array]:
    """One usable weight per token (all ones without ``weights``), and a mask of reasons to reject those given.

    Raises:
        ValueError: weights of another shape than ``lead``.
    """
    weights = jnp.ones(lead, dtype) if weights is None else jnp.asarray(weights).astype(dtype)
    if weights.shape != lead:
        raise ValueError(f"weights have one value per {of}, shape {list(lead)}, found {list(weights.shape)}")
    usable = (weights >= 0) & jnp.isfinite(weights)
    return jnp.where(usable, weights, 0), rejection.reason_mask(negative_weight=~jnp.all(usable))


def _targets(likelihood: Likelihood, outputs: Any, targets: Any, weights: Array) -> tuple[Array, Array]:
    """Targets, and a mask of reasons to reject them."""
    if targets is None:
        raise ValueError(f"{likelihood.name} outputs of shape {list(outputs.shape)} need targets, found None")
    targets = jnp.asarray(targets)
    inside = likelihood.in_range(outputs, targets)
    if inside.shape != weights.shape:
        raise ValueError(
            f"targets of shape {list(targets.shape)} do not fit {likelihood.name} outputs of shape "
            f"{list(outputs.shape)}"
        )
    return targets, rejection.reason_mask(target_out_of_range=jnp.any((weights > 0) & ~inside))


def readable(outputs: Array, weights: Array) -> Array:
    """Outputs ``[..., K]``, 0 at the tokens of weight 0, and so are their derivatives there."""
    return jnp.where(_counted(outputs, weights)[..., None], outputs, jnp.zeros_like(outputs))


def log_probs(likelihood: Likelihood, outputs: Array, targets: Any, weights: Array) -> Array:
    """Per-token log-likelihood, 0 where the weight is 0, whatever the outputs and targets are there.

    Its gradient is 0 there too. A derivative in forward mode that is not finite there needs `readable` outputs.
    """
    counted = _counted(outputs, weights)
    # Derivatives that are finite at 0 need no selection of their own, which would be a pass over the vocabulary.
    outputs = _replaced(outputs, counted) if likelihood in _SMOOTH else readable(outputs, weights)
    shape = counted.shape + (1,) * (jnp.ndim(targets) - counted.ndim)
    targets = jnp.where(counted.reshape(shape), targets, jnp.zeros_like(targets))
    found = likelihood.log_prob(outputs, targets)
    if jnp.shape(found) != counted.shape:
        raise ValueError(
            f"log_prob of the likelihood {likelihood.name!r} gives one number for each token, shape "
            f"{list(counted.shape)}, found {list(jnp.shape(found))} for outputs {list(outputs.shape)}: sum over the "
            "last axis, as in .sum(-1), and over no other"
        )
    return jnp.where(counted, found, jnp.zeros_like(found))


def fisher_factor(likelihood: Likelihood, outputs: Array, k: Array | int) -> Array:
    """Column ``k`` of the factor of the output-space Fisher, in the shape of the outputs."""
    return _like_outputs("fisher_factor", likelihood, likelihood.fisher_factor(outputs, k), outputs)


def fisher_product(likelihood: Likelihood, outputs: Array, tangent: Array) -> Array:
    """The output-space Fisher times a tangent, in the shape of the outputs."""
    return _like_outputs("fisher_product", likelihood, likelihood.fisher_product(outputs, tangent), outputs)


def _like_outputs(name: str, likelihood: Likelihood, found: Array, outputs: Array) -> Array:
    if jnp.shape(found) != outputs.shape:
        raise ValueError(
            f"{name} of the likelihood {likelihood.name!r} gives an array like the outputs, shape "
            f"{list(outputs.shape)}, found {list(jnp.shape(found))}"
        )
    return found


_SMOOTH = (bernoulli, categorical, gaussian)


@jax.custom_jvp
def _replaced(outputs: Array, counted: Array) -> Array:
    return jnp.where(counted[..., None], outputs, jnp.zeros_like(outputs))


@_replaced.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return _replaced(*primals), tangents[0]


def _counted(outputs: Array, weights: Array) -> Array:
    counted = weights > 0
    if jax.typeof(outputs).sharding.mesh.empty:
        return counted
    # On a mesh of explicit axes the outputs say where the tokens lie, and weights that were not given do not.
    return counted | jnp.zeros_like(outputs, bool).any(-1)


def mean_of(values: Array, weights: Array) -> Array:
    """``sum_t w_t v_t / sum_t w_t`` of a number per token, which is not read where the weight is 0; 0 of none."""
    total = weights.sum()
    return jnp.sum(weights * jnp.where(weights > 0, values, 0)) / jnp.where(total > 0, total, 1)


def unit_ids(unit: str, units: Any, num_rows: int) -> Array:
    """The observation that every row belongs to, int32 ``[rows]``: zeros unless the unit is a document.

    Raises:
        ValueError: documents without ids; ids of another shape.
        TypeError: ids that are not integers.
    """
    if unit != "document":
        return jnp.zeros(num_rows, jnp.int32)
    if units is None:
        raise ValueError("unit='document' needs units (Batch.units): one integer id per row")
    return meshes.with_all_rows(row_ids(units, num_rows).astype(jnp.int32))


def has_weight(batch: Batch) -> bool:
    """Whether any token of a batch counts, on the host."""
    found = batch.real if batch.weights is None else batch.weights
    return found is None or bool(jnp.any(jnp.asarray(found) != 0))


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

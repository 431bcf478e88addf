"""What every estimator of all parameters needs to know, and the log-likelihoods of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support import rejection
from fisher_jax._support.dtypes import wide, wide_dtype
from fisher_jax._support.jax_internals import zeros
from fisher_jax._tracing.orientation import Grouping
from fisher_jax.batch import Batch
from fisher_jax.likelihoods import Likelihood

__all__ = [
    "Problem",
    "Split",
    "Tokens",
    "is_free",
    "log_probs",
    "signed_total",
    "split",
    "square",
    "tokens_of",
    "unit_ids",
    "weights_of",
    "zeros_like",
]

Tree = Any


class Problem(NamedTuple):
    """One estimator on one tree of parameters."""

    apply_fn: Callable
    likelihood: Likelihood
    groupings: list[Grouping | None]  # of every leaf
    combine: Callable[[Tree], Tree] | None
    estimator: str
    kind: str
    unit: str
    num_samples: int
    temperature: float
    chunk_size: int | None

    @property
    def draws_labels(self) -> bool:
        return self.kind == "true" and self.estimator != "exact"

    @property
    def draws_signs(self) -> bool:
        """Scores of labels drawn from the model itself have mean zero: no signs needed."""
        return self.estimator == "signs" or (self.estimator == "sampled" and self.temperature != 1)

    def reduce(self, gradients: Tree) -> Tree:
        """Squares of gradients, in at least float32, to groups; ``gradients`` has ``None`` at frozen leaves."""
        leaves, treedef = jax.tree.flatten(gradients)
        return self.joined(treedef, [one(square(x)) for one, x in zip(self.free, leaves, strict=True)])

    @property
    def free(self) -> list[Grouping]:
        """Groupings of the leaves that have gradients."""
        return [one for one in self.groupings if one is not None]

    def joined(self, treedef: Any, sums: list) -> Tree:
        """The statistic of one observation, of the sums of every leaf."""
        found = jax.tree.unflatten(treedef, sums)
        return found if self.combine is None else self.combine(found)


def square(x: Array) -> Array:
    """In at least float32."""
    return wide(x) ** 2


class Split(NamedTuple):
    """Parameters to differentiate (``None`` at the others), and a model of them."""

    free: Tree
    outputs: Callable[[Tree, Any], Array]


def is_free(x: Any) -> bool:
    """Whether a parameter has a gradient."""
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def split(apply_fn: Callable, params: Tree) -> Split:
    leaves, treedef = jax.tree.flatten(params)

    def outputs(free, inputs):
        moving = iter(jax.tree.leaves(free))
        joined = [next(moving) if is_free(x) else x for x in leaves]
        return apply_fn(jax.tree.unflatten(treedef, joined), inputs)

    return Split(jax.tree.map(lambda x: jnp.asarray(x) if is_free(x) else None, params), outputs)


def weights_of(batch: Batch, lead: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """One weight per token, and a mask of reasons to reject them."""
    weights = jnp.ones(lead, dtype) if batch.weights is None else jnp.asarray(batch.weights).astype(dtype)
    if weights.shape != lead:
        raise ValueError(
            f"weights have one value per token, the leading shape of the outputs {list(lead)}, found "
            f"{list(weights.shape)}"
        )
    return weights, rejection.reason_mask(negative_weight=~jnp.all((weights >= 0) & jnp.isfinite(weights)))


class Tokens(NamedTuple):
    """Targets and weights of the tokens of one batch, and why it cannot be used."""

    targets: Any
    weights: Array
    bad: Array


def tokens_of(problem: Problem, outputs: Any, batch: Batch) -> Tokens:
    lead = outputs.shape[:-1]
    weights, bad = weights_of(batch, lead, wide_dtype(outputs.dtype))
    if problem.kind == "empirical":
        inside = problem.likelihood.in_range(outputs, batch.targets)
        if inside.shape != lead:
            raise ValueError(
                f"targets of shape {list(jnp.shape(batch.targets))} do not fit {problem.likelihood.name} outputs of "
                f"shape {list(outputs.shape)}"
            )
        bad = bad | rejection.reason_mask(target_out_of_range=jnp.any((weights > 0) & ~inside))
    return Tokens(batch.targets, weights, bad)


def log_probs(likelihood: Likelihood, outputs: Array, targets: Any, weights: Array) -> Array:
    """Per-token log-likelihood, 0 (and without gradient) where the weight is 0."""
    return jnp.where(weights > 0, likelihood.log_prob(outputs, targets), 0)


def signed_total(problem: Problem, outputs: Array, tokens: Tokens, key: Array) -> Array:
    """The scalar whose squared gradient is one draw: ``sum_t c_t log p(y_t)``.

    ``c`` is ``w`` for ``sequence``, ``sqrt(w)`` for ``sampled``, and with random signs for ``signs``.
    """
    label_key, sign_key = jax.random.split(key)
    weights, targets = jnp.maximum(tokens.weights, 0), tokens.targets
    if problem.draws_labels:
        targets = problem.likelihood.sample(label_key, jax.lax.stop_gradient(outputs), problem.temperature)
    factor = weights if problem.estimator == "sequence" else jnp.sqrt(weights)
    if problem.draws_signs:
        factor = factor * jax.random.rademacher(sign_key, factor.shape, factor.dtype)
    return jnp.sum(factor * log_probs(problem.likelihood, outputs, targets, weights))


def unit_ids(unit: str, batch: Batch, num_rows: int) -> Array:
    """The observation that every row belongs to, int32 ``[rows]``."""
    if unit != "document":
        return jnp.zeros(num_rows, jnp.int32)
    if batch.units is None:
        raise ValueError("unit='document' needs Batch.units, one id per row")
    ids = jnp.asarray(batch.units)
    if ids.shape != (num_rows,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"Batch.units are integers [{num_rows}], one per row, found {ids.dtype} {list(ids.shape)}")
    return ids.astype(jnp.int32)


def zeros_like(tree: Tree) -> Tree:
    """Zeros of a tree of ``jax.ShapeDtypeStruct``s, laid out as they say."""
    return jax.tree.map(zeros, tree)

"""What every estimator of all parameters needs to know, and the loss of one draw."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.dtypes import is_floating, wide
from fisher_jax._support.jax_internals import zeros
from fisher_jax._support.lanes import Laid
from fisher_jax._tracing import reading
from fisher_jax._tracing.alone import Alone, Asking, rows_alone
from fisher_jax._tracing.program import with_wide_sums
from fisher_jax._tracing.roles import Grouping
from fisher_jax._tracing.structure import Structures
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import explained
from fisher_jax.batch.tokens import Tokens, log_probs
from fisher_jax.likelihoods import Likelihood

__all__ = ["Problem", "Split", "read", "signed_total", "split", "square", "zeros_like"]

Tree = Any


class Problem(NamedTuple):
    """One estimator on one tree of parameters."""

    apply_fn: Callable
    likelihood: Likelihood
    structures: Structures
    laid: Laid
    groupings: list[Grouping | None]  # of every leaf
    combine: Callable[[Tree], Tree] | None
    estimator: str
    kind: str
    unit: str
    num_samples: int
    temperature: float
    chunk_size: int | None
    rows_independent: bool | None

    @property
    def draws_labels(self) -> bool:
        return self.kind == "true" and self.estimator != "exact"

    @property
    def draws_signs(self) -> bool:
        """Scores of labels drawn from the model itself have mean zero: no signs needed."""
        return self.estimator == "signs" or (self.estimator == "sampled" and self.temperature != 1)

    def asking(self, does: str) -> Asking:
        """What an error says where rows depend on each other."""
        others = "estimator='exact'" if self.estimator == "sequence" else "unit='batch' or estimator='exact'"
        return Asking(
            self.apply_fn, self.structures, self.rows_independent,
            f"estimator={self.estimator!r} with unit={self.unit!r} {does}",
            f"take {others}, whose scores are those of the batch as it is",
        )  # fmt: skip

    def rows_alone(self, params: Tree, inputs: Any) -> Alone:
        """The model's programs of a batch and of one row; an error where rows depend on each other."""
        return rows_alone(self.asking("runs every row of the batch alone"), params, inputs)

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


def split(apply_fn: Callable, params: Tree) -> Split:
    leaves, treedef = jax.tree.flatten(params)

    def outputs(free, inputs):
        moving = iter(jax.tree.leaves(free))
        joined = [next(moving) if is_floating(x) else x for x in leaves]
        return with_wide_sums(explained(apply_fn))(jax.tree.unflatten(treedef, joined), inputs)

    return Split(jax.tree.map(lambda x: jnp.asarray(x) if is_floating(x) else None, params), outputs)


def read(problem: Problem, params: Tree, batch: Batch) -> tuple[Tokens, Array, Any]:
    """Tokens of a batch, why it cannot be used, and the shape of the model's outputs."""
    return reading.read(problem.likelihood, problem.apply_fn, params, batch, problem.kind == "empirical")


def signed_total(problem: Problem, outputs: Array, tokens: Tokens, key: Array) -> Array:
    """The scalar whose squared gradient is one draw: ``sum_t c_t log p(y_t)``.

    ``c`` is ``w`` for ``sequence``, ``sqrt(w)`` for ``sampled``, and with random signs for ``signs``.
    """
    label_key, sign_key = jax.random.split(key)
    weights, targets = tokens.weights, tokens.targets
    if problem.draws_labels:
        targets = problem.likelihood.sample(label_key, jax.lax.stop_gradient(outputs), problem.temperature)
    factor = weights if problem.estimator == "sequence" else jnp.sqrt(weights)
    if problem.draws_signs:
        factor = factor * jax.random.rademacher(sign_key, factor.shape, factor.dtype)
    return jnp.sum(factor * log_probs(problem.likelihood, outputs, targets, weights))


def zeros_like(tree: Tree) -> Tree:
    """Zeros of a tree of ``jax.ShapeDtypeStruct``s, laid out as they say."""
    return jax.tree.map(zeros, tree)

"""Whether taps are those of the log-likelihood: those of smoothed labels or of a penalty of the outputs are not."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from fisher_jax._support import meshes, rejection
from fisher_jax._tracing.dense import matrices, operand_axes
from fisher_jax._tracing.program import Tap
from fisher_jax._tracing.structure import Head
from fisher_jax.batch.tokens import Tokens, log_probs
from fisher_jax.likelihoods import Likelihood

__all__ = ["of_another_loss"]

Tree = Any
_TOKENS = 4  # that are looked at, those of the largest weights
_TOLERANCE = 0.05  # of their scores, in norm: outputs in bfloat16 stay below it


def of_another_loss(
    likelihood: Likelihood, head: Head | None, params: Tree, taps: list[Tap], tokens: Tokens, scale: Any
) -> Array:
    """A reason to reject taps whose cotangents at the outputs, times ``scale``, are not those of
    ``+-sum_t w_t log p(y_t)``; nothing where the outputs come from no product that has one tap of its own."""
    own = [] if head is None else [tap for tap in taps if tap.leaf == head.leaf and tap.kind == "dense"]
    if head is None or len(own) != 1 or own[0].use.loops or not head.use.moved or head.other is not None:
        return jnp.zeros((), jnp.int32)
    (tap,), leaves = own, jax.tree.leaves(params)
    hidden, cotangents = (x[0] for x in matrices(tap.use, tap.inputs or (), jnp.asarray(tap.cotangents)))
    bias = None if head.bias is None else leaves[head.bias].reshape(-1)
    differs = functools.partial(_differs, likelihood, head)
    found = meshes.replicating(
        differs, hidden, cotangents, leaves[head.leaf], bias, tokens.targets, tokens.weights, jnp.asarray(scale)
    )
    return rejection.reason_mask(taps_of_another_loss=found)


def _differs(
    likelihood: Likelihood, head: Head, hidden: Array, cotangents: Array, leaf: Array, bias: Array | None,
    targets: Array, weights: Array, scale: Array,
) -> Bool[Array, ""]:  # fmt: skip
    lead = weights.ndim
    weights = weights.reshape(-1)
    targets = targets.reshape(-1, *targets.shape[lead:])
    _, chosen = jax.lax.top_k(weights, min(_TOKENS, weights.size))
    places = chosen if head.tokens is None else jnp.asarray(head.tokens)[chosen]
    kernel = functools.reduce(lambda x, segment: segment(x), head.use.segments, leaf)
    apart, inside, outputs = operand_axes(head.use)
    matrix = jnp.transpose(kernel, (*apart, *outputs, *inside)).reshape(cotangents.shape[1], hidden.shape[1])
    product = jnp.einsum("th,vh->tv", hidden[places], matrix, preferred_element_type=cotangents.dtype)

    def total(product):
        z = product if bias is None else product + bias[None]
        z = head.scale * z
        z = z if head.soft_cap is None else head.soft_cap * jnp.tanh(z / head.soft_cap)
        return jnp.sum(weights[chosen] * log_probs(likelihood, z, targets[chosen], weights[chosen]))

    wanted = jax.grad(total)(product).astype(weights.dtype)
    found = cotangents[places].astype(weights.dtype) * scale.astype(weights.dtype)
    off = jnp.minimum(jnp.sum((found - wanted) ** 2), jnp.sum((found + wanted) ** 2))
    return off > _TOLERANCE**2 * jnp.sum(wanted**2)

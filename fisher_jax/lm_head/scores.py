"""Squared scores of a softmax head for one piece of tokens, as sums of matrices times coefficients.

Of token ``t`` and vocabulary row ``v`` the squared score, divided by ``h_j**2``, is

- empirical: ``(p_v - [v = y])**2``
- true, labels from the model: ``p_v (1 - p_v)``
- true, labels from ``q = softmax(z / temperature)``: ``p_v**2 - 2 p_v q_v + q_v = (p_v - q_v)**2 + q_v (1 - q_v)``

each times the squared slope of the soft cap.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax.lm_head.softmax import SCALE_BITS, Head, partition

__all__ = ["VALUE_BITS", "SquaredScores", "squared_scores"]

VALUE_BITS = 2 * SCALE_BITS  # squared scores are multiplied by 2**32
_SCALE = 2.0**SCALE_BITS
_VALUE_SCALE = 2.0**VALUE_BITS


class SquaredScores(NamedTuple):
    """``f[t, v] = sum_k coefficient_k[t] matrix_k[t, v]`` plus ``value`` at the special entries ``(t, index[t])``.

    All ``f`` are multiplied by ``2**32``, their squares by ``2**64``; a special index of -1 is none.
    """

    matrices: tuple[Array, ...]  # [T, V] each
    coefficients: tuple[Array, ...]  # [T] each
    square: tuple[Array, Array]  # (matrix, coefficient) of f**2
    special_indices: tuple[Array, ...]  # [T] each, in the whole vocabulary
    special_values: tuple[Array, ...]  # [T] each


def squared_scores(
    z: Array, targets: Array, head: Head, kinds: tuple[str, ...], temperature: float
) -> tuple[dict[str, SquaredScores], Array]:
    """Squared scores of each kind, and the log-likelihood ``[T]`` of the targets (-inf where a target is -1)."""
    part, scaled = partition(z, targets, head)
    total = part.total(targets)
    log_likelihood = part.label_logit - part.top_logit - jnp.log(total)
    if temperature != 1:
        return {"true": _tempered(z, part.top_logit, total, part.top, head, temperature)}, log_likelihood
    same = part.label_is_top(targets)
    slope = head.squared_slope(z)
    label_slope, top_slope = (
        (1.0, 1.0) if head.soft_cap is None else map(head.squared_slope, (part.label_logit, part.top_logit))
    )
    label_slope = jnp.where(targets >= 0, label_slope, 0)
    label_rest, top_rest = part.complements(targets)
    label_exp = part.label_exp()
    inverse = 1 / total
    indices = (targets, jnp.where(same, -1, part.top))
    squares = scaled * scaled * slope
    found = {}
    if "empirical" in kinds:
        values = ((label_rest * inverse) ** 2 * label_slope, inverse**2 * top_slope)
        found["empirical"] = SquaredScores(
            (squares,), (inverse**2,), (squares * squares, inverse**4), indices,
            tuple(v * _VALUE_SCALE for v in values),
        )  # fmt: skip
    if "true" in kinds:
        values = (label_exp * label_rest * inverse**2 * label_slope, top_rest * inverse**2 * top_slope)
        product = scaled * (_SCALE * total[:, None] - scaled) * slope
        found["true"] = SquaredScores(
            (scaled * slope, squares), (_SCALE * inverse, -(inverse**2)), (product * product, inverse**4), indices,
            tuple(v * _VALUE_SCALE for v in values),
        )  # fmt: skip
    return found, log_likelihood


def _tempered(z, top_logit, total, top, head: Head, temperature: float) -> SquaredScores:
    shifted = z - top_logit[:, None]
    is_top = (jnp.arange(head.size) + head.offset)[None, :] == top[:, None]
    p = jnp.exp(shifted) / total[:, None]
    q = jnp.exp(shifted / temperature)
    rest = head.gather_sum(jnp.where(is_top, 0, q).sum(1))[:, None]
    q_rest = jnp.where(is_top, rest, rest + 1 - q) / (rest + 1)
    q = q / (rest + 1)
    f = ((p - q) ** 2 + q * q_rest) * head.squared_slope(z) * _VALUE_SCALE
    one, none = jnp.ones_like(total), jnp.full(top.shape, -1)
    return SquaredScores((f,), (one,), (f * f, one), (none,), (jnp.zeros_like(total),))

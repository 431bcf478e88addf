"""Softmax pieces shared by both ways through a head: logits, and probabilities that never cancel.

For a confident prediction ``1 - p`` cancels; the sum of the other probabilities does not. So the label and the most
likely token are taken out of the exponentials, and their complements are sums over the rest.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.dtypes import common_dtype

__all__ = ["SCALE_BITS", "Head", "Partition", "merge_partitions", "partition", "take", "zero_at"]

SCALE_BITS = 16  # scores are multiplied by 2**16: fourth powers of small probabilities stay above underflow
_SCALE = 2.0**SCALE_BITS


@dataclasses.dataclass(frozen=True)
class Head:
    """A softmax head, or one device's rows of it: ``z = cap(h W^T + b)``."""

    weight: Array  # [V, H]
    bias: Array | None
    soft_cap: float | None
    axis_name: str | None
    dtype: jnp.dtype

    @property
    def size(self) -> int:
        return self.weight.shape[0]

    @property
    def offset(self) -> Array | int:
        """Index of the first local row in the whole vocabulary."""
        return 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name) * self.size

    @property
    def total_size(self) -> int:
        return self.size if self.axis_name is None else self.size * jax.lax.axis_size(self.axis_name)

    def rows(self, start: Array, size: int) -> "Head":
        """``size`` rows of the head from ``start`` on."""
        weight = jax.lax.dynamic_slice_in_dim(self.weight, start, size)
        bias = None if self.bias is None else jax.lax.dynamic_slice_in_dim(self.bias, start, size)
        return dataclasses.replace(self, weight=weight, bias=bias)

    def logits(self, hidden: Array, *, vocabulary_first: bool = False) -> Array:
        """``[tokens, V]``, or ``[V, tokens]``, in full precision whatever the default is."""
        weight = self.weight
        if hidden.dtype != weight.dtype:
            common = common_dtype(hidden.dtype, weight.dtype)
            hidden, weight = hidden.astype(common), weight.astype(common)
        operands = (weight, hidden) if vocabulary_first else (hidden, weight)
        z = jax.lax.dot_general(
            *operands, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=self.dtype
        )
        if self.bias is not None:
            z = z + (self.bias[:, None] if vocabulary_first else self.bias[None, :]).astype(z.dtype)
        return z if self.soft_cap is None else self.soft_cap * jnp.tanh(z / self.soft_cap)

    def squared_slope(self, z: Array) -> Array | float:
        """``(dz / d(h W^T))**2`` at the capped logit ``z``."""
        return 1.0 if self.soft_cap is None else (1 - (z / self.soft_cap) ** 2) ** 2

    def gather_sum(self, x: Array) -> Array:
        return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)


class Partition(NamedTuple):
    """Softmax of each token, with the label and the most likely token kept apart.

    ``total = rest + exp(z_label - top_logit) + [label != top]``, in units of the largest exponential.
    """

    top_logit: Array  # the largest logit
    top: Array  # its index in the whole vocabulary
    rest: Array  # sum of exp(z - top_logit) without label and top
    label_logit: Array  # -inf where there is no label

    def label_is_top(self, targets: Array) -> Array:
        return self.top == targets

    def label_exp(self) -> Array:
        return jnp.exp(self.label_logit - self.top_logit)

    def total(self, targets: Array) -> Array:
        return self.rest + self.label_exp() + jnp.where(self.label_is_top(targets), 0, 1)

    def log_sum_exp(self, targets: Array) -> Array:
        return self.top_logit + jnp.log(self.total(targets))

    def complements(self, targets: Array) -> tuple[Array, Array]:
        """``(1 - p) * total`` of the label and of the top token, without cancellation."""
        same = self.label_is_top(targets)
        label = self.rest + jnp.where(same, 0, 1)
        top = self.rest + jnp.where(same, 0, self.label_exp())
        return label, top


def take(z: Array, index: Array, head: Head) -> Array:
    """``z[t, index[t]]`` for local indices ``[T]`` that may lie on another device; -inf if they lie nowhere."""
    here = (index >= 0) & (index < head.size)
    picked = jnp.take_along_axis(z, jnp.where(here, index, 0)[:, None], 1)[:, 0]
    picked = jnp.where(here, picked, -jnp.inf)
    return picked if head.axis_name is None else jax.lax.pmax(picked, head.axis_name)


def zero_at(z: Array, index: Array, head: Head) -> Array:
    """Set ``z[t, index[t]]`` to -inf, in place; indices outside are dropped."""
    index = jnp.where(index >= 0, index, head.size)
    return z.at[jnp.arange(z.shape[0]), index].set(-jnp.inf, mode="drop")


def partition(z: Array, targets: Array, head: Head) -> tuple[Partition, Array]:
    """The partition of logits ``[T, V]`` and their scaled exponentials, zero at label and top.

    Args:
        z: logits of the local rows.
        targets: labels in the whole vocabulary, -1 for none.

    Returns:
        The partition (the same on every device) and ``2**16 * exp(z - top_logit)`` of the local rows.
    """
    local_top = jnp.argmax(z, 1)
    top_logit = jnp.take_along_axis(z, local_top[:, None], 1)[:, 0]
    top = (local_top + head.offset).astype(jnp.int32)
    if head.axis_name is not None:
        largest = jax.lax.pmax(top_logit, head.axis_name)
        # Ties across devices: the lowest index wins, as argmax does.
        top = jax.lax.pmin(jnp.where(top_logit == largest, top, head.total_size), head.axis_name)
        top_logit = largest
    label_logit = take(z, targets - head.offset, head)
    z = zero_at(zero_at(z, targets - head.offset, head), top - head.offset, head)
    scaled = jnp.exp(z - top_logit[:, None]) * _SCALE
    rest = head.gather_sum(scaled.sum(1)) / _SCALE
    return Partition(top_logit, top, rest, label_logit), scaled


def merge_partitions(a: Partition, b: Partition, targets: Array) -> Partition:
    """The partition over two parts of the vocabulary, of which ``a`` holds the lower indices."""
    a_wins = a.top_logit >= b.top_logit
    high, low = (jax.tree.map(lambda x, y: jnp.where(a_wins, x, y), *pair) for pair in ((a, b), (b, a)))
    shrink = jnp.exp(low.top_logit - high.top_logit)
    # The loser's top token joins the rest, unless it is the label, which is kept apart.
    rest = high.rest + shrink * low.rest + jnp.where(low.top == targets, 0, shrink)
    return Partition(high.top_logit, high.top, rest, jnp.maximum(a.label_logit, b.label_logit))

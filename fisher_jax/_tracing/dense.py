"""Which axes of a use are tokens, and a dense use as a plain product: ``[tokens, in]`` and ``[tokens, out]``."""

import math

import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.jax_internals import contraction, convolution, lookup
from fisher_jax._tracing.routing import Routed
from fisher_jax._tracing.uses import Experts, Use

__all__ = ["block_axes", "by_expert", "experts_of", "matrices", "operand_axes", "ragged_matrices", "token_axes"]


def operand_axes(use: Use) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the operand of a dense or ragged use, in `matrices`' order: kept apart (batch), inputs, outputs."""
    if use.kind == "ragged":
        return (0,), (1,), (2,)
    contracted, batch = (sides[use.index] for sides in contraction(use.options))
    outputs = tuple(i for i in range(len(use.operand.shape)) if i not in (*contracted, *batch))
    return batch, contracted, outputs


def block_axes(use: Use) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The same, with experts among what is kept apart."""
    batch, contracted, outputs = operand_axes(use)
    if use.experts is None:
        return batch, contracted, outputs
    apart = (*use.experts.outputs, *use.experts.inputs)
    inside, out = (tuple(i for i in axes if i not in apart) for axes in (contracted, outputs))
    return (*batch, *apart), inside, out


def experts_of(use: Use, found: Routed, ndim: int) -> Experts:
    """Which axes of the operand of a dense use, whose output has ``ndim`` axes, are of experts."""
    batch, _, outputs = operand_axes(use)
    sides = contraction(use.options).contracted
    own = dict(zip(sides[1 - use.index], sides[use.index], strict=True))
    inputs = tuple(own[i] for i in sorted(found.inputs[1 - use.index] or ()))
    first = len(batch) if use.index == 0 else ndim - len(outputs)
    units = tuple(axis for i, axis in enumerate(outputs, first) if i in found.outputs) if found.by_output else ()
    return Experts(units, inputs, not found.by_output)


def by_expert(use: Use, a: Array, g: Array) -> tuple[Array, Array]:
    """What `matrices` gives, with experts among what is kept apart: axes in the order of `block_axes`."""
    experts = use.experts
    if experts is None or not (experts.outputs or experts.inputs):
        return a, g
    _, contracted, outputs = operand_axes(use)

    def apart(x: Array, axes: tuple[int, ...], own: tuple[int, ...]) -> Array:
        """``[batch, experts, tokens, units]``."""
        rest = [i for i in axes if i not in own]
        y = x.reshape(*x.shape[:2], *(use.operand.shape[i] for i in axes))
        y = jnp.transpose(y, (0, *(2 + axes.index(i) for i in own), 1, *(2 + axes.index(i) for i in rest)))
        return y.reshape(x.shape[0], math.prod(use.operand.shape[i] for i in own), x.shape[1], -1)

    a, g = apart(a, contracted, experts.inputs)[:, None], apart(g, outputs, experts.outputs)[:, :, None]
    shape = (g.shape[0], g.shape[1], a.shape[2], a.shape[3])
    a, g = (jnp.broadcast_to(x, (*shape, x.shape[-1])).reshape(-1, shape[3], x.shape[-1]) for x in (a, g))
    return a, g


def matrices(use: Use, inputs: tuple[Array, ...], cotangents: Array) -> tuple[Array, Array]:
    """Inputs ``a [batch, tokens, in]`` and output cotangents ``g [batch, tokens, out]`` of one dense use.

    The gradient of the operand is ``einsum("bti,bto->bio", a, g)``, its axes in the order of `operand_axes`.
    ``batch`` is 1 where the product keeps no axes apart. Axes of loops must be mapped over first.
    """
    (x,) = inputs
    other = 1 - use.index
    contracted, batch = (sides[other] for sides in contraction(use.options))
    free = [i for i in range(x.ndim) if i not in (*contracted, *batch)]
    _, _, outputs = operand_axes(use)
    a = jnp.transpose(x, (*batch, *free, *contracted))
    lead = math.prod(x.shape[i] for i in batch)
    tokens, width = (math.prod(x.shape[i] for i in axes) for axes in (free, contracted))
    first = list(range(len(batch)))
    token_axes = [len(batch) + i + (len(outputs) if use.index == 0 else 0) for i in range(len(free))]
    own_axes = [len(batch) + i + (len(free) if use.index == 1 else 0) for i in range(len(outputs))]
    g = jnp.transpose(cotangents, (*first, *token_axes, *own_axes))
    units = math.prod(use.operand.shape[i] for i in outputs)
    return a.reshape(lead, tokens, width), g.reshape(lead, tokens, units)


def ragged_matrices(use: Use, inputs: tuple[Array, ...], cotangents: Array) -> tuple[Array, Array]:
    """The same of a ragged use: of every group all rows ``[groups, T, in]``, whose gradients are zero in others."""
    x, sizes = inputs
    owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    own = (owner == jnp.arange(use.operand.shape[0])[:, None])[..., None]
    return jnp.broadcast_to(x, (len(own), *x.shape)), jnp.where(own, cotangents, jnp.zeros_like(cotangents))


def token_axes(use: Use, ndim: int) -> tuple[int, ...]:
    """Axes of the output of a product, lookup or convolution, of ``ndim`` axes, along which tokens lie, in
    `matrices`' order."""
    if use.kind == "embedding":
        offset = lookup(use.options, use.operand.shape).offset
        return tuple(i for i in range(ndim) if i not in offset)
    if use.kind == "ragged":
        return (0,)
    if use.kind == "conv":
        batch, _, *space = convolution(use.options).outputs
        return (batch, *space)
    apart, _, outputs = operand_axes(use)
    first = len(apart) + (len(outputs) if use.index == 0 else 0)
    return tuple(range(first, first + ndim - len(apart) - len(outputs)))

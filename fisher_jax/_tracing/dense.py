"""Which axes of a use are tokens, and a dense use as a plain product: ``[tokens, in]`` and ``[tokens, out]``."""

import math

import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.jax_internals import contraction, convolution, lookup
from fisher_jax._tracing.uses import Use

__all__ = ["matrices", "operand_axes", "token_axes"]


def operand_axes(use: Use) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the operand of a dense use, in `matrices`' order: kept apart (batch), inputs (contracted), outputs."""
    contracted, batch = (sides[use.index] for sides in contraction(use.options))
    outputs = tuple(i for i in range(len(use.operand.shape)) if i not in (*contracted, *batch))
    return batch, contracted, outputs


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


def token_axes(use: Use, ndim: int) -> tuple[int, ...]:
    """Axes of the output of a product, lookup or convolution, of ``ndim`` axes, along which tokens lie, in
    `matrices`' order."""
    if use.kind == "embedding":
        offset = lookup(use.options, use.operand.shape).offset
        return tuple(i for i in range(ndim) if i not in offset)
    if use.kind == "conv":
        batch, _, *space = convolution(use.options).outputs
        return (batch, *space)
    apart, _, outputs = operand_axes(use)
    first = len(apart) + (len(outputs) if use.index == 0 else 0)
    return tuple(range(first, first + ndim - len(apart) - len(outputs)))

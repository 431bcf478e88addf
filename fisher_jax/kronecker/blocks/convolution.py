"""A convolution as a product of patches with its kernel (Grosse and Martens 2016)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.jax_internals import convolution
from fisher_jax._tracing.uses import Use

__all__ = ["channel_axis", "kernel_axes", "kernel_blocks", "patches", "sizes"]


def sizes(use: Use) -> tuple[int, int, int]:
    """Groups, and of each one outputs and inputs: channels times the places of the window."""
    shape, (out, *inside) = use.operand.shape, kernel_axes(use)
    groups = convolution(use.options).groups
    return groups, shape[out] // groups, math.prod(shape[i] for i in inside)


def kernel_axes(use: Use) -> tuple[int, ...]:
    """Axes of the kernel: output channels, input channels of a group, window."""
    return convolution(use.options).kernel


def channel_axis(use: Use) -> int:
    """Of the output."""
    return convolution(use.options).outputs[1]


def kernel_blocks(use: Use, kernel: Array) -> Array:
    """``[..., groups, out, in]`` of kernels with any leading axes."""
    lead = kernel.ndim - len(use.operand.shape)
    moved = jnp.transpose(kernel, [*range(lead), *(lead + i for i in kernel_axes(use))])
    return moved.reshape(*moved.shape[:lead], *sizes(use))


def patches(use: Use, inputs: tuple[Array, ...], cotangents: Array) -> tuple[Array, Array]:
    """Inputs ``[groups, positions, in]`` and output gradients ``[groups, positions, out]``.

    What a position of the output sees of the input, zeros in the padding among it; the gradient of `kernel_blocks`
    is ``einsum("gti,gto->goi", ...)``. Positions are ordered by example first.
    """
    (x,) = inputs
    conv = convolution(use.options)
    seen = jax.lax.conv_general_dilated_patches(
        x,
        [use.operand.shape[i] for i in conv.kernel[2:]],
        conv.strides,
        conv.padding,
        conv.input_dilation,
        conv.kernel_dilation,
        conv.numbers,
        jax.lax.Precision.HIGHEST,
    )
    batch, channel, *space = conv.outputs
    groups, out, width = sizes(use)

    def by_group(y, size):
        rows = jnp.transpose(y, (batch, *space, channel)).reshape(-1, groups, size)
        return jnp.swapaxes(rows, 0, 1)

    return by_group(seen, width), by_group(cotangents, out)

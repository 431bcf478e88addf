"""Products with kernels, whose results and sums are at least float32 whatever the weights are stored in."""

import jax
import jax.numpy as jnp
from flax import nnx

from fisher_jax._support.dtypes import wide_dtype

__all__ = ["Dense", "normal", "product"]

normal = nnx.initializers.normal(0.02)


class Dense(nnx.Module):
    """``x kernel + bias``."""

    def __init__(self, size_in: int, size_out: int, bias: bool, dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(rngs.params(), (size_in, size_out), dtype))
        self.bias = nnx.Param(jnp.zeros((size_out,), dtype)) if bias else None

    def __call__(self, x):
        y = product(x, self.kernel[...])
        return y if self.bias is None else y + along_last(self.bias[...].astype(y.dtype), y)


def product(x, kernel):
    """``x kernel`` over the last axis of ``x``."""
    dtype = wide_dtype(x.dtype, kernel.dtype)
    return jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), (((x.ndim - 1,), (0,)), ((), ())))


def along_last(vector, like):
    """An array with leading axes of size one, so that it works under ``jax_numpy_rank_promotion="raise"``."""
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)

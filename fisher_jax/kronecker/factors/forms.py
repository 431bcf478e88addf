"""Factors of a Kronecker block, each in a form whose damped inverse is cheap.

A block is a matrix ``M [out, in]``; its curvature is ``M -> G M A`` with ``G [out, out]`` (second moment of output
gradients) and ``A [in, in]`` (second moment of inputs). Each of the two is one of the forms below.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fisher_jax._support.dtypes import wide

__all__ = [
    "Diagonal",
    "Eigen",
    "Factor",
    "LowRank",
    "chosen",
    "diagonal",
    "eigen",
    "gram",
    "low_rank",
    "product",
    "stored",
    "subsample",
    "trace",
    "wide",
]


class Eigen(NamedTuple):
    """``vectors diag(values) vectors^T``.

    Attributes:
        values: ``[n]``, not negative, ascending.
        vectors: ``[n, n]``, orthonormal columns.
    """

    values: Array
    vectors: Array


class Diagonal(NamedTuple):
    """``diag(values)``: the input factor of an embedding, whose inputs are one-hot.

    Attributes:
        values: ``[n]``, not negative; frequencies of the tokens.
    """

    values: Array


class LowRank(NamedTuple):
    """``columns columns^T``, never formed; ``columns^T columns = vectors diag(values) vectors^T``.

    Attributes:
        columns: ``U [n, T]``, float32 or bfloat16.
        values: ``s [T]``, not negative, ascending.
        vectors: ``Q [T, T]``, orthonormal columns.
    """

    columns: Array
    values: Array
    vectors: Array


Factor = Eigen | Diagonal | LowRank


def product(a: Array, b: Array) -> Array:
    """``a @ b`` in full precision, at least float32."""
    return jnp.matmul(wide(a), wide(b), precision=jax.lax.Precision.HIGHEST)


def eigen(matrix: Float[Array, "*N n n"]) -> Eigen:
    """Eigendecomposition of a positive semi-definite matrix; eigenvalues below zero are rounding, and zero.

    Stacks are decomposed one matrix after the other, under ``jax.vmap`` too.
    """
    one = _eigen
    for _ in range(matrix.ndim - 2):
        one = jax.vmap(one)
    return Eigen(*one(wide(matrix)))


# LAPACK's batches hand their parts to the threads that run the program: where two batches run at once and there are
# no more threads than batches, each waits for parts that only the other's thread could do, for ever.
@jax.custom_batching.sequential_vmap
def _eigen(matrix: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    return jnp.maximum(values, 0), vectors


def diagonal(values: Float[Array, " n"]) -> Diagonal:
    """A diagonal factor."""
    return Diagonal(wide(values))


def low_rank(columns: Float[Array, "n T"], dtype: Any = None) -> LowRank:
    """``U U^T`` from ``U``, with the eigendecomposition of the Gram matrix ``U^T U``.

    ``dtype=jnp.bfloat16`` halves the memory: each entry of ``U`` then has a relative error of up to ``2**-8``, and
    ``U U^T`` of the rounded ``U`` is what is inverted, exactly.
    """
    columns = stored(columns, dtype)
    return LowRank(columns, *eigen(gram(columns)))


def stored(columns: Array, dtype: Any = None) -> Array:
    """``U`` in the dtype that it is kept in."""
    return wide(columns) if dtype is None else jnp.asarray(columns).astype(dtype)


def gram(columns: Float[Array, "*N n T"]) -> Float[Array, "*N T T"]:
    """``U^T U``."""
    return product(jnp.swapaxes(columns, -1, -2), columns)


def subsample(
    columns: Float[Array, "n T"], cap: int, offsets: Float[Array, " cap"], *beside: Array
) -> tuple[Array, ...]:
    """At most ``cap`` columns ``V`` with ``E[V V^T] = U U^T``, and the same columns of ``beside``, not scaled.

    The ``N`` columns that are not zero, in order, are cut into ``cap`` strata of length ``N / cap``; from each one
    column is taken, at the place ``offsets`` (uniform in [0, 1)) says, and scaled by ``sqrt(N / cap)``. With
    ``N <= cap`` all are kept as they are.
    """
    if columns.shape[1] <= cap:
        return columns, *beside
    index, scale = chosen(jnp.any(columns != 0, axis=0), cap, offsets)
    return columns[:, index] * scale.astype(columns.dtype), *(x[:, index] for x in beside)


def chosen(alive: Bool[Array, " T"], cap: int, offsets: Float[Array, " cap"]) -> tuple[Array, Array]:
    """Indices that `subsample` takes among those ``alive``, and its scale."""
    order, number = jnp.argsort(~alive, stable=True), jnp.sum(alive)
    place = (jnp.arange(cap) + offsets) * (number / cap)
    index = jnp.where(number <= cap, jnp.arange(cap), jnp.minimum(place.astype(jnp.int32), number - 1))
    return order[index], jnp.where(number <= cap, 1, jnp.sqrt(number / cap))


def trace(factor: Factor) -> Array:
    """Sum of the eigenvalues."""
    return jnp.sum(factor.values)


def size(factor: Factor) -> int:
    """``n`` of the ``[n, n]`` matrix."""
    return factor.columns.shape[0] if isinstance(factor, LowRank) else factor.values.shape[0]


def is_complete(factor: Factor) -> bool:
    """Whether the basis of the factor spans the whole space."""
    return not isinstance(factor, LowRank)


def to_basis(factor: Factor, M: Float[Array, "n k"]) -> Array:
    """``B^T M`` with ``B`` the eigenvectors, not normalised (``U Q``) for a low-rank factor."""
    if isinstance(factor, Diagonal):
        return wide(M)
    if isinstance(factor, Eigen):
        return product(factor.vectors.T, M)
    return product(factor.vectors.T, product(factor.columns.T, M))


def from_basis(factor: Factor, C: Float[Array, "r k"]) -> Array:
    """``B C``."""
    if isinstance(factor, Diagonal):
        return C
    if isinstance(factor, Eigen):
        return product(factor.vectors, C)
    return product(factor.columns, product(factor.vectors, C))

"""Damped powers of one Kronecker block, applied to a matrix.

With ``G = V diag(g) V^T``, ``A = P diag(a) P^T`` the block is ``A (x) G + damping I`` on matrices ``M [out, in]``:
``M -> G M A + damping M``. Nothing is clipped and nothing depends on the number of tokens.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from fisher_jax._support.dtypes import wide
from fisher_jax.kronecker.factors.forms import (
    Diagonal,
    Eigen,
    Factor,
    LowRank,
    from_basis,
    is_complete,
    product,
    size,
    to_basis,
    trace,
)

__all__ = ["corrected", "diagonal_power", "exact", "factored", "push_through", "split_damping"]


def exact(A: Factor, G: Factor, M: Float[Array, "out in"], damping: Any, power: float = -1.0) -> Array:
    """``(A (x) G + damping I)**power M``, exactly, for any pair of forms.

    With both bases complete ``V [(V^T M P)_ij (g_i a_j + damping)**power] P^T``. With a low-rank ``G = U U^T``,
    ``U^T U = Q diag(s) Q^T``,

        ``damping**power M + U Q [((s_i a_j + damping)**power - damping**power) / s_i (Q^T U^T M P)_ij] P^T``

    which for the inverse is ``M / damping - U Q [a_j / (damping (s_i a_j + damping)) ...] P^T``; the same with the
    sides exchanged, and with both sides low rank.

    In float32 the part of the result along ``U`` is a difference of numbers of size ``|M| / damping``: its relative
    error is about ``6e-8 max(s a) / damping`` (`push_through` avoids this). Where only eigendecompositions meet it
    is the usual one of a symmetric solve, ``6e-8 max(g a) / damping`` at worst.
    """
    M, damping = wide(M), jnp.asarray(damping, wide(M).dtype)
    inside = _two_sided(to_basis, A, G, M)
    g, a = G.values[:, None], A.values[None, :]
    if is_complete(G) and is_complete(A):
        return _two_sided(from_basis, A, G, inside * (g * a + damping) ** power)
    # ((x + 1)**power - 1) / x, times the eigenvalues whose eigenvectors are already normalised.
    change = _relative_change(g * a / damping, power) * damping ** (power - 1)
    change = change * (g if is_complete(G) else 1) * (a if is_complete(A) else 1)
    return damping**power * M + _two_sided(from_basis, A, G, inside * change)


def corrected(
    A: Factor, G: Factor, eigenvalues: Float[Array, "rank in"], M: Float[Array, "out in"], damping: Any, power: float
) -> Array:
    """`exact` with other eigenvalues on the same eigenvectors (EK-FAC); ``A`` has all of its own.

    For a low-rank ``G`` they are divided by those of ``G``: ``a_j`` in `exact` becomes ``eigenvalues_ij``.
    """
    M, damping = wide(M), jnp.asarray(damping, wide(M).dtype)
    inside = _two_sided(to_basis, A, G, M)
    if is_complete(G):
        return _two_sided(from_basis, A, G, inside * (eigenvalues + damping) ** power)
    change = _relative_change(G.values[:, None] * eigenvalues / damping, power) * damping ** (power - 1) * eigenvalues
    return damping**power * M + _two_sided(from_basis, A, G, inside * change)


def push_through(A: Factor, G: LowRank, B: Float[Array, "T in"], damping: Any, power: float = -1.0) -> Array:
    """``(A (x) U U^T + damping I)**power (U B) = U ((A (x) U^T U + damping I)**power B)``.

    For a gradient that is made of the very tokens of the factor: cheaper, and far more accurate in float32 at small
    damping, since nothing of size ``1 / damping`` is subtracted. The transformation does not use it: a gradient may
    have been clipped, decayed or summed over micro-batches on its way there, and at ``period=10`` the one
    product saved at a refresh is a twentieth of what ten updates of a head cost (``experiments/bench_kfac.py``).
    """
    return product(G.columns, exact(A, Eigen(G.values, G.vectors), B, damping, power))


def split_damping(A: Factor, G: Factor, damping: Any) -> tuple[Array, Array]:
    """What factored damping adds to ``A`` and to ``G``: ``pi sqrt(damping)`` and ``sqrt(damping) / pi``.

    ``pi**2 = (trace(A) / in) / (trace(G) / out)`` (Martens and Grosse 2015, section 6.3); 1 where a trace is zero.
    """
    return split(trace(A) / size(A), trace(G) / size(G), damping)


def split(mean_a: Array, mean_g: Array, damping: Any) -> tuple[Array, Array]:
    """`split_damping` from the mean eigenvalues."""
    usable = (mean_a > 0) & (mean_g > 0)
    ratio = jnp.where(usable, mean_a, 1) / jnp.where(usable, mean_g, 1)
    root = jnp.sqrt(jnp.asarray(damping, ratio.dtype))
    return root * jnp.sqrt(ratio), root / jnp.sqrt(ratio)


def factored(A: Factor, G: Factor, M: Float[Array, "out in"], damping: Any, power: float = -1.0) -> Array:
    """``((A + pi sqrt(damping) I) (x) (G + sqrt(damping) / pi I))**power M``, see `split_damping`."""
    on_a, on_g = split_damping(A, G, damping)
    return one_sided(A, one_sided(G, M, on_g, power).T, on_a, power).T


def one_sided(F: Factor, M: Float[Array, "n k"], shift: Array, power: float = -1.0) -> Array:
    """``(F + shift I)**power M``."""
    M = wide(M)
    unit = Diagonal(jnp.ones(M.shape[1], M.dtype))
    return exact(unit, F, M, shift, power)


def diagonal_power(values: Array, M: Array, damping: Any, power: float = -1.0) -> Array:
    """``(values + damping)**power M``, entry by entry: scales and lone biases."""
    return (wide(values) + jnp.asarray(damping, wide(values).dtype)) ** power * wide(M)


def _two_sided(change, A: Factor, G: Factor, M: Array) -> Array:
    """Change of basis on both sides, in the cheaper order: low rank first going in, last coming out."""
    g_first = is_complete(A) or not is_complete(G)
    if change is from_basis:
        g_first = is_complete(G)
    if g_first:
        return change(A, change(G, M).T).T
    return change(G, change(A, M.T).T)


def _relative_change(x: Array, power: float) -> Array:
    """``((1 + x)**power - 1) / x`` for ``x >= 0``, ``power`` at 0."""
    if power == -1:
        return -1 / (1 + x)
    safe = jnp.where(x > 0, x, 1)
    return jnp.where(x > 0, jnp.expm1(power * jnp.log1p(safe)) / safe, power)

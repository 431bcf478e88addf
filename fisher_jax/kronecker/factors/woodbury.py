"""Diagonal plus or minus low rank: the true Fisher of a softmax head, and an embedding tied to its head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fisher_jax._support.dtypes import wide
from fisher_jax.kronecker.factors.forms import Eigen, Factor, LowRank, eigen, low_rank, product
from fisher_jax.kronecker.factors.tikhonov import exact, one_sided, split

__all__ = ["SoftmaxHead", "head_exact", "head_factored", "head_matrix", "softmax_head", "tied", "tied_head"]


class SoftmaxHead(NamedTuple):
    """Mean over tokens of ``diag(p_t) - p_t p_t^T``, as ``diag(mean) - mean mean^T - columns columns^T``.

    Attributes:
        mean: ``[V]``, ``sum_t w_t p_t / W``.
        columns: ``[V, T]``, ``sqrt(w_t / W) (p_t - mean)``, float32: the difference with ``mean`` cancels, and half
            precision could make it indefinite.
    """

    mean: Array
    columns: Array


def softmax_head(probabilities: Float[Array, "V T"], weights: Float[Array, " T"] | None = None) -> SoftmaxHead:
    """From probabilities (columns sum to 1) and weights of the tokens; zero weights everywhere give a zero factor."""
    p = wide(probabilities)
    weights = jnp.ones(p.shape[1], p.dtype) if weights is None else wide(weights).astype(p.dtype)
    total = weights.sum()
    share = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
    mean = product(p, share[:, None])[:, 0]
    return SoftmaxHead(mean, (p - mean[:, None]) * jnp.sqrt(share)[None, :])


def head_matrix(head: SoftmaxHead) -> Float[Array, "V V"]:
    """The matrix itself, for outputs so few that its eigendecomposition is cheaper."""
    outer = head.mean[:, None] * head.mean[None, :]
    return jnp.diag(head.mean) - outer - product(head.columns, head.columns.T)


def head_factored(A: Factor, head: SoftmaxHead, M: Float[Array, "V in"], damping: Any) -> Array:
    """Factored damping, see `tikhonov.factored`; the inverse only."""
    mean_g = (jnp.sum(head.mean * (1 - head.mean)) - jnp.sum(head.columns**2)) / head.mean.shape[0]
    mean_a = A.values.sum() / (A.columns.shape[0] if isinstance(A, LowRank) else A.values.shape[0])
    on_a, on_g = split(mean_a, mean_g, damping)
    return one_sided(A, _solve(head, wide(M), jnp.ones_like(on_g), on_g).T, on_a).T


def head_exact(A: Factor, head: SoftmaxHead, M: Float[Array, "V in"], damping: Any) -> Array:
    """``(A (x) G + damping I)^-1 M``: one ``T x T`` system for each eigenvalue of ``A``.

    Costs ``in V T**2`` operations: an option for small sizes. ``A`` is an eigendecomposition or a diagonal.
    """
    M = wide(M)
    if isinstance(A, LowRank):
        raise ValueError("exact damping of a softmax head needs all eigenvectors of its input factor")
    rotated = product(M, A.vectors) if isinstance(A, Eigen) else M
    shift = jnp.asarray(damping, M.dtype)
    solved = jax.lax.map(lambda x: _solve(head, x[1][:, None], x[0], shift)[:, 0], (A.values, rotated.T)).T
    return product(solved, A.vectors.T) if isinstance(A, Eigen) else solved


def _solve(head: SoftmaxHead, M: Float[Array, "V k"], scale: Array, shift: Array) -> Array:
    """``(scale G + shift I)^-1 M``.

    Ones are an eigenvector (eigenvalue ``shift``) and are split off; on what is left no step cancels:
    ``E = D - scale mean mean^T`` has ``E^-1 M = D^-1 M - D^-1 mean (1^T D^-1 M) / sum(mean / D)`` for centred ``M``,
    and ``S = I - scale U^T E^-1 U`` has no eigenvalue that vanishes with ``shift`` alone.
    """
    D = (scale * head.mean + shift)[:, None]
    ratio = head.mean[:, None] / D
    average = M.mean(0, keepdims=True)

    def inner(X):
        scaled = X / D
        return scaled - ratio * (scaled.sum(0, keepdims=True) / ratio.sum())

    centred = inner(M - average)
    U = head.columns
    spread = inner(U)
    S = jnp.eye(U.shape[1], dtype=U.dtype) - scale * product(U.T, spread)
    found = centred + scale * product(spread, jnp.linalg.solve((S + S.T) / 2, product(U.T, centred)))
    return found - found.mean(0, keepdims=True) + average / shift


def tied(
    A: Factor, G: Factor, rows: Float[Array, " V"], M: Float[Array, "V in"], damping: Any, power: float = -1.0
) -> Array:
    """``(A (x) G + diag(rows) (x) I + damping I)^-1 M``: an embedding tied to its head.

    ``rows_v = f_v trace(G_emb) / width`` is the embedding's own part, ``f`` the frequencies of the tokens. With
    ``D = damping + rows``, ``G = U U^T`` this is ``D^-1/2 (A (x) D^-1/2 U U^T D^-1/2 + I)^-1 D^-1/2 M``.
    """
    if power != -1:
        raise ValueError(f"an embedding tied to its head has a closed form for the inverse only, found power={power}")
    root = jnp.sqrt(wide(rows) + damping)[:, None]
    U = G.columns if isinstance(G, LowRank) else _square_root(G)
    return exact(A, low_rank(wide(U) / root), wide(M) / root, 1.0) / root


def _square_root(G: Factor) -> Array:
    return G.vectors * jnp.sqrt(G.values) if isinstance(G, Eigen) else jnp.diag(jnp.sqrt(G.values))


def tied_head(A: Factor, head: SoftmaxHead, rows: Float[Array, " V"], M: Float[Array, "V in"], damping: Any) -> Array:
    """As `tied` with the true Fisher of the head: one ``T x T`` system for each eigenvalue of ``A``."""
    if isinstance(A, LowRank):
        A = eigen(product(A.columns, A.columns.T))
    M = wide(M)
    rotated = product(M, A.vectors) if isinstance(A, Eigen) else M
    U = jnp.concatenate([head.columns, head.mean[:, None]], 1)

    def solve(x):
        a, m = x
        D = (wide(rows) + damping + a * head.mean)[:, None]
        S = jnp.eye(U.shape[1], dtype=U.dtype) - a * product(U.T, U / D)
        scaled = m[:, None] / D
        return (scaled + a * product(U / D, jnp.linalg.solve(S, product(U.T, scaled))))[:, 0]

    solved = jax.lax.map(solve, (A.values, rotated.T)).T
    return product(solved, A.vectors.T) if isinstance(A, Eigen) else solved

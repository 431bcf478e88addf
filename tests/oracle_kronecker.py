"""Slow references for K-FAC: dense matrices of whole blocks, in extended precision. No code of the library.

At a damping of 1e-8 a rounding of the dense matrix in float64 already moves its inverse by 1e-8.
"""

import numpy as np


def block(A, G):
    """The matrix of ``M -> G M A`` on row-major ``vec(M)``, ``M [out, in]``, entry by entry."""
    A, G = np.asarray(A, np.longdouble), np.asarray(G, np.longdouble)
    out, n = G.shape[0], A.shape[0]
    F = np.zeros((out * n, out * n), np.longdouble)
    for i in range(out):
        for k in range(out):
            F[i * n : (i + 1) * n, k * n : (k + 1) * n] = G[i, k] * A.T
    return F


def inverse_root(X):
    """``X**(-1/2)`` by the coupled Newton-Schulz iteration in extended precision: no eigendecomposition at all."""
    X = np.asarray(X, np.longdouble)
    scale = np.abs(X).sum(1).max()
    identity = np.eye(len(X), dtype=np.longdouble)
    Y, Z = X / scale, identity
    for _ in range(100):
        step = (3 * identity - Z @ Y) / 2
        Y, Z = Y @ step, step @ Z
        if np.abs(step - identity).max() < 1e-17:
            break
    return Z / np.sqrt(scale)


def to_power(X, power):
    root = inverse_root(X)
    return {-0.5: root, -1.0: root @ root}[power]


def damped_power(F, M, damping, power=-1.0):
    """``(F + damping I)**power vec(M)``, back in the shape of ``M``."""
    M = np.asarray(M)
    found = to_power(F + np.longdouble(damping) * np.eye(len(F)), power) @ M.ravel()
    return found.reshape(M.shape).astype(np.float64)


def factored_power(A, G, M, damping, power=-1.0):
    """Factored damping with the pi correction of Martens and Grosse (2015), section 6.3."""
    A, G, damping = np.asarray(A, np.longdouble), np.asarray(G, np.longdouble), np.longdouble(damping)
    pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
    left, right = G + np.sqrt(damping) / pi * np.eye(len(G)), A + np.sqrt(damping) * pi * np.eye(len(A))
    return (to_power(left, power) @ np.asarray(M, np.float64) @ to_power(right, power)).astype(np.float64)


def second_moment(rows, weights, total):
    """``sum_t w_t r_t r_t^T / total`` by a loop."""
    rows = np.asarray(rows, np.longdouble)
    return sum(w * np.outer(r, r) for r, w in zip(rows, np.asarray(weights, np.float64), strict=True)) / total


def softmax_fisher(probabilities, weights):
    """Mean over tokens of ``diag(p) - p p^T``; ``probabilities [T, V]``."""
    p, w = np.asarray(probabilities, np.longdouble), np.asarray(weights, np.longdouble)
    return sum(wt * (np.diag(pt) - np.outer(pt, pt)) for pt, wt in zip(p, w, strict=True)) / w.sum()

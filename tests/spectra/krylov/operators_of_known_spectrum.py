"""Dense symmetric operators with prescribed eigenvalues, on a tree, and their eigenvalues in float64 by LAPACK."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SPLIT = 12


def dense(eigenvalues, seed=0):
    """A float32 matrix that is exactly symmetric; rounding to float32 moves its eigenvalues a little."""
    eigenvalues = np.asarray(eigenvalues, np.float64)
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    matrix = ((q * eigenvalues) @ q.T).astype(np.float32)
    return np.tril(matrix) + np.tril(matrix, -1).T


def tree(x):
    """A vector as parameters: two leaves, one of them a matrix, and something that stands still."""
    return {"kernel": x[:SPLIT].reshape(3, 4), "rest": [None, x[SPLIT:]]}


def flat(v):
    return jnp.concatenate([v["kernel"].reshape(-1), v["rest"][1]])


def product(matrix, v):
    return tree(jnp.matmul(matrix, flat(v), precision="highest"))


def bf16_product(matrix, v):
    """Rounded on the way in and on the way out."""
    out = jnp.matmul(matrix.astype(jnp.bfloat16), flat(v).astype(jnp.bfloat16))
    return tree(out.astype(jnp.float32))


def matvec(matrix, function=product):
    return jax.tree_util.Partial(function, jnp.asarray(matrix))


def like(n):
    return jax.eval_shape(tree, jax.ShapeDtypeStruct((n,), jnp.float32))


@functools.cache
def truth_of(data, n):
    return np.linalg.eigvalsh(np.frombuffer(data, np.float32).reshape(n, n).astype(np.float64))


def truth(matrix):
    return truth_of(np.ascontiguousarray(matrix, np.float32).tobytes(), len(matrix))


def distances(found, matrix):
    """From every eigenvalue that is not missing to the nearest true one."""
    values = found.eigenvalues[~np.isnan(found.eigenvalues)]
    return np.abs(values[:, None] - truth(matrix)).min(axis=1)


SPECTRA = {
    "clustered": np.r_[3 + 1e-4 * np.arange(5), 1 + 1e-3 * np.arange(40), np.full(55, 0.1)],
    "repeated": np.r_[np.full(4, 3.0), np.full(3, 2.0), np.linspace(0, 1, 93)],
    "rank 3": np.r_[3.0, 2.0, 1.0, np.zeros(97)],
    "rank 1": np.r_[3.0, np.zeros(99)],
    "zero": np.zeros(100),
    "indefinite": np.r_[-5.0, 4.0, 3.0, np.linspace(-1, 1, 97)],
    "condition 1e12": np.logspace(0, -12, 100),
    "identity": np.ones(100),
    "bulk": np.random.default_rng(0).standard_normal(100) ** 2,
}

"""Dense curvature matrices in float64, from per-token Jacobians written out: they share no code with the library."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def log_prob(name, z, y):
    if name == "categorical":
        return jax.nn.log_softmax(z)[y]
    if name == "bernoulli":
        return jnp.sum(y * jnp.log(jax.nn.sigmoid(z)) + (1 - y) * jnp.log(1 - jax.nn.sigmoid(z)))
    return -0.5 * jnp.sum((y - z) ** 2) - 0.5 * z.size * jnp.log(2 * jnp.pi)


def output_fisher(name, z):
    """The Fisher matrix of one token's outputs, by its definition for each family."""
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum() if name == "categorical" else 1 / (1 + np.exp(-z))
    if name == "categorical":
        return np.diag(p) - np.outer(p, p)
    return np.diag(p * (1 - p)) if name == "bernoulli" else np.eye(z.size)


def scores(apply_fn, name, params, inputs, targets):
    """Per-token scores ``[T, P]``, in the order of ``ravel_pytree``."""
    flat, unravel = ravel_pytree(params)

    def log_probs(flat):
        z = apply_fn(unravel(flat), inputs)
        each = jax.vmap(lambda z, y: log_prob(name, z, y))
        return each(z.reshape(-1, z.shape[-1]), targets.reshape(-1, *targets.shape[z.ndim - 1 :]))

    return np.asarray(jax.jit(jax.jacrev(log_probs))(flat))


def dense(kind, apply_fn, name, params, inputs, targets, weights):
    """The matrix ``[P, P]`` of one operator."""
    flat, unravel = ravel_pytree(params)
    w = np.asarray(weights, np.float64).ravel()

    def outputs(flat):
        z = apply_fn(unravel(flat), inputs)
        return z.reshape(-1, z.shape[-1])

    if kind in ("ggn", "fisher"):
        jacobian, z = np.asarray(jax.jit(jax.jacrev(outputs))(flat)), np.asarray(outputs(flat))
        each = [j.T @ output_fisher(name, zt) @ j for j, zt in zip(jacobian, z, strict=True)]
        return np.tensordot(w, each, 1) / w.sum()
    if kind == "empirical_fisher":
        s = scores(apply_fn, name, params, inputs, targets)
        return np.einsum("t,tp,tq->pq", w, s, s) / w.sum()

    def loss(flat):
        z = outputs(flat)
        y = targets.reshape(-1, *targets.shape[apply_fn(params, inputs).ndim - 1 :])
        return -jnp.sum(w * jax.vmap(lambda z, y: log_prob(name, z, y))(z, y)) / w.sum()

    return np.asarray(jax.jit(jax.jacrev(jax.jacrev(loss)))(flat))

"""Slow, obvious float64 references. They share no code with the library."""

import jax
import jax.numpy as jnp
import numpy as np


def head_logits(head, hidden, bias=None, soft_cap=None):
    z = head @ hidden + (0 if bias is None else bias)
    return z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)


def head_squared_scores(hidden, head, targets, kind, bias=None, soft_cap=None, temperature=1.0):
    """Per-token squared scores ``[T, V, H]``: ``vmap(grad)``; for the true Fisher by enumerating every label."""
    with jax.enable_x64(True):
        head = jnp.asarray(head, jnp.float64)
        bias = None if bias is None else jnp.asarray(bias, jnp.float64)

        def log_prob(head, h, y):
            return jax.nn.log_softmax(head_logits(head, h, bias, soft_cap))[y]

        def squared(h, y):
            return jax.grad(log_prob)(head, h, y) ** 2

        def expected(h, _):
            q = jax.nn.softmax(head_logits(head, h, bias, soft_cap) / temperature)
            labels = jnp.arange(head.shape[0])
            return jnp.einsum("y,yvh->vh", q, jax.vmap(squared, (None, 0))(h, labels))

        one = squared if kind == "empirical" else expected
        return np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(hidden, jnp.float64), jnp.asarray(targets)))


def over_group(scores, group):
    """Sum squared scores ``[T, V, H]`` within groups."""
    return scores.sum({"param": (), "row": 2, "column": 1, "tensor": (1, 2)}[group])


def moments(values, weights, ids):
    """``(mean, standard error, n, W)`` of observations formed by tokens with equal ids: loops and definitions."""
    values, weights, ids = np.asarray(values, np.float64), np.asarray(weights, np.float64), np.asarray(ids)
    f, w = [], []
    for unit in dict.fromkeys(ids.tolist()):
        inside = (ids == unit) & (weights > 0)
        if inside.any():
            w.append(weights[inside].sum())
            f.append(np.tensordot(weights[inside], values[inside], 1) / w[-1])
    f, w, n = np.array(f), np.array(w), len(w)
    total = w.sum()
    mean = np.tensordot(w, f, 1) / total
    error = np.sqrt(n / (n - 1) * np.tensordot(w**2, (f - mean) ** 2, 1)) / total if n > 1 else np.nan
    return mean, error, n, total


def variance(values, weights, kind):
    """Weighted variance by its definition."""
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    total = weights.sum()
    mean = np.tensordot(weights, values, 1) / total
    m2 = np.tensordot(weights, (values - mean) ** 2, 1)
    return m2 / (total - 1 if kind == "frequency" else total - (weights**2).sum() / total)


def observations(values, weights, ids):
    """Values and weights of the observations formed by *consecutive* rows of one id; rows without weight are void."""
    f, w, current = [], [], None
    for value, weight, unit in zip(np.asarray(values, np.float64), np.asarray(weights, np.float64), ids, strict=True):
        if weight == 0:
            continue
        if unit != current:
            f, w, current = [*f, 0.0], [*w, 0.0], unit
        f[-1], w[-1] = f[-1] + weight * value, w[-1] + weight
    return np.array([total / weight for total, weight in zip(f, w, strict=True)]), np.array(w)

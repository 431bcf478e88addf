"""The random signs and labels that an estimator draws from a key, found through its public function.

The same estimator with the same key and shapes of tokens draws the same numbers for every model. On these models its
result shows them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj

# Logits of float16 and bfloat16 models are off by less than this share of `1 + max |logit|`.
_MARGIN = 2.0**-5


def signs(key: jax.Array, rows: int, positions: int, unit: str) -> np.ndarray:
    """Signs of ``signs``, ``[rows, positions]``, up to one common sign of each observation.

    Parameter ``j`` has a score of 1 at token ``j`` and at the first token of its observation: the squared sum is 4 or
    0, as the two signs agree or not.
    """
    number = rows * positions
    token = np.arange(number)
    first = np.zeros(number, int) if unit == "batch" else token // positions * positions
    scores = np.eye(number, dtype=np.float32)
    scores[first, token] = 1
    scores[first, first] = 2

    def apply_fn(params, inputs):
        return jnp.sum(inputs * params.reshape((1,) * (inputs.ndim - 1) + params.shape), -1, keepdims=True)

    batch = fj.Batch(jnp.asarray(scores.reshape(rows, positions, number)), jnp.ones((rows, positions, 1)))
    found = _squares("signs", fj.gaussian, unit, apply_fn)(jnp.zeros(number, jnp.float32), batch, key)
    return np.where(np.asarray(found) * number > 1, 1.0, -1.0).reshape(rows, positions)


def labels(key: jax.Array, logits: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels of ``sampled`` for these logits, and which of them logits that are a little off would draw as well.

    With a parameter for every logit the squared score is ``(1 - p)**2`` at the label, more than ``p**2`` elsewhere.
    """
    rows, params = jnp.arange(logits.shape[0], dtype=jnp.int32), jnp.zeros(logits.shape, jnp.float32)
    squares = _squares("sampled", fj.categorical, unit, lambda p, x: x[0] + p[x[1]])

    def draw(logits):
        found = squares(params, fj.Batch((jnp.asarray(logits, jnp.float32), rows), None), key)
        return np.asarray(found).argmax(-1)

    drawn = draw(logits)
    chosen = np.arange(logits.shape[-1]) == drawn[..., None]
    margin = _MARGIN * (1 + np.abs(logits).max())
    return drawn, draw(logits - margin * chosen) == drawn


def _squares(estimator: str, likelihood: Any, unit: str, apply_fn: Callable) -> Callable:
    """``(params, batch, key) -> squares``, compiled."""
    fisher = fj.group_fisher(apply_fn, likelihood, estimator=estimator, unit=unit)
    return jax.jit(lambda *given: fj.welford.mean(fisher.observe(*given)))

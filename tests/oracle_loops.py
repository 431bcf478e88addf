"""Per-token scores of a small decoder from a loop of ``jax.grad``, one token a call, compiled apart.

A program that treats many tokens at once can be compiled wrongly where one that treats a single token is not,
from some size on. What is tested against these scores has as many tokens as real batches have; a few of them,
drawn at random, have a weight, so that the loop is short.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax import models
from fisher_jax.models.config import DecoderConfig

__all__ = ["Case", "case", "close", "label_scores", "only", "scores"]

COUNTED = 24


class Case(NamedTuple):
    """A decoder, its parameters, a batch, and the flat positions of the tokens that have a weight."""

    apply: Callable
    params: dict
    batch: fj.Batch
    counted: np.ndarray

    @property
    def weights(self):
        """Of the counted tokens, float64."""
        return np.asarray(self.batch.weights, np.float64).reshape(-1)[self.counted]


@functools.cache
def case(rows=32, length=32, vocabulary=64, layers=1):
    config = DecoderConfig(
        vocab_size=vocabulary, width=16, num_layers=layers, num_heads=2, num_kv_heads=1, head_size=8, mlp_size=32,
        max_positions=length, tied=False,
    )  # fmt: skip
    params = jax.tree.map(lambda x: 3 * x, models.init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, vocabulary, (2, rows, length), dtype=np.int32)
    counted = np.sort(rng.choice(rows * length, COUNTED, replace=False))
    weights = np.zeros(rows * length, np.float32)
    weights[counted] = rng.integers(1, 4, COUNTED) / 2
    batch = fj.Batch(jnp.asarray(tokens), jnp.asarray(targets), jnp.asarray(weights.reshape(rows, length)))
    return Case(models.from_config(config).apply, params, batch, counted)


@functools.cache
def scores(rows=32, length=32, vocabulary=64, layers=1):
    """``d log p(y_t) / d params`` of the counted tokens, a tree of float64 ``[counted, ...]``."""
    apply, params, batch, counted = case(rows, length, vocabulary, layers)
    return _loop(apply, params, batch.inputs, [(t, batch.targets) for t in counted])


def only(of: Case, kept: np.ndarray):
    """The same batch in which only the tokens of these indices into ``counted`` have a weight, of 1."""
    weights = np.zeros(of.batch.targets.size, np.float32)
    weights[of.counted[kept]] = 1
    return fj.Batch(of.batch.inputs, of.batch.targets, jnp.asarray(weights.reshape(of.batch.targets.shape)))


def label_scores(of: Case, token: int):
    """Scores of one token for every label, ``[labels, ...]``, and the model's probabilities of them."""
    logits = np.asarray(of.apply(of.params, of.batch.inputs), np.float64)
    logits = logits.reshape(-1, logits.shape[-1])[token]
    every = [(token, jnp.full_like(of.batch.targets, y)) for y in range(len(logits))]
    return _loop(of.apply, of.params, of.batch.inputs, every), np.exp(logits) / np.exp(logits).sum()


def _loop(apply: Callable, params: Any, inputs: Any, questions: list):
    one = _score(apply)
    found = [jax.tree.map(np.asarray, one(params, inputs, targets, t)) for t, targets in questions]
    return jax.tree.map(lambda *x: np.stack(x).astype(np.float64), *found)


@functools.cache
def _score(apply: Callable):
    def log_prob(params, inputs, targets, token):
        logits = apply(params, inputs)
        logits = logits.reshape(-1, logits.shape[-1])[token]
        return jax.nn.log_softmax(logits)[targets.reshape(-1)[token]]

    return jax.jit(jax.grad(log_prob))


def close(found, wanted, rtol=1e-4):
    """Every leaf within ``rtol`` of the largest value of that leaf."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        error = np.abs(x - y).max() / np.abs(y).max()
        assert error < rtol, f"{jax.tree_util.keystr(path)} is off by {error:.1e}"

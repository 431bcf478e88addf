"""What is right: programs of one token or one row, in float32 at the highest precision, summed on the host.

They are too small for the large fusions of a compiler, and share no code with the library but the decoder and, for
the inputs and cotangents of a row's kernels, `fj.capture`.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax.cli.doctor import draws

Leaves = dict[str, Any]  # arrays of NumPy, and its numbers


def by_path(tree: Any, dtype: Any = np.float64) -> Leaves:
    """The leaves of a tree on the host, by their paths."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).astype(dtype) for path, leaf in found}


def _flat(tree: Any) -> jax.Array:
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


class RowTaps:
    """Inputs and cotangents of every use of one row, by path: ``[layers or 1, positions, size]``."""

    def __init__(self, taps: list):
        self.inputs: Leaves = {}
        self.cotangents: Leaves = {}
        for tap in taps:
            layers = len(tap.cotangents) if "layers" in tap.path else 1
            inputs, cotangents = (np.asarray(x, np.float64) for x in (tap.inputs[0], tap.cotangents))
            self.cotangents[tap.path] = cotangents.reshape(layers, -1, cotangents.shape[-1])
            size = 1 if tap.kind == "embedding" else inputs.shape[-1]
            self.inputs[tap.path] = inputs.reshape(layers, -1, size)


class Loops:
    """References for one decoder and one batch; each is computed when it is first asked for."""

    def __init__(self, model: Any, params: Any, batch: fj.Batch, scored: slice):
        self.model, self.params, self.batch, self.scored = model, params, batch, scored
        self.shapes = {path: leaf.shape for path, leaf in by_path(params).items()}
        self.tokens, self.labels = (np.asarray(x, np.int32) for x in (batch.inputs, batch.targets))
        self._draws: dict[tuple[str, str], Any] = {}

    @property
    def key(self) -> jax.Array:
        """Of all that is drawn."""
        return jax.random.key(20)

    @property
    def rows(self) -> range:
        return range(self.tokens.shape[0])

    def scores(self, labels: np.ndarray) -> np.ndarray:
        """``d log p(label) / d params`` of the scored tokens, one token a call: float32 ``[rows, scored, P]``."""

        def log_prob(params, row, label, place):
            return jax.nn.log_softmax(self.model.apply(params, row)[0, place])[label]

        run = jax.jit(lambda *given: _flat(jax.grad(log_prob)(*given)))
        places = range(self.labels.shape[1])[self.scored]
        with jax.default_matmul_precision("highest"):
            return np.stack(
                [
                    [np.asarray(run(self.params, self.tokens[r : r + 1], labels[r, i], np.int32(i))) for i in places]
                    for r in self.rows
                ]
            )

    @cached_property
    def own_scores(self) -> np.ndarray:
        """`scores` for the labels of the batch."""
        return self.scores(self.labels)

    @cached_property
    def _row_gradient(self) -> Callable:
        def total(params, row, labels, coefficients):
            log_p = jax.nn.log_softmax(self.model.apply(params, row))
            return jnp.sum(coefficients * jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0])

        return jax.jit(lambda *given: _flat(jax.grad(total)(*given)))

    def row_sums(self, labels: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """Sums of the scores of each row times coefficients ``[rows, positions]``, one row a call: ``[rows, P]``."""
        labels, coefficients = labels.astype(np.int32), coefficients.astype(np.float32)
        cuts = [slice(row, row + 1) for row in self.rows]
        with jax.default_matmul_precision("highest"):
            found = [self._row_gradient(self.params, self.tokens[c], labels[c], coefficients[c]) for c in cuts]
        return np.stack([np.asarray(x, np.float64) for x in found])

    def leaves(self, flat: np.ndarray) -> Leaves:
        """``[..., P]`` cut into leaves ``[..., *shape]``, float64."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])
        parts = np.split(flat, ends[:-1], -1)
        return {
            path: part.reshape(*flat.shape[:-1], *shape).astype(np.float64)
            for (path, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    @cached_property
    def hidden(self) -> np.ndarray:
        """What the head multiplies, float32 ``[rows, positions, width]``, one row a call."""
        run = jax.jit(self.model.hidden)
        with jax.default_matmul_precision("highest"):
            return np.concatenate([np.asarray(run(self.params, self.tokens[r : r + 1])) for r in self.rows])

    @cached_property
    def logits(self) -> np.ndarray:
        """``[rows, positions, V]``, float64."""
        return self.hidden.astype(np.float64) @ np.asarray(self.params["head"], np.float64).T

    @cached_property
    def log_size(self) -> float:
        """``1 + max |logit|``, by which errors of softmax statistics scale."""
        return float(1 + np.abs(self.logits).max())

    @cached_property
    def taps(self) -> list[RowTaps]:
        """Inputs and cotangents of the summed log-likelihood of every row, one row a call."""

        def loss(params, row, labels):
            log_p = jax.nn.log_softmax(self.model.apply(params, row))
            return jnp.sum(jnp.take_along_axis(log_p, labels[..., None], -1))

        run = jax.jit(lambda params, row, labels: fj.capture(loss)(params, row, labels)[1])
        with jax.default_matmul_precision("highest"):
            return [RowTaps(run(self.params, self.tokens[r : r + 1], self.labels[r : r + 1])) for r in self.rows]

    def signs(self, unit: str) -> np.ndarray:
        """The signs that ``signs`` draws with `key`, ``[rows, positions]``, see `draws.signs`."""
        rows, positions = self.labels.shape
        return self._once("signs", unit, lambda: draws.signs(self.key, rows, positions, unit))

    def drawn(self, unit: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels that ``sampled`` draws with `key`, and which of them rounding cannot change."""
        return self._once("labels", unit, lambda: draws.labels(self.key, self.logits, unit))

    def _once(self, kind: str, unit: str, draw: Callable) -> Any:
        if (kind, unit) not in self._draws:
            self._draws[kind, unit] = draw()
        return self._draws[kind, unit]

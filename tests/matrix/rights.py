"""What is right: float64, from scores of the plain model and from sums by definition. No code of the library.

A weight of 0 and what is not real are left out by hand here: the oracle never sees the NaN.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from tests import oracle_curvature, oracle_kronecker, oracles
from tests.matrix import cases


class Right(NamedTuple):
    """Everything about one batch.

    Attributes:
        scores: ``[T, labels, P]``, of every label.
        p: probabilities ``[T, labels]``.
        weights, targets: ``[T]``.
        inputs, real: of the batch; what must not be read is 0.
        normalise: between a product and its nonlinearity.
    """

    scores: np.ndarray
    p: np.ndarray
    weights: np.ndarray
    targets: np.ndarray
    inputs: dict
    real: np.ndarray
    normalise: Any
    params: dict

    @property
    def apply(self):
        return cases.model(normalise=self.normalise)


@functools.cache
def _jitted(apply):
    def log_probs(flat, inputs):
        z = apply(ravel_pytree(_params(flat))[1](flat), inputs)
        return jax.nn.log_softmax(z).reshape(-1, z.shape[-1])

    return jax.jit(jax.jacrev(log_probs)), jax.jit(log_probs)


def _params(flat):
    del flat
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), cases.PARAMS)


def right(params: Any, batch: Any, normalise=cases.identity) -> Right:
    """The parameters as the column rounds them, in float64; of the inputs what must not be read is 0."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
        clean = np.nan_to_num(np.asarray(batch.inputs["features"], np.float64))
        inputs = {"tokens": jnp.asarray(batch.inputs["tokens"]), "features": jnp.asarray(clean)}
        jacobian, log_probs = _jitted(cases.model(normalise=normalise))
        flat = ravel_pytree(params)[0]
        scores, log_p = np.asarray(jacobian(flat, inputs)), np.asarray(log_probs(flat, inputs))
    shape = batch.targets.shape
    weights = np.ones(shape) if batch.weights is None else np.asarray(batch.weights, np.float64)
    real = np.ones(shape, bool) if batch.real is None else np.asarray(batch.real, bool)
    targets = np.clip(np.asarray(batch.targets), 0, scores.shape[1] - 1)
    return Right(scores, np.exp(log_p), weights, targets, inputs, real, normalise, params)


def squares(right: Right, kind: str = "empirical") -> np.ndarray:
    """Squared scores ``[B, S, P]``."""
    if kind == "true":
        found = np.einsum("tk,tkp->tp", right.p, right.scores**2)
    else:
        found = right.scores[np.arange(right.targets.size), right.targets.ravel()] ** 2
    return found.reshape(*right.targets.shape, -1)


def mean_by_token(right: Right, kind: str = "empirical") -> np.ndarray:
    return np.tensordot(right.weights, squares(right, kind), 2) / right.weights.sum()


def errors_by(right: Right, unit: str, kind: str = "empirical") -> np.ndarray:
    """Standard errors of the mean, where the observations are means of tokens."""
    rows, length = right.targets.shape
    ids = {
        "token": np.arange(rows * length),
        "sequence": np.repeat(np.arange(rows), length),
        "document": np.repeat(cases.UNITS, length),
        "batch": np.zeros(rows * length, int),
    }[unit]
    f = squares(right, kind).reshape(rows * length, -1)
    return np.broadcast_to(oracles.moments(f, right.weights.ravel(), ids)[1], f.shape[1:])


def mean_of_sequences(right: Right) -> np.ndarray:
    """Mean of ``(sum_t w_t s_t)**2 / w_u`` with the weights ``w_u``; the unit of observation does not move it."""
    s = right.scores[np.arange(right.targets.size), right.targets.ravel()].reshape(*right.targets.shape, -1)
    return (np.einsum("bs,bsp->bp", right.weights, s) ** 2).sum(0) / right.weights.sum()


def operator(right: Right, kind: str) -> np.ndarray:
    """Dense ``[P, P]``."""
    with jax.enable_x64(True):
        return oracle_curvature.dense(
            kind, right.apply, "categorical", right.params, right.inputs, jnp.asarray(right.targets), right.weights
        )


def fisher_of_scores(right: Right, unit: str) -> np.ndarray:
    """Dense empirical Fisher matrix of tokens or of rows."""
    s = right.scores[np.arange(right.targets.size), right.targets.ravel()].reshape(*right.targets.shape, -1)
    w = right.weights
    if unit == "token":
        return np.einsum("bs,bsp,bsq->pq", w, s, s) / w.sum()
    sums = np.einsum("bs,bsp->bp", w, s)
    return sums.T @ sums / w.sum()


def taps(right: Right):
    """Of each product the inputs ``[B, S, in]`` and the gradients ``[B, S, out]`` of its outputs.

    The gradient is of ``sum_t sqrt(w_t) log p(y_t)``; the model is written out here with something to move beside
    every product.
    """
    rows, length = right.targets.shape
    width, labels = cases.WIDTH, right.scores.shape[1]

    def run(moved):
        p, inputs = right.params, right.inputs
        one_hot = jax.nn.one_hot(inputs["tokens"], cases.VOCABULARY, dtype=jnp.float64)
        seen = {"embed": one_hot}
        x = one_hot @ p["embed"] + moved["embed"] + inputs["features"]
        for name in ("layer1", "layer2"):
            seen[name] = x
            hidden = jnp.tanh(right.normalise(x @ p[name]["w"] + p[name]["b"] + moved[name]))
            x = cases.mixed(hidden, 1)
        seen["head"] = x
        log_p = jax.nn.log_softmax(x @ p["head"] + moved["head"])
        chosen = jnp.take_along_axis(log_p, jnp.asarray(right.targets)[..., None], -1)[..., 0]
        return jnp.sum(jnp.sqrt(right.weights) * chosen), seen

    with jax.enable_x64(True):
        sizes = {"embed": width, "layer1": width, "layer2": width, "head": labels}
        moved = {name: jnp.zeros((rows, length, n)) for name, n in sizes.items()}
        grads, seen = jax.jit(jax.grad(run, has_aux=True))(moved)
    return jax.tree.map(np.asarray, seen), jax.tree.map(np.asarray, grads)


def kronecker(right: Right, shared: str = "expand") -> np.ndarray:
    """The block diagonal ``[P, P]`` of K-FAC: ``A (x) G`` of every kernel with its bias, in the order of leaves."""
    seen, grads = taps(right)
    real, w = right.real.astype(np.float64), right.weights
    places = {}  # of every leaf its entries in the flat vector
    offset = 0
    for path, x in jax.tree_util.tree_leaves_with_path(cases.PARAMS):
        places[jax.tree_util.keystr(path, simple=True, separator="/")] = np.arange(offset, offset + x.size)
        offset += x.size
    found = np.zeros((offset, offset))
    for name in seen:
        a, g = seen[name].astype(np.float64), grads[name].astype(np.float64)
        kernel, bias = places[f"{name}/w" if name.startswith("layer") else name], places.get(f"{name}/b")
        if bias is not None:
            a = np.concatenate([a, np.ones((*a.shape[:2], 1))], -1)
        if name == "head":
            A = np.einsum("bs,bsi,bsj->ij", w, a, a) / w.sum()
            G = np.einsum("bsi,bsj->ij", g, g) / w.sum()
        elif shared == "expand" or name == "embed":  # averaged one-hot rows would have no diagonal
            A = np.einsum("bs,bsi,bsj->ij", real, a, a) / real.sum()
            G = np.einsum("bs,bsi,bsj->ij", real, g, g) / w.sum()
        else:
            A, G = reduced(a, g, real, w)
        n, out = a.shape[-1], g.shape[-1]
        dense = np.asarray(oracle_kronecker.block(A, G), np.float64).reshape(out, n, out, n)
        order = np.empty((out, n), int)  # entry (o, i) of the kernel [in, out], and the bias as the last input
        inputs = n - (bias is not None)
        order[:, :inputs] = kernel.reshape(inputs, out).T
        if bias is not None:
            order[:, inputs] = bias
        flat = order.ravel()
        found[np.ix_(flat, flat)] = dense.reshape(out * n, out * n)
    return found


def reduced(a, g, real, w):
    """Inputs averaged and gradients summed over the real positions of a row (Eschenhagen et al. 2023)."""
    counts = real.sum(1)
    kept = counts > 0
    a = np.einsum("bs,bsi->bi", real, a)[kept] / counts[kept, None]
    g = np.einsum("bs,bsi->bi", real, g)[kept]
    return a.T @ a / kept.sum(), g.T @ g / w.sum()

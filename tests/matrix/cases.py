"""One small model in many disguises, and the batches of the columns.

Two layers and a running sum after each, so that positions mix and rows do not. Every size is another number.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import fisher_jax as fj

ROWS, LENGTH, WIDTH, VOCABULARY, LABELS = 4, 6, 2, 5, 3


class Case(NamedTuple):
    """A column of the matrix: a model, its parameters and a batch, and how closely a value must be met.

    Attributes:
        stacked: whether the parameters of the two layers are one leaf.
    """

    apply: Callable
    params: dict
    batch: fj.Batch
    rtol: float = 2e-4
    stacked: bool = False


def numbers(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


# Float64; a column rounds them to its dtype.
PARAMS = {
    "embed": numbers(VOCABULARY, WIDTH, seed=1),
    "layer1": {"w": numbers(WIDTH, WIDTH, seed=2), "b": numbers(WIDTH, seed=3)},
    "layer2": {"w": numbers(WIDTH, WIDTH, seed=4), "b": numbers(WIDTH, seed=5)},
    "head": numbers(WIDTH, LABELS, seed=6),
}
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, (ROWS, LENGTH))
FEATURES = numbers(ROWS, LENGTH, WIDTH, seed=8)
TARGETS = np.random.default_rng(9).integers(0, LABELS, (ROWS, LENGTH))
LENGTHS = np.array([6, 3, 0, 5])
REAL = np.arange(LENGTH) < LENGTHS[:, None]
PROMPT = np.arange(LENGTH) < np.array([2, 1, 0, 0])[:, None]
WEIGHTS = np.random.default_rng(10).integers(1, 4, (ROWS, LENGTH)) / 2
UNITS = np.array([3, 3, 5, 5])


def identity(x):
    return x


def mixed(x, axis):
    """What attention does to positions, in one operation: each sees those before it."""
    return x + 0.4 * jnp.cumsum(x, axis)


@functools.cache
def model(there: Callable = identity, back: Callable = identity, normalise: Callable = identity, wrap=identity):
    """Layers work on positions that were moved ``there`` and are brought ``back``; ``wrap`` is a transformation."""

    def layer(p, x):
        hidden = jnp.tanh(back(normalise(there(x) @ p["w"] + p["b"])))
        return mixed(hidden, 1)

    def apply_fn(params, inputs):
        x = back(params["embed"][there(inputs["tokens"])]) + inputs["features"]
        x = wrap(layer)(params["layer1"], x)
        x = wrap(layer)(params["layer2"], x)
        return back(there(x) @ params["head"])

    return apply_fn


plain = model(normalise=identity)


def scanned(params, inputs):
    def layer(x, p):
        hidden = jnp.tanh(x @ p["w"] + p["b"])
        return mixed(hidden, 1), None

    x = params["embed"][inputs["tokens"]] + inputs["features"]
    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


def by_row(params, inputs):
    """The model of one row, mapped."""

    def one(row):
        x = params["embed"][row["tokens"]] + row["features"]
        for p in (params["layer1"], params["layer2"]):
            hidden = jnp.tanh(x @ p["w"] + p["b"])
            x = mixed(hidden, 0)
        return x @ params["head"]

    return jax.vmap(one)(inputs)


def placed(params, inputs):
    """Products and lookups say where their results lie, as a mesh of Explicit axes wants it."""
    rows = jax.typeof(inputs["features"]).sharding.spec[0]

    def out(*axes):
        return {"out_sharding": P(rows, None, *axes)}

    x = params["embed"].at[inputs["tokens"]].get(**out(None)) + inputs["features"]
    for p in (params["layer1"], params["layer2"]):
        hidden = jnp.tanh(jnp.einsum("bsd,df->bsf", x, p["w"], **out("model")) + p["b"])
        hidden = jax.sharding.reshard(hidden, P(rows, None, None))
        x = mixed(hidden, 1)
    return jnp.einsum("bsd,df->bsf", x, params["head"], **out(None))


def batch_norm(x):
    """In training: over rows and positions."""
    return (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 0.1)


def swap(x):
    return jnp.swapaxes(x, 0, 1)


def flip(x):
    return jnp.flip(x, 1)


def windows(x):
    return x.reshape(2 * x.shape[0], LENGTH // 2, *x.shape[2:])


def whole(x):
    return x.reshape(x.shape[0] // 2, LENGTH, *x.shape[2:])


def stack(tree: Any) -> Any:
    """Leaves of the two layers become one, with a leading axis of layers."""
    layers = jax.tree.map(lambda *x: jnp.stack(x), tree["layer1"], tree["layer2"])
    return {"embed": tree["embed"], "layers": layers, "head": tree["head"]}


def unstack(tree: Any) -> Any:
    one, two = (jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in (0, 1))
    return {"embed": tree["embed"], "layer1": one, "layer2": two, "head": tree["head"]}


def batch(real=REAL, weights=WEIGHTS, features=FEATURES, targets=TARGETS, dtype=jnp.float32):
    as_arrays = {"tokens": jnp.asarray(TOKENS, jnp.int32), "features": jnp.asarray(features, dtype)}
    return fj.Batch(
        as_arrays, jnp.asarray(targets, jnp.int32), None if weights is None else jnp.asarray(weights, jnp.float32),
        None if real is None else jnp.asarray(real), jnp.asarray(UNITS, jnp.int32),
    )  # fmt: skip


def in_dtype(dtype, tree=None):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS if tree is None else tree)


BOTH = np.where(REAL & ~PROMPT, WEIGHTS, 0)
SPOILED = np.where(REAL, TARGETS, -5)
NAN_IN_PADDING = np.where(REAL[..., None], FEATURES, np.nan)
# One row has no weight, whatever is real.
SILENT = np.where(np.arange(ROWS)[:, None] == 2, 0, WEIGHTS)
NAN_IN_SILENT_ROW = np.where(np.arange(ROWS)[:, None, None] == 2, np.nan, FEATURES)


def case(column: str) -> Case:
    """The model and the batch of a column."""
    params, usual = in_dtype(jnp.float32), batch(weights=BOTH)
    match column:
        case "mask":
            return Case(plain, params, batch(weights=REAL))
        case "weights":
            return Case(plain, params, batch(real=np.ones_like(REAL)))
        case "NaN in padding":
            return Case(plain, params, batch(weights=BOTH, features=NAN_IN_PADDING, targets=SPOILED))
        case "NaN under weight 0":
            return Case(plain, params, batch(real=None, weights=SILENT, features=NAN_IN_SILENT_ROW))
        case "time-major":
            return Case(model(swap, swap), params, usual)
        case "flipped":
            return Case(model(flip, flip), params, usual)
        case "windows":
            return Case(model(windows, whole), params, usual)
        case "rows that interact":
            return Case(model(normalise=batch_norm), params, batch(real=None))
        case "bfloat16":
            low = in_dtype(jnp.bfloat16)
            return Case(plain, low, batch(weights=BOTH, dtype=jnp.bfloat16), rtol=0.06)
        case "x64":
            return Case(plain, in_dtype(jnp.float64), batch(weights=BOTH, dtype=jnp.float64), rtol=1e-9)
        case "scan":
            return Case(scanned, stack(params), usual, stacked=True)
        case "remat":
            return Case(model(wrap=jax.checkpoint), params, usual)
        case "vmap":
            return Case(by_row, params, usual)
        case "Explicit mesh":
            return Case(placed, params, usual)
        case _:
            return Case(plain, params, usual)

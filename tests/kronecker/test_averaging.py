"""Statistics that stay between refreshes: their periods, and averages against sums written out, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.kronecker.statistics import averaging
from tests import oracle_kronecker as oracle

DAMPING, DECAY = 1e-2, 0.7


def model(params, x):
    return (x * params["scale"]) @ params["w"] + params["b"]


def setting():
    rng = np.random.default_rng(0)
    params, grads = (
        {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "scale": rng.normal(size=3)} for _ in "ab"
    )
    batches = []
    for zeros in (1, 0, 3, 2):
        weights = rng.uniform(0.5, 2, size=5) * (np.arange(5) >= zeros)
        batches.append((rng.normal(size=(5, 3)), rng.integers(0, 4, size=5), weights))
    return params, grads, batches


def sums(params, x, y, w):
    """Not divided: inputs, output gradients, squares of the scale, and the weight."""
    a = x * params["scale"]
    z = a @ params["w"] + params["b"]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    g = np.sqrt(w)[:, None] * (np.eye(4)[y] - p)
    rows = np.c_[a, np.ones(5)]
    squares = ((g @ params["w"].T * x) ** 2).sum(0)
    return (rows * w[:, None]).T @ rows, g.T @ g, squares, w.sum()


def natural(params, grads, seen):
    """From ``seen``, pairs of a batch and its share."""
    parts = [[share * s for s in sums(params, *batch)] for batch, share in seen]
    A, G, squares, W = (functools.reduce(np.add, part) for part in zip(*parts, strict=True))
    M = np.vstack([grads["w"], grads["b"]]).T
    X = oracle.damped_power(oracle.block(A / W, G / W), M, DAMPING).T
    return {"w": X[:-1], "b": X[-1], "scale": grads["scale"] / (squares / W + DAMPING)}


@functools.cache
def runner(curvature, refresh):
    with jax.enable_x64(True):
        _, _, batches = setting()
        example = fj.Batch(*map(jnp.asarray, batches[0]))
        tx = fj.scale_by_kfac(
            model, example=example, damping=DAMPING, kl_clip=None, curvature=curvature, refresh=refresh
        )
        return tx, jax.jit(tx.update)


@pytest.mark.parametrize("policy", ["all", "never"])
def test_statistics_are_averaged_at_their_own_period_and_decomposed_at_another(policy):
    params, grads, batches = setting()
    # Four outputs: 4 columns hold any average of them.
    refresh = fj.Refresh(period=2, statistics_period=1, factor_decay=DECAY, factor_rank=4)
    tx, update = runner(fj.Curvature(policy=policy), refresh)
    with jax.enable_x64(True):
        cast = lambda t: jax.tree.map(jnp.asarray, t)  # noqa: E731
        state = tx.init(cast(params))
        types = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        found = []
        for batch in batches[:3]:
            updates, state = update(cast(grads), state, cast(params), batch=fj.Batch(*map(jnp.asarray, batch)))
            found.append(jax.device_get(updates))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == types
        kept = jax.device_get(state)
        nan = fj.Batch(jnp.full((5, 3), jnp.nan), *map(jnp.asarray, batches[0][1:]))
        _, after = update(cast(grads), state, cast(params), batch=nan)  # statistics alone are due, and refused
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.raw), kept.raw)
        assert (int(after.rejected), int(after.raw_age), int(after.age)) == (1, 2, 2)
        _, after = update(cast(grads), after, cast(params), batch=nan)  # both are due: the factors wait too
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.blocks), kept.blocks)
        updates, after = update(cast(grads), after, cast(params), batch=fj.Batch(*map(jnp.asarray, batches[3])))
        found.append(jax.device_get(updates))
    first = natural(params, grads, [(batches[0], 1)])
    three = [(batch, DECAY ** (2 - i)) for i, batch in enumerate(batches[:3])]
    last = [(batch, DECAY * share) for batch, share in three] + [(batches[3], 1)]
    wanted = [first, first, natural(params, grads, three), natural(params, grads, last)]
    for one, other in zip(found, wanted, strict=True):
        for name in grads:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-8, atol=1e-10)


def test_the_columns_that_stay_are_the_best_of_their_number():
    rng = np.random.default_rng(1)
    old, new = rng.normal(size=(7, 3)), rng.normal(size=(7, 4))
    with jax.enable_x64(True):
        V = np.asarray(jax.jit(averaging.beside)(old, new, DECAY))
        room = np.asarray(jax.jit(averaging.beside)(np.c_[old, np.zeros((7, 5))], new, DECAY))
    whole = new @ new.T + DECAY * old @ old.T
    values, vectors = np.linalg.eigh(whole)
    np.testing.assert_allclose(V @ V.T, (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T, atol=1e-12)
    np.testing.assert_allclose(room @ room.T, whole, atol=1e-12)


def test_what_cannot_be_averaged_is_said_at_once():
    _, _, batches = setting()
    example = fj.Batch(*(jnp.asarray(x, jnp.int32 if x.dtype == int else jnp.float32) for x in batches[0]))
    for message, curvature, refresh in (
        ("statistics_period is at most period=2, found 3", {}, {"period": 2, "statistics_period": 3}),
        ("factor_decay is the share", {}, {"factor_decay": 1.0}),
        ("factor_rank=3 belongs", {}, {"factor_rank": 3}),
        ("closed form for one batch", {"estimator": "exact_head"}, {"factor_decay": 0.9}),
        ("projects the batch", {"eigenvalue_correction": True}, {"factor_decay": 0.9}),
        ("factored damping could split", {"eigenvalue_correction": True, "form": "factored"}, {}),
    ):
        with pytest.raises(ValueError, match=message):
            fj.scale_by_kfac(
                model, example=example, curvature=fj.Curvature(**curvature), refresh=fj.Refresh(**refresh)
            )

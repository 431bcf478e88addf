"""Models of other packages: every leaf is covered, and every number is that of a loop or of a dense inverse.

``uv run --group zoo pytest -m zoo``. A parameter used at one position has the block ``s s^T``, ``s`` its gradient
with its bias: dense inverses need no more than `jax.grad`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_jax as fj
from tests.zoo.strangers import LABELS, STRANGERS

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]
LENGTH, DAMPING = 4, 0.1


def batch_of(apply_fn, params, inputs, rows=None):
    shape = jax.eval_shape(apply_fn, params, inputs).shape[:-1]
    rng = np.random.default_rng(2)
    targets, weights = rng.integers(0, LABELS, shape), rng.integers(0, 3, shape) / 2
    weights[0] = 1
    if rows is not None:
        weights[rows:] = 0
    return fj.Batch(inputs, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32))


@functools.cache
def built(name, length=LENGTH):
    apply_fn, params, inputs = STRANGERS[name](length)
    return apply_fn, params, batch_of(apply_fn, params, inputs)


def scores(apply_fn, params, batch):
    """Per-token gradients by a loop, of tokens with a weight, and these weights."""
    lead = batch.targets.shape

    @jax.jit
    def one(params, place):
        def log_prob(params):
            return jax.nn.log_softmax(apply_fn(params, batch.inputs))[*place, batch.targets[*place]]

        return jax.grad(log_prob)(params)

    weights = np.asarray(batch.weights)
    places = [place for place in np.ndindex(*lead) if weights[place]]
    found = [jax.tree.leaves(one(params, jnp.asarray(place))) for place in places]
    return [np.stack([np.asarray(x, np.float64) for x in leaf]) for leaf in zip(*found, strict=True)], np.array(
        [weights[place] for place in places], np.float64
    )


def close(found, wanted, rtol):
    error = np.abs(np.asarray(found, np.float64) - wanted).max()
    assert error <= rtol * np.abs(wanted).max() + 1e-9


@pytest.mark.parametrize("name", STRANGERS)
def test_every_leaf_is_covered(name):
    apply_fn, params, batch = built(name)
    found = fj.coverage(lambda p: apply_fn(p, batch.inputs).sum(), params)
    assert len(found.rows) == len(jax.tree.leaves(params))
    told = fj.kfac_tools.kfac_coverage(apply_fn, fj.categorical, params, batch)
    assert len(told.rows) == len(jax.tree.leaves(params))


@pytest.mark.parametrize("name", STRANGERS)
def test_exact_is_a_loop_of_gradients(name):
    apply_fn, params, batch = built(name)
    fisher = fj.group_fisher(apply_fn, estimator="exact")
    state = jax.jit(fisher.update)(fisher.init(params), params, batch)
    fj.check(state)
    each, weights = scores(apply_fn, params, batch)
    for x, s in zip(jax.tree.leaves(fj.mean(state)), each, strict=True):
        close(x, np.tensordot(weights, s**2, 1) / weights.sum(), 1e-4)


def tied_block(apply_fn, params, batch, gradient):
    """Of a table that looks up the token and is the head: the head's gradients squared, and the trace of those of the
    lookup spread evenly over the columns of its row. No cross terms."""
    logits = np.asarray(apply_fn(params, batch.inputs), np.float64).ravel()
    of_logits = np.eye(logits.size)[int(batch.targets.item())] - np.exp(logits) / np.exp(logits).sum()
    gradient, looked_up = gradient.reshape(logits.size, -1), int(batch.inputs.item())
    other = (looked_up + 1) % logits.size
    head = np.outer(of_logits, gradient[other] / of_logits[other])
    rows = np.zeros(logits.size)
    rows[looked_up] = np.square(gradient[looked_up] - head[looked_up]).mean()
    return np.outer(head, head) + np.diag(np.repeat(rows, gradient.shape[1]))


@pytest.mark.parametrize("name", STRANGERS)
def test_kfac_is_a_dense_inverse(name):
    """One row of one position: the block of a kernel and its bias is the square of their gradient."""
    apply_fn, params, batch = built(name, 1)
    one = jax.tree.map(lambda x: x[:1], batch)
    factors = jax.jit(
        lambda params: fj.kfac_factors(
            apply_fn, fj.categorical, params, one, damping=DAMPING, curvature=fj.Curvature(form="exact")
        )
    )(params)
    rng = np.random.default_rng(3)
    tree = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    found = [np.asarray(x, np.float64) for x in jax.tree.leaves(fj.precondition(factors, tree))]
    (each, weights), given = scores(apply_fn, params, one), jax.tree.leaves(tree)
    given = [np.asarray(x, np.float64) for x in given]
    assert weights.tolist() == [1.0]
    for block in factors.plan:
        leaves = [block.leaf] if block.bias is None else [block.leaf, block.bias]
        s, v = (np.concatenate([x[i].ravel() for i in leaves]) for x in ([x[0] for x in each], given))
        if block.kind == "diagonal":
            wanted = v / (s**2 + DAMPING)
        else:
            matrix = tied_block(apply_fn, params, one, s) if block.kind == "tied" else np.outer(s, s)
            wanted = np.linalg.solve(matrix + DAMPING * np.eye(s.size), v)
        close(np.concatenate([found[i].ravel() for i in leaves]), wanted, 1e-3)


@pytest.mark.parametrize("name", STRANGERS)
def test_twenty_steps_stay_finite(name):
    apply_fn, params, batch = built(name)
    tx = fj.kfac(apply_fn, example=batch)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            log_p = fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets)
            return -jnp.sum(batch.weights * log_p) / batch.weights.sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, batch=batch, key=key, value=value)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for key in jax.random.split(jax.random.key(0), 20):
        params, state, value = step(params, state, key)
        losses.append(float(value))
    fj.check(state)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]

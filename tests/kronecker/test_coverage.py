"""A coverage promises what the next call keeps, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from tests.tracing.zoo import ZOO


def told(call):
    """What a call refuses, or ``None``."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def both(apply_fn, likelihood, params, batch, **options):
    """What the coverage refuses, and what the factors and their inverse do."""
    curvature = fj.Curvature(**options)
    given = params, batch, jax.random.key(0)

    def factors(params, batch, key):
        found = fj.kfac_factors(apply_fn, likelihood, params, batch, key=key, curvature=curvature)
        return fj.precondition(found, params)

    return (
        told(lambda: fj.kfac_tools.kfac_coverage(apply_fn, likelihood, params, batch, curvature=curvature)),
        told(lambda: jax.eval_shape(factors, *given)),
    )


@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith("decoder_like")])
def test_every_promise_over_the_zoo_is_kept(name):
    loss, params, args, _ = ZOO[name]()
    batch = fj.Batch(args, jnp.zeros(1))
    promised, kept = both(lambda params, args: jnp.reshape(loss(params, *args), 1), fj.gaussian, params, batch)
    assert promised == kept


def lstm(params, x):
    """One matrix for input and state, split in four gates."""

    def step(carry, x):
        state, memory = carry
        gates = jnp.concatenate([x, state], -1) @ params["w"] + params["b"]
        enter, new, forget, leave = jnp.split(gates, 4, -1)
        memory = jax.nn.sigmoid(forget + 1) * memory + jax.nn.sigmoid(enter) * jnp.tanh(new)
        state = jax.nn.sigmoid(leave) * jnp.tanh(memory)
        return (state, memory), state

    start = jnp.zeros((x.shape[0], 4))
    _, states = jax.lax.scan(step, (start, start), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(states, 0, 1) @ params["o"]


def chosen_by_data(params, x):
    order = jnp.argsort(x[..., 0], 1)
    return jnp.tanh(jnp.take_along_axis(x, order[..., None], 1) @ params["w"]) @ params["o"]


REAL = jnp.arange(4) < jnp.array([4, 3, 1])[:, None]


@pytest.mark.parametrize(
    ("apply_fn", "width", "refused"), [(lstm, 7, False), (chosen_by_data, 3, True)], ids=["lstm", "sorted"]
)
@pytest.mark.parametrize("masks", ["none", "weights", "padding"])
@pytest.mark.parametrize("shared", ["expand", "reduce"])
def test_masks_are_a_part_of_the_promise(apply_fn, width, refused, masks, shared):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(width, 16))), "o": jnp.asarray(rng.normal(size=(4, 5)))}
    if apply_fn is lstm:
        params["b"] = jnp.zeros(16)
    else:
        params["w"] = params["w"][:, :4]
    batch = fj.Batch(
        jnp.asarray(rng.normal(size=(3, 4, 3))), jnp.asarray(rng.integers(0, 5, (3, 4))),
        None if masks == "none" else REAL * 1.0, REAL if masks == "padding" else None,
    )  # fmt: skip
    promised, kept = both(apply_fn, fj.categorical, params, batch, policy="never", shared=shared)
    assert promised == kept
    assert (promised is not None) == ((apply_fn is lstm and shared == "reduce") or (refused and masks == "padding"))


def unrolled(params, x):
    state, found = jnp.zeros((x.shape[0], 4)), []
    for t in range(x.shape[1]):
        state = jnp.tanh(x[:, t] @ params["w"] + state @ params["u"])
        found.append(state)
    return jnp.stack(found, 1) @ params["o"]


def counted(params, x):
    """A loop that reads its inputs, and writes its outputs, by a counter."""

    def body(t, carry):
        state, found = carry
        state = jnp.tanh(x[:, t] @ params["w"] + state @ params["u"])
        return state, found.at[:, t].set(state)

    start = jnp.zeros((x.shape[0], 4)), jnp.zeros((*x.shape[:2], 4))
    return jax.lax.fori_loop(0, x.shape[1], body, start)[1] @ params["o"]


def associative(params, x):
    gate, new = jax.nn.sigmoid(x @ params["w"]), x @ params["v"]
    join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    return jax.lax.associative_scan(join, (gate, new), axis=1)[1] @ params["o"]


def windows(params, x):
    rows, length, width = x.shape
    pairs = jnp.tanh(x.reshape(rows, length // 2, 2 * width) @ params["pairs"])
    return jnp.repeat(pairs, 2, 1) @ params["o"]


def neighbours(params, x):
    """Every position attends to itself and the one before."""
    hidden = x @ params["w"]
    place = jnp.arange(x.shape[1])[:, None] - jnp.arange(2)
    seen = jnp.where((place >= 0)[None, :, :, None], hidden[:, jnp.maximum(place, 0)], 0)
    scores = jnp.einsum("bsd,bswd->bsw", hidden @ params["u"], seen)
    return jnp.einsum("bsw,bswd->bsd", jax.nn.softmax(scores), seen) @ params["o"]


@pytest.mark.parametrize("model", [unrolled, counted, associative, windows, neighbours])
def test_models_whose_positions_cannot_be_followed_are_open_without_padding(model):
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4), "u": (4, 4), "v": (3, 4), "pairs": (6, 4), "o": (4, 5)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x, y = jnp.asarray(rng.normal(size=(3, 4, 3))), jnp.asarray(rng.integers(0, 5, (3, 4)))
    for weights in (None, REAL * 1.0):
        assert both(model, fj.categorical, params, fj.Batch(x, y, weights)) == (None, None)

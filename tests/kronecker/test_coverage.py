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

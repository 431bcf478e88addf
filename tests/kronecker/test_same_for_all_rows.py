"""What a parameter meets that is the same for every row: the gradients of rows come summed; no square is theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

ROWS, LENGTH, D, K = 5, 4, 3, 3
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, 5, (ROWS, LENGTH)))
BATCH = fj.Batch(IDS, jnp.asarray(RNG.integers(0, K, (ROWS, LENGTH))))
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"e": (5, D), "pos": (LENGTH, D), "w": (D, D), "rel": (2 * LENGTH - 1,), "o": (D, K)}.items()
}
MASK = np.array([[1.0, 0, 1], [0, 1, 1], [1, 1, 0]])
REL = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None] + LENGTH - 1


def model(place, kernel=lambda p: p["w"]):
    return lambda p, ids: jnp.tanh((p["e"][ids] + place(p, ids)) @ kernel(p)) @ p["o"]


def relative(p, ids):
    x = p["e"][ids]
    weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x[..., ::-1]) + p["rel"][REL][None])
    return jnp.einsum("bqk,bkd->bqd", weights, x) @ p["o"]


def none(p, ids):
    return jnp.zeros((1, 1, D))


# By what the error names.
REFUSED = {
    "places in no order": ("pos", "gather", model(lambda p, ids: p["pos"][jnp.array([2, 0, 1, 3])][None])),
    "places beyond the end": (
        "pos",
        "gather",
        model(lambda p, ids: jnp.take(p["pos"], jnp.arange(LENGTH) + 1, 0, mode="clip")[None]),
    ),
    "relative places": ("rel", "gather", relative),
    "a mask of a kernel": ("w", "mul", model(none, lambda p: p["w"] * MASK)),
    "permuted inputs": ("w", "gather", model(none, lambda p: p["w"][np.array([2, 0, 1])])),
    "permuted outputs": ("w", "gather", model(none, lambda p: p["w"][:, np.array([2, 0, 1])])),
}
RIGHT = {
    "added": lambda p, ids: p["pos"][None],
    "sliced": lambda p, ids: p["pos"][None, :LENGTH],
    "in a range": lambda p, ids: p["pos"][jnp.arange(LENGTH)][None],
    "in a range with an axis of rows": lambda p, ids: p["pos"][jnp.arange(LENGTH)[None]],
    "taken": lambda p, ids: jnp.take(p["pos"], jnp.arange(LENGTH), axis=0),
    "backwards": lambda p, ids: p["pos"][jnp.arange(LENGTH - 1, -1, -1)],
    "from the end": lambda p, ids: p["pos"][jnp.arange(-LENGTH, 0)],
    "the first alone": lambda p, ids: p["pos"][jnp.zeros(1, int)],
    "every second": lambda p, ids: jnp.repeat(p["pos"][jnp.arange(0, LENGTH, 2)], 2, axis=0),
    "units in a range": lambda p, ids: p["pos"][:, jnp.arange(D)],
    "cut by a number": lambda p, ids: jax.lax.dynamic_slice_in_dim(p["pos"], 0, LENGTH),
    "rematerialised": lambda p, ids: jax.checkpoint(
        lambda pos: jnp.sin(ids * 1.0)[..., None] + pos[jnp.arange(LENGTH)]
    )(p["pos"]),
    "looked up for every row": lambda p, ids: p["pos"][jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)],
}


def trace_of(apply_fn, name, **options):
    """Of the block of a leaf."""
    others = {"diagonal": lambda path: path not in (f"['{name}']", "['o']"), **options}
    curvature = fj.Curvature(policy="never", **others)
    factors = fj.kfac_factors(apply_fn, fj.categorical, PARAMS, BATCH, curvature=curvature)
    product = fj.operators.kfac(factors)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)

    def entry(i):
        unit = jnp.zeros(PARAMS[name].size).at[i].set(1).reshape(PARAMS[name].shape)
        return product({**zero, name: unit})[name].ravel()[i]

    return float(jax.jit(jax.vmap(entry))(jnp.arange(PARAMS[name].size)).sum())


@pytest.mark.parametrize("name", REFUSED)
def test_kfac_refuses_it_with_the_way_out(name):
    leaf, operation, apply_fn = REFUSED[name]
    with pytest.raises(
        ValueError, match=rf"\['{leaf}'\]: it meets constants alone \({operation} at .*same for every row"
    ):
        trace_of(apply_fn, leaf)
    # The square of the batch's gradient, as the user's word.
    gradient = jax.grad(lambda p: jnp.sum(fj.categorical.log_prob(apply_fn(p, IDS), BATCH.targets)))(PARAMS)[leaf]
    found = trace_of(apply_fn, leaf, diagonal=lambda path: path != "['o']")
    np.testing.assert_allclose(found, float(jnp.sum(gradient**2)) / IDS.size, rtol=1e-4)


@pytest.mark.parametrize("name", RIGHT)
def test_a_table_that_meets_the_rows_has_the_squares_of_their_gradients(name):
    apply_fn = model(RIGHT[name], lambda p: jnp.eye(D))
    exact = fj.group_fisher(apply_fn, estimator="exact", unit="batch")
    wanted = float(fj.mean(jax.jit(exact.observe)(PARAMS, BATCH))["pos"].sum())
    np.testing.assert_allclose(trace_of(apply_fn, "pos"), wanted, rtol=1e-4)


@pytest.mark.parametrize("name", ["a mask of a kernel", "permuted inputs", "permuted outputs"])
def test_rows_and_columns_of_it_are_not_guessed(name):
    _, operation, apply_fn = REFUSED[name]
    for group in ("row", "column"):
        with pytest.raises(
            ValueError, match=rf"\['w'\] meets constants alone \({operation} at .*rows cannot be told"
        ):
            fj.group_fisher(apply_fn, groups=group, example=BATCH).init(PARAMS)


def test_complex_numbers_in_a_model_are_no_scale():
    def apply_fn(p, x):
        return jnp.real((x @ p["w"]) * 1j * (1 - 2j)) @ p["o"]

    batch = fj.Batch(jnp.ones((ROWS, D)), jnp.zeros(ROWS, int))
    params = {name: PARAMS[name] for name in ("w", "o")}
    options = {"groups": "row", "example": batch}
    doubled = fj.group_fisher(lambda p, x: 2 * (x @ p["w"]) @ p["o"], **options, estimator="sequence")
    own = fj.group_fisher(apply_fn, **options, estimator="sequence")
    for mine, real in zip(*(jax.tree.leaves(fj.mean(f.observe(params, batch))) for f in (own, doubled)), strict=True):
        np.testing.assert_allclose(mine, real, rtol=1e-5)
    assert fj.kfac_factors(apply_fn, fj.categorical, params, batch)


def test_a_model_that_holds_its_data_stays_open():
    """A graph whose nodes are looked up in the model: every row is a node."""

    def apply_fn(p, ids):
        return jnp.tanh(p["e"][IDS[:, 0]] @ p["w"]) @ p["o"]

    batch = fj.Batch(None, BATCH.targets[:, 0])
    params = {name: PARAMS[name] for name in ("e", "w", "o")}
    factors = fj.kfac_factors(apply_fn, fj.categorical, params, batch, curvature=fj.Curvature(policy="never"))
    assert [block.kind for block in factors.plan] == ["embedding", "dense", "dense"]
    exact = fj.group_fisher(apply_fn, estimator="exact", unit="batch", groups="row", example=batch)
    assert [x.shape for x in jax.tree.leaves(exact.init(params).mean)] == [(2, 5), (2, 3), (2, 3)]

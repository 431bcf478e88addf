"""Leaves of every sort: lookups that are mapped over, tokens that are learned, heads of mapped models and loops."""

import functools

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

B, S, D, V = 2, 3, 4, 5


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) * 0.5)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def token_batch():
    rng = np.random.default_rng(3)
    weights = jnp.asarray([[1.0, 0.5, 1], [1, 2, 0]])
    return fj.Batch(jnp.asarray(rng.integers(0, V, (B, S))), jnp.asarray(rng.integers(0, V, (B, S))), weights)


def loop_of_grad(apply_fn, params, batch):
    """``sum_t w_t s_t**2 / sum_t w_t`` of every entry."""

    @jax.jit
    def score(at):
        return jax.grad(lambda p: jax.nn.log_softmax(apply_fn(p, batch.inputs))[(*at, batch.targets[at])])(params)

    total = jax.tree.map(np.zeros_like, params)
    for at in np.ndindex(batch.targets.shape):
        weight = float(batch.weights[at])
        total = jax.tree.map(lambda t, s, w=weight: t + w * np.square(s), total, score(tuple(map(jnp.asarray, at))))
    return jax.tree.map(lambda t: t / float(batch.weights.sum()), total)


def taken(table, ids):
    return jnp.take(table, ids, axis=0)


def one_by_one(table, ids):
    return jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(table, i, keepdims=False)))(ids)


def by_equinox(table, ids):
    module = equinox.nn.Embedding(weight=table)
    return jax.vmap(jax.vmap(module))(ids)


def stored_by_feature(table, ids):
    return jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_slice(table.T, (0, i), (D, 1))[:, 0]))(ids)


LOOKUPS = [one_by_one, by_equinox, stored_by_feature]


def embedder(lookup):
    def apply_fn(params, ids):
        return jnp.cumsum(jnp.tanh(lookup(params["table"], ids)), 1) @ params["head"]

    return apply_fn, {"table": draw(V, D), "head": draw(D, V)}


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_a_lookup_that_is_mapped_over_is_an_embedding(lookup):
    apply_fn, params = embedder(lookup)
    batch = token_batch()
    (table,) = [
        spec
        for spec in fj.kfac_tools.kfac_coverage(apply_fn, fj.categorical, params, batch).rows
        if "table" in spec[0]
    ]
    assert table[2].startswith(f"frequencies of {V} rows (x) G [{D}, {D}]")
    curvature = fj.Curvature(estimator="empirical")
    found, wanted = (
        fj.kfac_factors(embedder(f)[0], fj.categorical, params, batch, curvature=curvature, damping=0.1)
        for f in (lookup, taken)
    )
    grads = {"table": draw(V, D, seed=1), "head": draw(D, V, seed=1)}
    solved, own = (fj.precondition(x, grads) for x in (found, wanted))
    np.testing.assert_allclose(solved["table"], own["table"], rtol=1e-9)


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("estimator", ["exact", "sequence"])
def test_rows_of_a_lookup_that_is_mapped_over(lookup, estimator):
    apply_fn, params = embedder(lookup)
    batch = token_batch()

    def mean(apply_fn, groups):
        fisher = fj.group_fisher(apply_fn, estimator=estimator, groups=groups, example=batch)
        return jax.jit(fisher.observe)(params, batch).mean

    np.testing.assert_allclose(
        mean(apply_fn, "row")["table"], np.sum(mean(embedder(taken)[0], "param")["table"], 1), rtol=1e-9
    )


def vit(params, images):
    """A class token before the patches, registers behind them, a position for each; the class token's output."""

    def one(patches):
        x = patches @ params["patch"]
        x = jnp.concatenate([params["cls"][None], x, params["registers"]]) + params["position"]
        q, k, v = (x @ params[name] for name in "qkv")
        x = x + jax.nn.softmax(q @ k.T) @ v
        return jnp.tanh(x[0]) @ params["head"]

    return jax.vmap(one)(images)


def batched_vit(params, images):
    x = images @ params["patch"]
    first = jnp.broadcast_to(params["cls"], (len(x), 1, D))
    x = jnp.concatenate([first, x, jnp.tile(params["registers"], (len(x), 1, 1))], 1) + params["position"]
    q, k, v = (x @ params[name] for name in "qkv")
    x = x + jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v
    return jnp.tanh(x[:, 0]) @ params["head"]


VIT = {"patch": (6, D), "cls": (D,), "registers": (2, D), "position": (S + 3, D), "head": (D, V)}
VIT |= dict.fromkeys("qkv", (D, D))


@pytest.mark.parametrize("model", [vit, batched_vit])
def test_class_and_register_tokens_have_rows_and_a_diagonal(model):
    params = {name: draw(*shape) for name, shape in VIT.items()}
    batch = fj.Batch(draw(B, S, 6), jnp.array([1, 4]), jnp.array([1.0, 0.5]))
    squares = loop_of_grad(model, params, batch)
    for estimator in ("exact", "sequence"):
        fisher = fj.group_fisher(model, estimator=estimator, groups="row", example=batch)
        mean = jax.jit(fisher.observe)(params, batch).mean
        if estimator == "exact":
            for name in ("cls", "registers", "position"):
                np.testing.assert_allclose(mean[name], squares[name], rtol=1e-9, err_msg=name)
            np.testing.assert_allclose(mean["patch"], squares["patch"].sum(0), rtol=1e-9)
    table = {row[0]: row[2] for row in fj.kfac_tools.kfac_coverage(model, fj.categorical, params, batch).rows}
    assert table["['cls']"] == table["['registers']"] == table["['position']"] == "diagonal"
    curvature = fj.Curvature(estimator="empirical")
    factors = fj.kfac_factors(model, fj.categorical, params, batch, curvature=curvature, damping=0.25)
    grads = jax.tree.map(jnp.ones_like, params)
    solved = fj.precondition(factors, grads)
    # One token of each image, so that the batch's squares are those of its tokens.
    np.testing.assert_allclose(1 / np.asarray(solved["cls"]) - 0.25, squares["cls"], rtol=1e-6)


def mapped(params, x):
    """One example at a time, kernels ``[out, in]``, as in equinox."""

    def one(x):
        return params["head"] @ jnp.tanh(params["w"] @ x) + params["bias"]

    return jax.vmap(jax.vmap(one))(x)


def recurrent(params, x):
    """Time-major: every step makes its own logits."""

    def step(h, x):
        h = jnp.tanh(x @ params["w"].T + h)
        return h, h @ params["head"].T + params["bias"]

    _, out = jax.lax.scan(step, jnp.zeros((x.shape[0], D)), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(out, 0, 1)


def row_by_row(params, x):
    return jax.lax.map(lambda row: jnp.tanh(row @ params["w"].T) @ params["head"].T + params["bias"], x)


def backwards(params, x):
    """Two directions of one recurrence, the second one read."""

    def step(h, x):
        h = jnp.tanh(params["w"] @ x + h)
        return h, params["head"] @ h

    def one(x):
        return jax.lax.scan(step, jnp.zeros(D), x, reverse=True)[1]

    return jax.vmap(one)(x) + params["bias"]


def scaled(params, x):
    return jnp.tanh(x @ params["w"].T) @ (params["head"].T * 0.5) + params["bias"]


HEADS = [mapped, recurrent, row_by_row, backwards, scaled]


@functools.cache
def head_problem():
    with jax.enable_x64(True):
        params = {"w": draw(D, 6), "head": draw(V, D), "bias": draw(V)}
        ids = token_batch()
        return params, fj.Batch(draw(B, S, 6), ids.targets, ids.weights)


@pytest.mark.parametrize("model", HEADS)
def test_heads_of_mapped_models_and_of_loops(model):
    params, batch = head_problem()
    squares = loop_of_grad(model, params, batch)["head"]
    groups = {"entries": "param", "rows": fj.groups.row, "columns": "column", "all": "tensor"}
    fisher = fj.group_fisher(model, estimator="head", groups=groups, example=batch, unit="token")
    state = jax.jit(fisher.update)(fisher.init(params), params, batch)
    found = fj.mean(state)
    assert found["w"] is None
    sums = {"entries": squares, "rows": squares.sum(1), "columns": squares.sum(0), "all": squares.sum()}
    assert set(found["head"]) == set(sums)
    for name, wanted in sums.items():
        np.testing.assert_allclose(found["head"][name], wanted, rtol=1e-9, err_msg=name)
    sizes = fisher.group_sizes(params)["head"]
    assert [float(np.max(sizes[name])) for name in groups] == [1, D, V, V * D]
    one = fj.group_fisher(model, estimator="head", groups="row", example=batch, unit="token")
    alone = jax.jit(one.update)(one.init(params), params, batch)
    np.testing.assert_allclose(
        fj.welford.variance(state)["head"]["rows"], fj.welford.variance(alone)["head"], rtol=1e-9
    )


def test_a_head_without_an_example():
    params, batch = head_problem()
    fisher = fj.group_fisher(mapped, estimator="head", groups="param")
    moments = fisher.observe(params, batch)
    state = fisher.update(fj.welford.init(moments), params, batch)
    np.testing.assert_allclose(fj.mean(state)["head"], moments.mean["head"] * 2.0**-moments.scale, rtol=1e-9)
    with pytest.raises(ValueError, match=r"example=.*fj\.welford\.init\(estimator\.observe\(params, batch\)\)"):
        fisher.init(params)


def test_the_closed_form_of_kfac_is_for_heads_outside_of_loops():
    params, batch = head_problem()
    with pytest.raises(ValueError, match="estimator='exact_head' needs"):
        fj.kfac_tools.kfac_coverage(
            recurrent, fj.categorical, params, batch, curvature=fj.Curvature(estimator="exact_head")
        )


def test_a_scale_that_is_a_product_kept_apart_has_a_diagonal():
    """As under ``vmap`` over features: a norm of penzai."""

    def model(params, x):
        scaled = jax.vmap(jnp.dot, (0, -1), -1)(params["scale"], x.transpose(1, 0, 2))
        return jnp.tanh(scaled.transpose(1, 0, 2)) @ params["head"]

    params = {"scale": draw(D), "head": draw(D, V)}
    batch = fj.Batch(draw(B, 1, D), jnp.array([[1], [4]]), jnp.array([[1.0], [0.5]]))
    squares = loop_of_grad(model, params, batch)["scale"]
    curvature = fj.Curvature(estimator="empirical")
    factors = fj.kfac_factors(model, fj.categorical, params, batch, curvature=curvature, damping=0.25)
    solved = fj.precondition(factors, jax.tree.map(jnp.ones_like, params))["scale"]
    np.testing.assert_allclose(1 / np.asarray(solved) - 0.25, squares, rtol=1e-6)
    found = fj.group_fisher(model, estimator="exact", groups="row", example=batch).observe(params, batch).mean
    np.testing.assert_allclose(found["scale"], squares, rtol=1e-9)
    table = {row[0]: row[2] for row in fj.kfac_tools.kfac_coverage(model, fj.categorical, params, batch).rows}
    assert table["['scale']"] == "diagonal"

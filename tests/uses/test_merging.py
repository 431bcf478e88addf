"""Merged models are weighted means; equal models and weights of 0 and 1 come back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj


def models(number, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"w": jnp.asarray(rng.standard_normal((4, 3)), dtype), "b": jnp.asarray(rng.standard_normal(3), dtype)}
        for _ in range(number)
    ]


def fishers(number, seed=1):
    rng = np.random.default_rng(seed)
    return [{"w": rng.lognormal(0, 3, (4, 3)), "b": rng.lognormal(0, 3, 3)} for _ in range(number)]


def by_hand(params, weights):
    """Float64, entry by entry."""
    out = {}
    for name in params[0]:
        p, f = (np.stack([np.broadcast_to(np.asarray(x[name], np.float64), params[0][name].shape) for x in xs])
                for xs in (params, weights))  # fmt: skip
        out[name] = (f * p).sum(0) / f.sum(0)
    return out


@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_merged_model_is_the_weighted_mean(number):
    params, weights = models(number), fishers(number)
    found = fj.merge_params(params, [jax.tree.map(jnp.float32, f) for f in weights])
    for name, wanted in by_hand(params, weights).items():
        np.testing.assert_allclose(found[name], wanted, rtol=2e-6, atol=1e-6)
    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), p) for p in params]
        found = fj.merge_params(wide, weights)
    for name, wanted in by_hand(params, weights).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_models_come_back_bit_for_bit(dtype):
    (params,) = models(1, dtype)
    found = fj.merge_params([params] * 4, fishers(4))
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert found["w"].dtype == dtype


@pytest.mark.parametrize("one", range(3))
def test_weights_of_zero_and_one_give_one_model(one):
    params = models(3)
    weights = [jax.tree.map(lambda x, i=i: jnp.full_like(x, i == one), p) for i, p in enumerate(params)]
    jax.tree.map(np.testing.assert_array_equal, fj.merge_params(params, weights), params[one])
    scales = [float(i == one) for i in range(3)]
    jax.tree.map(np.testing.assert_array_equal, fj.merge_params(params, fishers(3), scales=scales), params[one])


def test_models_may_come_in_any_order():
    params, weights = models(4), fishers(4)
    one, other = (fj.merge_params(params[::s], weights[::s]) for s in (1, -1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


def test_group_sums_weigh_every_parameter_of_their_group():
    params = models(2)
    rows = [{"w": f["w"].sum(1, keepdims=True), "b": f["b"]} for f in fishers(2)]
    tensors = [{"w": np.float32(f["w"].sum()), "b": f["b"].sum()} for f in fishers(2)]
    left_out = [{"w": r["w"][:, 0], "b": r["b"]} for r in rows]
    for weights, given in ((rows, rows), (rows, left_out), (tensors, tensors)):
        found = fj.merge_params(params, given)
        for name, wanted in by_hand(params, weights).items():
            np.testing.assert_allclose(found[name], wanted, rtol=2e-6, atol=1e-6)


def test_where_nothing_is_known_it_is_the_plain_mean():
    params, weights = models(2), fishers(2)
    for f in weights:
        f["w"][0] = 0
    weights[0]["w"][1] = 0
    found = fj.merge_params(params, weights)
    np.testing.assert_allclose(found["w"][0], (params[0]["w"][0] + params[1]["w"][0]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(found["w"][1], params[1]["w"][1])
    scaled = fj.merge_params(params, weights, scales=[1.0, 3.0])
    np.testing.assert_allclose(scaled["w"][0], (params[0]["w"][0] + 3 * params[1]["w"][0]) / 4, rtol=1e-6)


def test_a_floor_raises_what_is_below_it():
    params, weights = models(2), fishers(2)
    floored = [jax.tree.map(lambda x: np.maximum(x, 0.3 * x.mean()), f) for f in weights]
    found = fj.merge_params(params, weights, floor=0.3)
    for name, wanted in by_hand(params, floored).items():
        np.testing.assert_allclose(found[name], wanted, rtol=2e-6, atol=1e-6)


def test_task_vectors_are_merged_around_the_base():
    (base, *params), weights = models(4), fishers(3)
    task = by_hand([jax.tree.map(lambda p, b: np.asarray(p, float) - b, x, base) for x in params], weights)
    for scale in (1.0, -1.0, 2.5):
        found = fj.continual.merge_task_vectors(base, params, weights, scale=scale)
        for name in base:
            np.testing.assert_allclose(found[name], base[name] + scale * task[name], rtol=1e-5, atol=1e-5)
    # Equally weighted, scale 3 is plain task arithmetic of three.
    ones = [jax.tree.map(jnp.ones_like, p) for p in params]
    found = fj.continual.merge_task_vectors(base, params, ones, scale=3.0)
    np.testing.assert_allclose(found["b"], sum(p["b"] for p in params) - 2 * base["b"], rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, fj.continual.merge_task_vectors(base, [base] * 2, weights[:2]), base)


def test_it_compiles_to_the_same_and_a_negative_fisher_is_no_number_there():
    params, weights = models(2), [jax.tree.map(jnp.float32, f) for f in fishers(2)]
    found = jax.jit(fj.merge_params)(params, weights)
    eager = fj.merge_params(params, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, eager)
    weights[1]["b"] = weights[1]["b"].at[0].set(-1)
    assert np.isnan(jax.jit(fj.merge_params)(params, weights)["b"]).tolist() == [True, False, False]


def shrunk_by_hand(mean, error):
    log, relative = np.log(mean), (error / mean) ** 2
    real = max(log.var(ddof=1) - relative.mean(), 0)
    return np.exp(log.mean() + (log - log.mean()) * real / (real + relative))


def test_shrinking_is_its_formula_and_comes_nearer_to_the_truth():
    rng = np.random.default_rng(2)
    truth = rng.lognormal(0, 0.5, 400)
    values = truth * rng.gamma(0.5, 2.0, (20, 400))
    moments = fj.welford.observe({"w": jnp.float32(values)}, unit="sequence")
    found = jax.jit(fj.stats.shrunk_mean)(moments)["w"]
    mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(20)
    np.testing.assert_allclose(found, shrunk_by_hand(mean, error), rtol=1e-4)
    off = [np.mean((np.log(x) - np.log(truth)) ** 2) for x in (np.asarray(found, float), mean)]
    assert off[0] < 0.75 * off[1]


def test_what_is_certain_or_alone_is_not_shrunk():
    values = jnp.array([[1.0, 2.0, 8.0], [1.0, 2.0, 8.0]])
    np.testing.assert_array_equal(fj.stats.shrunk_mean(fj.welford.observe(values, unit="sequence")), values[0])
    alone = fj.welford.observe(jnp.array([[1.0, 0.0], [3.0, 0.0]]), unit="sequence")
    np.testing.assert_array_equal(fj.stats.shrunk_mean(alone), [2, 0])


def broken(change):
    params, weights = models(2), fishers(2)
    change(params, weights)
    return lambda: fj.merge_params(params, weights)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fj.merge_params([], []), "there is no model to merge"),
        (lambda: fj.merge_params(models(2), fishers(3)), "2 models need as many Fishers, found 3"),
        (lambda: fj.merge_params(models(2), fishers(2), scales=[1.0]), "2 models need as many scales, found 1"),
        (lambda: fj.merge_params(models(2), fishers(2), scales=[1.0, -1.0]), "scale 1 is -1.0"),
        (lambda: fj.merge_params(models(2), fishers(2), scales=[0, 0]), "all scales are zero"),
        (lambda: fj.merge_params(models(2), fishers(2), floor=-1), "floor is a share of the mean Fisher"),
        (broken(lambda p, f: p[1].pop("b")), r"model 0 and model 1 have different trees; only in model 0: \['b'\]"),
        (broken(lambda p, f: p[1].update(b=jnp.ones(4))), r"\['b'\] has shape \[3\] in model 0 and \[4\] in model 1"),
        (broken(lambda p, f: p[1].update(b=jnp.ones(3, jnp.bfloat16))), "has dtype float32 in model 0 and bfloat16"),
        (broken(lambda p, f: p[0].update(b=jnp.ones(3, int))), r"\['b'\] has dtype int32; only floating"),
        (broken(lambda p, f: f[1].update(b=-np.ones(3))), r"\['b'\] of the Fisher of model 1 has the entry -1"),
        (broken(lambda p, f: f[1].update(b=np.array([1, np.nan, 1]))), "has the entry NaN"),
        (broken(lambda p, f: f[1].update(b=np.ones(2))), r"\['b'\] has shape \[2\] in the Fisher of model 1"),
        (broken(lambda p, f: f[1].pop("w")), r"model 1 and the Fisher of model 1 have different trees"),
    ],
)
def test_models_that_cannot_be_merged_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_ratios_of_the_tiniest_fishers_are_kept(floor):
    """Below 2**-126 devices take numbers for 0 in their arithmetic; the host sees 3 : 1."""
    values = np.array([[3e-41, 3e-44, 3e-30, 1e-20, 0.0], [1e-41, 1e-44, 1e-30, 1e-41, 0.0]], np.float32)
    for leaf in (slice(0, 2), slice(2, 4), slice(3, 4), slice(4, 5)):
        fishers = [{"w": jnp.asarray(x[leaf])} for x in values]
        own = values[:, leaf].astype(np.float64)
        own = np.maximum(own, floor * own.mean(1, keepdims=True))
        own = np.where(own.sum(0) == 0, 1, own)
        params = [{"w": jnp.full(own.shape[1], float(i))} for i in range(2)]
        want = own[1] / own.sum(0)
        for merge in (fj.merge_params, jax.jit(fj.merge_params, static_argnames="floor")):
            np.testing.assert_allclose(merge(params, fishers, floor=floor)["w"], want, rtol=1e-4, atol=1e-12)


def test_a_huge_fisher_beside_a_tiny_one_is_no_infinity():
    fishers = [{"w": jnp.array([1e30, x])} for x in (1e-30, 3e-30)]
    params = [{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}]
    for floor, want in ((0.0, [0.5, 0.75]), (1e-6, [0.5, 0.5]), (1e-58, [0.5, 0.71])):
        np.testing.assert_allclose(fj.merge_params(params, fishers, floor=floor)["w"], want, atol=0.05)

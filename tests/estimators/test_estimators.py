"""Estimators of all parameters against per-token Jacobians in float64, and unbiasedness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax._support.errors import RejectedBatchError

B, S, D, K = 3, 4, 3, 5


def apply_fn(params, inputs):
    """A model whose positions mix: a running mean stands for attention."""
    x = params["embed"][inputs]
    x = x + jnp.cumsum(jnp.tanh(x @ params["mix"]["kernel"]), 1) / (1 + jnp.arange(x.shape[1]))[:, None]
    return x @ params["head"].T + params["bias"]


@functools.cache
def problem(dtype="float64"):
    rng = np.random.default_rng(0)
    shapes = {"embed": (7, D), "mix": {"kernel": (D, D)}, "head": (K, D), "bias": (K,)}
    # The first call may come from a traced function.
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        params = jax.tree.map(
            lambda s: jnp.asarray(rng.standard_normal(s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
        )
    weights = rng.integers(0, 3, (B, S)) * 0.5
    weights[1, 2:] = 0
    return params, rng.integers(0, 7, (B, S)), rng.integers(0, K, (B, S)), weights


@functools.cache
def jacobian():
    """Per-token scores of every label, ``[T, label, ...]``, the slow way, and probabilities."""
    params, inputs, _, _ = problem()

    def log_probs(params):
        log_p = jax.nn.log_softmax(apply_fn(params, inputs)).reshape(-1, K)
        return log_p, log_p

    with jax.enable_x64(True):
        scores, log_p = jax.jit(jax.jacrev(log_probs, has_aux=True))(params)
    return jax.tree.map(np.asarray, scores), np.exp(log_p)


def weighted_mean(values, weights):
    return np.tensordot(weights.ravel(), values, 1) / weights.sum()


@functools.cache
def reference():
    """``{kind: tree}`` of exact per-token means."""
    scores, p = jacobian()
    _, _, targets, weights = problem()
    tokens = np.arange(B * S)
    empirical = jax.tree.map(lambda s: weighted_mean(s[tokens, targets.ravel()] ** 2, weights), scores)
    true = jax.tree.map(lambda s: weighted_mean(np.einsum("tk,tk...->t...", p, s**2), weights), scores)
    return {"empirical": empirical, "true": true}


def batch_of(weights=True):
    _, inputs, targets, w = problem()
    return fj.Batch(jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(w) if weights else None)


def assert_close(found, wanted, rtol):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_exact_equals_the_jacobian(kind, chunk_size):
    with jax.enable_x64(True):
        fisher = fj.group_fisher(apply_fn, estimator="exact", kind=kind, chunk_size=chunk_size)
        params = problem()[0]
        state = jax.jit(fisher.update)(fisher.init(params), params, batch_of())
        fj.check(state)
        assert_close(fj.welford.mean(state), reference()[kind], 1e-12)
        assert fj.welford.count(state) == int((problem()[3] > 0).sum())
        found_error = np.asarray(fj.welford.standard_error(state)["head"])
    scores, _ = jacobian()
    if kind == "empirical":
        weights, targets = problem()[3].ravel(), problem()[2].ravel()
        f = scores["head"][np.arange(B * S), targets] ** 2
        mean, n = weighted_mean(f, problem()[3]), (weights > 0).sum()
        error = np.sqrt(n / (n - 1) * np.tensordot(weights**2, (f - mean) ** 2, 1)) / weights.sum()
        np.testing.assert_allclose(found_error, error, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"estimator": "signs"}, "empirical"),
        ({"estimator": "signs", "kind": "true"}, "true"),
        ({"estimator": "sampled", "num_samples": 2}, "true"),
    ],
)
def test_random_estimators_are_unbiased_on_every_leaf(options, kind):
    draws = 4000
    params = problem("float32")[0]
    fisher = fj.group_fisher(apply_fn, **options)

    def one(key):
        return fj.welford.mean(fisher.observe(params, batch_of(), key))

    found = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=200))(jax.random.split(jax.random.key(1), draws))
    for x, exact in zip(jax.tree.leaves(found), jax.tree.leaves(reference()[kind]), strict=True):
        x = np.asarray(x, np.float64)
        z = (x.mean(0) - exact) / (x.std(0) / np.sqrt(draws) + 1e-6 * np.abs(exact).max())
        assert np.abs(z).max() < 4.5
        assert np.sqrt((z[exact > 0] ** 2).mean()) < 1.6


def test_tempered_labels_need_their_signs():
    """Drawn from softmax(z / 2), scored at temperature 1: the mean score is not zero, and signs remove it."""
    draws, temperature = 4000, 2.0
    params = problem("float32")[0]
    scores, p = jacobian()
    q = p ** (1 / temperature) / (p ** (1 / temperature)).sum(1, keepdims=True)
    exact = weighted_mean(np.einsum("tk,tkvd->tvd", q, scores["head"] ** 2), problem()[3])
    fisher = fj.group_fisher(apply_fn, estimator="sampled", temperature=temperature)
    keys = jax.random.split(jax.random.key(2), draws)
    found = jax.jit(
        lambda keys: jax.lax.map(
            lambda k: fj.welford.mean(fisher.observe(params, batch_of(), k))["head"], keys, batch_size=200
        )
    )(keys)
    z = (np.mean(found, 0) - exact) / (np.std(found, 0) / np.sqrt(draws))
    assert np.abs(z).max() < 4.5


def test_sequence_squares_the_sum_of_a_sequence():
    with jax.enable_x64(True):
        params, _, targets, weights = problem()
        fisher = fj.group_fisher(apply_fn, estimator="sequence", chunk_size=2)
        state = jax.jit(fisher.update)(fisher.init(params), params, batch_of())
        scores, _ = jacobian()
        s = scores["mix"]["kernel"][np.arange(B * S), targets.ravel()].reshape(B, S, D, D)
        w = weights.sum(1)
        f = np.einsum("bs,bsij->bij", weights, s) ** 2 / w[:, None, None]
        np.testing.assert_allclose(
            fj.welford.mean(state)["mix"]["kernel"], np.tensordot(w, f, 1) / w.sum(), rtol=1e-12
        )
        assert fj.welford.count(state) == B


@functools.cache
def compiled(estimator):
    fisher = fj.group_fisher(apply_fn, estimator=estimator)
    return fisher, jax.jit(fisher.update)


@pytest.mark.parametrize("estimator", ["exact", "sequence"])
def test_batches_do_not_matter(estimator):
    params, inputs, targets, weights = problem("float32")
    fisher, update = compiled(estimator)
    key = jax.random.key(0)
    whole = update(fisher.init(params), params, batch_of(), key)
    split = fisher.init(params)
    for row in range(B):
        one = fj.Batch(*(jnp.asarray(x[row : row + 1]) for x in (inputs, targets, weights)))
        split = update(split, params, one, key)
    assert_close(fj.welford.mean(split), fj.welford.mean(whole), 1e-5)
    assert fj.welford.count(split) == fj.welford.count(whole)
    assert jax.tree.structure(split) == jax.tree.structure(whole)


@pytest.mark.parametrize("estimator", ["exact", "signs", "sampled", "sequence"])
def test_bad_and_empty_batches(estimator):
    params, inputs, targets, weights = problem("float32")
    (fisher, update), key = compiled(estimator), jax.random.key(0)
    good = [jnp.asarray(x) for x in (inputs, targets, weights)]
    state = update(fisher.init(params), params, fj.Batch(*good), key)

    def same(after):
        for name in ("mean", "m2", "weight", "count"):
            for x, y in zip(
                jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(state, name)), strict=True
            ):
                np.testing.assert_array_equal(x, y)

    empty = update(state, params, fj.Batch(good[0], good[1], jnp.zeros((B, S))), key)
    same(empty)
    assert int(empty.rejected) == 0
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), params)
    bad = [(broken, fj.Batch(*good), "NaN"), (params, fj.Batch(good[0], good[1], -good[2]), "negative")]
    if estimator != "sampled":
        bad.append((params, fj.Batch(good[0], good[1].at[0, 1].set(K), jnp.ones((B, S))), "target outside"))
    for p, batch, reason in bad:
        after = update(state, p, batch, key)
        same(after)
        with pytest.raises(RejectedBatchError, match=reason):
            fj.check(after)


def test_leaves_of_every_sort_are_defined():
    """Integer and None leaves have no statistic; unused and empty ones have zeros; a frozen part is left alone."""
    params = {
        "w": jnp.ones((2, K)),
        "table": jnp.arange(3),
        "none": None,
        "unused": jnp.ones(2),
        "empty": jnp.ones((0, 3)),
    }
    fisher = fj.group_fisher(lambda p, x: x @ p["w"] + p["table"][0], estimator="exact")
    state = jax.jit(fisher.update)(fisher.init(params), params, fj.Batch(jnp.ones((4, 2)), jnp.zeros(4, int)))
    found = fj.welford.mean(state)
    assert found["table"] is None
    assert found["none"] is None
    assert found["empty"].shape == (0, 3)
    np.testing.assert_array_equal(found["unused"], 0)
    assert float(found["w"].min()) > 0


def test_groups_are_sums_of_squares():
    params = problem("float32")[0]
    example = jax.eval_shape(batch_of)
    entries = fj.group_fisher(apply_fn, estimator="exact")
    per_entry = fj.welford.mean(jax.jit(entries.observe)(params, batch_of()))
    tensors = fj.group_fisher(apply_fn, estimator="exact", groups=fj.groups.tensor, example=example)
    found = fj.welford.mean(jax.jit(tensors.observe)(params, batch_of()))
    assert_close(found, jax.tree.map(np.sum, per_entry), 1e-5)
    rows = fj.group_fisher(
        apply_fn, estimator="signs", groups=lambda path, shape: lambda squares: squares.sum(-1), example=example
    )
    found = jax.eval_shape(lambda p: fj.welford.mean(rows.observe(p, batch_of(), jax.random.key(0))), params)
    assert jax.tree.map(lambda x: x.shape, found) == {
        "embed": (7,),
        "mix": {"kernel": (D,)},
        "head": (K,),
        "bias": (),
    }


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"estimator": "hutchinson"}, "estimator is one of head, exact, sequence, signs, sampled"),
        ({"kind": "joint"}, "kind is 'empirical' or 'true'"),
        ({"estimator": "sampled", "kind": "empirical"}, "kind is 'true'"),
        ({"estimator": "signs", "unit": "token"}, "observes by batch or sequence or document, not by 'token'"),
        ({"num_samples": 0}, "at least 1"),
        ({"temperature": 2.0}, "needs sampled labels"),
        ({"temperature": -1.0}, "temperature is positive"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fj.group_fisher(apply_fn, **options)


def test_missing_key_example_and_shapes_are_named():
    params, inputs, targets, _ = problem("float32")
    batch = fj.Batch(jnp.asarray(inputs), jnp.asarray(targets))
    with pytest.raises(ValueError, match="pass key="):
        fj.group_fisher(apply_fn).observe(params, batch)
    with pytest.raises(ValueError, match="'tensor' needs example="):
        fj.group_fisher(apply_fn, groups=fj.groups.tensor).init(params)
    with pytest.raises(ValueError, match=r"one value per token, shape \[3, 4\], found \[3\]"):
        fj.group_fisher(apply_fn, estimator="exact").observe(
            params, fj.Batch(batch.inputs, batch.targets, jnp.ones(3))
        )


@pytest.mark.parametrize("likelihood", [fj.categorical, fj.bernoulli, fj.gaussian], ids=lambda x: x.name)
def test_output_fisher_is_the_expected_square_of_the_score(likelihood):
    """The product against Monte Carlo over labels, the factor against the product."""
    outputs = jnp.array([0.3, -1.0, 2.0, 0.1])
    samples = jax.vmap(likelihood.sample, (0, None))(jax.random.split(jax.random.key(0), 40_000), outputs)
    scores = np.asarray(jax.vmap(jax.grad(likelihood.log_prob), (None, 0))(outputs, samples), np.float64)
    fisher = np.asarray(jax.vmap(likelihood.fisher_product, (None, 0))(outputs, jnp.eye(4)))
    second = np.einsum("ni,nj->nij", scores, scores)
    z = (second.mean(0) - fisher) / (second.std(0) / 200 + 1e-9)
    assert np.abs(z).max() < 4.5
    factor = np.stack([likelihood.fisher_factor(outputs, k) for k in range(4)], 1)
    np.testing.assert_allclose(factor @ factor.T, fisher, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_exact_keeps_variances_far_below_the_squares_of_the_means(weighted):
    """Squares that differ by a part in a thousand: sums of ``f**2`` in float32 would lose a tenth of the variance."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(3 + 1e-3 * rng.standard_normal((8, 16, 1)), jnp.float32)
    targets = jnp.zeros((8, 16), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, (8, 16)) / 2, jnp.float32) if weighted else None
    fisher = fj.group_fisher(
        lambda params, x: x @ params["w"], example=fj.Batch(x, targets, weights), groups=fj.groups.tensor,
        estimator="exact", unit="token", chunk_size=5,
    )  # fmt: skip
    moments = fisher.observe({"w": jnp.zeros((1, 4))}, fj.Batch(x, targets, weights), None)
    # p = 1/4 everywhere: |p - onehot|**2 = 9/16 + 3/16.
    f = 0.75 * np.asarray(x, np.float64).ravel() ** 2
    w = np.ones(128) if weights is None else np.asarray(weights, np.float64).ravel()
    mean, n = w @ f / w.sum(), (w > 0).sum()
    wanted = np.sqrt(n / (n - 1) * (w**2 @ (f - mean) ** 2)) / w.sum()
    np.testing.assert_allclose(fj.welford.mean(moments)["w"], mean, rtol=1e-6)
    np.testing.assert_allclose(fj.welford.standard_error(moments)["w"], wanted, rtol=2e-3)


def test_a_complex_parameter_is_refused_in_the_same_words_everywhere():
    params = {"w": jnp.zeros((2, 3)), "c": jnp.zeros(3, complex)}
    batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))

    def apply_fn(p, x):
        return x @ p["w"] + jnp.real(p["c"])

    for run in (
        lambda: fj.group_fisher(apply_fn).init(params),
        lambda: fj.group_fisher(apply_fn, estimator="sequence").observe(params, batch),
        lambda: fj.group_fisher(apply_fn, estimator="head", example=batch).init(params),
        lambda: fj.kfac_factors(apply_fn, fj.categorical, params, batch),
        lambda: fj.scale_by_kfac(apply_fn, example=batch).init(params),
        lambda: fj.operators.ggn(apply_fn, fj.categorical, params, batch),
        lambda: fj.block_spectrum(apply_fn, fj.categorical, params, batch),
        lambda: fj.merge_params([params, params], [params, params]),
    ):
        with pytest.raises(ValueError, match=r"parameter \['c'\] has dtype complex64; store its real and imaginary"):
            run()

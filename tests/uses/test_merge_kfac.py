"""Merging by Kronecker factors solves the system that dense matrices give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]


def model(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    params = {"a": {"kernel": draw(3, 4), "bias": draw(4)}, "b": draw(4, 3)}
    batch = fj.Batch(draw(12, 3) * jnp.geomspace(0.1, 3, 3), jnp.asarray(rng.integers(0, 3, 12)))
    return params, fj.kfac_factors(
        apply_fn, fj.categorical, params, batch, damping=0.01 * (seed + 1), curvature=fj.Curvature(policy="never")
    )


def dense(params, seed):
    """``A (x) G + damping`` of both layers by their definitions, on ``[kernel; bias]`` and on the head."""
    rng = np.random.default_rng(seed)
    for shape in ((3, 4), 4, (4, 3)):
        rng.standard_normal(shape)
    x, y = rng.standard_normal((12, 3)) * np.geomspace(0.1, 3, 3), rng.integers(0, 3, 12)
    kernel, bias, head = (np.asarray(z, float) for z in (params["a"]["kernel"], params["a"]["bias"], params["b"]))
    hidden = np.tanh(x @ kernel + bias)
    logits = hidden @ head
    top = np.eye(3)[y] - np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    below = (top @ head.T) * (1 - hidden**2)
    inputs = np.c_[x, np.ones(12)]
    return [
        np.kron(a.T @ a / 12, g.T @ g / 12) + 0.01 * (seed + 1) * np.eye(a.shape[1] * g.shape[1])
        for a, g in ((inputs, below), (hidden, top))
    ]


def flat(params):
    first = np.r_[np.asarray(params["a"]["kernel"], float), np.asarray(params["a"]["bias"], float)[None]]
    return [first.ravel(), np.asarray(params["b"], float).ravel()]


def test_it_solves_the_dense_system():
    scales = [0.3, 2.0, 1.1]
    with jax.enable_x64(True):
        models, factors = zip(*(model(i) for i in range(3)), strict=True)
        found = jax.jit(lambda p, f: fj.kfac_tools.merge_kfac(p, f, scales=scales, tolerance=1e-12, max_steps=200))(
            models, factors
        )
    curvatures = [[c * m for m in dense(p, i)] for i, (c, p) in enumerate(zip(scales, models, strict=True))]
    for layer, merged in enumerate(flat(found.params)):
        matrices = [c[layer] for c in curvatures]
        wanted = np.linalg.solve(
            sum(matrices), sum(m @ flat(p)[layer] for m, p in zip(matrices, models, strict=True))
        )
        np.testing.assert_allclose(merged, wanted, rtol=1e-8, atol=1e-9)
    assert 0 < float(found.residual) < 1e-11
    assert 1 < int(found.num_steps) < 200


def test_equal_models_come_back_and_equal_factors_give_the_mean():
    (params, factors), (other, _) = (model(i) for i in range(2))
    merge = jax.jit(fj.kfac_tools.merge_kfac)
    same = merge([params] * 2, [factors] * 2)
    jax.tree.map(np.testing.assert_array_equal, same.params, params)
    assert (float(same.residual), int(same.num_steps)) == (0, 0)
    mean = merge([params, other], [factors] * 2)
    jax.tree.map(lambda m, a, b: np.testing.assert_allclose(m, (a + b) / 2, atol=1e-5), mean.params, params, other)


def test_a_scale_of_zero_leaves_the_other_model_as_it_is():
    (params, factors), (other, _) = (model(i) for i in range(2))
    found = fj.kfac_tools.merge_kfac([params, other], [factors] * 2, scales=[0, 1])
    jax.tree.map(np.testing.assert_array_equal, found.params, other)
    assert (float(found.residual), int(found.num_steps)) == (0, 0)


@pytest.mark.parametrize("fisher", ["empirical", "exact_head"])
def test_a_tied_embedding_and_the_true_fisher_of_a_head_solve_their_system_too(fisher):
    def tied(params, tokens):
        return jnp.take(params["e"], tokens, axis=0) @ params["e"].T

    def made(seed):
        rng = np.random.default_rng(seed)
        params = {"e": jnp.asarray(rng.standard_normal((5, 3)))}
        batch = fj.Batch(*(jnp.asarray(rng.integers(0, 5, (2, 8)), jnp.int32) for _ in range(2)))
        key = jax.random.key(seed)
        return params, fj.kfac_factors(
            tied,
            fj.categorical,
            params,
            batch,
            damping=0.1 * (seed + 1),
            key=key,
            curvature=fj.Curvature(estimator=fisher),
        )

    with jax.enable_x64(True):
        models, factors = zip(*(made(i) for i in range(2)), strict=True)
        found = fj.kfac_tools.merge_kfac(models, factors, tolerance=1e-12)
        flat = [np.asarray(p["e"]).ravel() for p in models]
        unit = np.eye(15).reshape(15, 5, 3)
        matrices = [
            np.stack([np.asarray(fj.operators.kfac(f)({"e": jnp.asarray(u)})["e"]).ravel() for u in unit])
            + 0.1 * (i + 1) * np.eye(15)
            for i, f in enumerate(factors)
        ]
    wanted = np.linalg.solve(sum(matrices), sum(m @ p for m, p in zip(matrices, flat, strict=True)))
    np.testing.assert_allclose(np.asarray(found.params["e"]).ravel(), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p, f: fj.kfac_tools.merge_kfac([p, p], [f]), "2 models need as many factors, found 1"),
        (lambda p, f: fj.kfac_tools.merge_kfac([p], [p]), "factors 0 are those of fj.kfac_factors, found dict"),
        (lambda p, f: fj.kfac_tools.merge_kfac([p, p], [f, f], scales=[1.0, -1.0]), "scale 1 is -1.0"),
        (lambda p, f: fj.kfac_tools.merge_kfac([p], [f], max_steps=0), "max_steps is at least 1, found 0"),
        (
            lambda p, f: fj.kfac_tools.merge_kfac([p, {"b": p["b"]}], [f, f]),
            "model 0 and model 1 have different trees",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call(*model(0))

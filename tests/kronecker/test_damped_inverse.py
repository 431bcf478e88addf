"""Damped powers of a block equal the dense ones: float64 to 1e-8, float32 as the documentation says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_jax.kronecker import factors, tikhonov, woodbury
from tests import oracle_kronecker as oracle

DAMPINGS = (1e-8, 1e-3, 1e2)


def draws(seed, out, n, T, duplicated=False):
    """Inputs ``[T, in]``, output gradients ``[T, out]``, both of trace about a half, and a gradient; float64."""
    rng = np.random.default_rng(seed)
    a, g, M = rng.normal(size=(T, n)), rng.normal(size=(T, out)), rng.normal(size=(out, n))
    if duplicated:
        a[1::2], g[1::2] = a[: len(a[1::2])], g[: len(g[1::2])]
    return a / np.sqrt(2 * T * n), g / np.sqrt(2 * T * out), M


FORMS = {
    "eigen": lambda rows: factors.eigen(rows.T @ rows),
    "low_rank": lambda rows: factors.low_rank(rows.T),
    "diagonal": lambda rows: factors.diagonal((rows**2).sum(0)),
}


def form(name, rows):
    """A factor, and its dense matrix."""
    exactly = np.asarray(rows, np.longdouble) if name == "low_rank" else rows
    dense = np.diag((rows**2).sum(0)) if name == "diagonal" else exactly.T @ exactly
    return FORMS[name](jnp.asarray(rows)), dense


def relative(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


PAIRS = [
    ("eigen", "eigen"), ("eigen", "low_rank"), ("diagonal", "eigen"), ("diagonal", "low_rank"), ("low_rank", "eigen"),
    ("low_rank", "low_rank"),
]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 4, 13], ids=lambda T: f"T{T}")
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_exact_damping_is_the_dense_power(pair, tokens):
    a, g, M = draws(0, 6, 5, tokens, duplicated=tokens > 4)
    with jax.enable_x64(True):
        (A, dense_a), (G, dense_g) = form(pair[0], a), form(pair[1], g)
        F = oracle.block(dense_a, dense_g)
        apply = jax.jit(tikhonov.exact, static_argnums=4)
        for power in (-1.0, -0.5):
            for damping in DAMPINGS:
                wanted = oracle.damped_power(F, M, damping, power)
                assert relative(apply(A, G, M, damping, power), wanted) < 1e-8


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_factored_damping_is_the_dense_one(pair):
    a, g, M = draws(1, 6, 5, 4)
    with jax.enable_x64(True):
        (A, dense_a), (G, dense_g) = form(pair[0], a), form(pair[1], g)
        for power in (-1.0, -0.5):
            for damping in DAMPINGS:
                wanted = oracle.factored_power(dense_a, dense_g, M, damping, power)
                assert relative(tikhonov.factored(A, G, M, damping, power), wanted) < 1e-8


@pytest.mark.parametrize("tokens", [1, 4, 13])
def test_a_gradient_of_the_factors_own_tokens_is_pushed_through(tokens):
    a, g, _ = draws(2, 6, 5, tokens, duplicated=True)
    B = a * 0.3
    with jax.enable_x64(True):
        (A, _), (G, dense_g) = form("eigen", a), form("low_rank", g)
        exact_a = a.astype(np.longdouble)
        F = oracle.block(exact_a.T @ exact_a, dense_g)
        for power in (-1.0, -0.5):
            for damping in DAMPINGS:
                wanted = oracle.damped_power(F, g.T.astype(np.longdouble) @ B, damping, power)
                assert relative(tikhonov.push_through(A, G, B, damping, power), wanted) < 1e-8


def test_a_block_without_curvature_divides_by_the_damping():
    with jax.enable_x64(True):
        zero = np.zeros((3, 4))
        for A, G in ((factors.eigen(zero.T @ zero), factors.low_rank(zero.T)), (FORMS["eigen"](zero),) * 2):
            M = np.arange(16.0).reshape(4, 4)
            np.testing.assert_allclose(tikhonov.exact(A, G, M, 0.5, -0.5), M / np.sqrt(0.5), rtol=1e-14)
            np.testing.assert_allclose(tikhonov.factored(A, G, M, 0.5), M / 0.5, rtol=1e-14)


def test_stacked_layers_are_a_batch():
    layers = [draws(seed, 6, 5, 4) for seed in range(3)]
    with jax.enable_x64(True):
        a, g, M = (jnp.stack(parts) for parts in zip(*layers, strict=True))
        A = jax.vmap(FORMS["eigen"])(a)
        G = jax.vmap(FORMS["low_rank"])(g)
        found = jax.vmap(tikhonov.exact, (0, 0, 0, None))(A, G, M, 1e-3)
        for i, (ai, gi, Mi) in enumerate(layers):
            assert relative(found[i], oracle.damped_power(oracle.block(ai.T @ ai, gi.T @ gi), Mi, 1e-3)) < 1e-8


def test_float32_errors_are_those_of_the_documentation():
    a, g, M = (x.astype(np.float32) for x in draws(3, 14, 6, 9))
    F = oracle.block(a.T.astype(np.float64) @ a, g.T.astype(np.float64) @ g)
    top = np.linalg.eigvalsh(F.astype(np.float64)).max()
    for damping in (1e-6, 1e-3, 1e-1):
        A, G = FORMS["eigen"](a), FORMS["low_rank"](g)
        scale = 6e-8 * top / damping
        general = relative(tikhonov.exact(A, G, M, damping), oracle.damped_power(F, M, damping))
        own = relative(tikhonov.exact(A, G, g.T @ a, damping), oracle.damped_power(F, g.T @ a, damping))
        wanted = oracle.damped_power(F, g.T.astype(np.float64) @ a, damping)
        pushed = relative(tikhonov.push_through(A, G, a, damping), wanted)
        assert general < 1e-5
        assert own < 1e-5 + 4 * scale
        assert pushed < 1e-5 + scale / 20


def test_bfloat16_storage_inverts_the_rounded_factor_exactly():
    a, g, M = (x.astype(np.float32) for x in draws(4, 14, 6, 9))
    G = factors.low_rank(jnp.asarray(g.T), jnp.bfloat16)
    assert G.columns.dtype == jnp.bfloat16
    rounded = np.asarray(G.columns, np.float64)
    assert np.abs(rounded - g.T).max() <= 2.0**-8 * np.abs(g).max()
    F = oracle.block(a.T.astype(np.float64) @ a, rounded @ rounded.T)
    assert relative(tikhonov.exact(FORMS["eigen"](a), G, M, 1e-2), oracle.damped_power(F, M, 1e-2)) < 1e-5


def probabilities(seed, T, V, sharpness=2.0):
    z = np.random.default_rng(seed).normal(size=(T, V)) * sharpness
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("tokens", [1, 4, 13])
def test_the_true_fisher_of_a_softmax_head(tokens):
    a, _, M = draws(5, 7, 5, tokens)
    p, w = probabilities(5, tokens, 7), np.random.default_rng(5).uniform(0.5, 2, size=tokens)
    w[-1] *= tokens == 1
    w[0] += tokens == 1
    with jax.enable_x64(True):
        head = woodbury.softmax_head(p.T, w)
        A, dense_a = form("eigen", a)
        dense_g = oracle.softmax_fisher(p, w)
        np.testing.assert_allclose(woodbury.head_matrix(head), dense_g, atol=1e-15)
        for damping in DAMPINGS:
            wanted = oracle.damped_power(oracle.block(dense_a, dense_g), M, damping)
            assert relative(woodbury.head_exact(A, head, M, damping), wanted) < 1e-8
            wanted = oracle.factored_power(dense_a, dense_g, M, damping)
            assert relative(woodbury.head_factored(A, head, M, damping), wanted) < 1e-8


def test_the_true_fisher_of_a_softmax_head_at_small_damping_in_float32():
    # Softmax gradients sum to zero over the vocabulary, where the curvature has its null vector.
    p = probabilities(6, 20, 50).astype(np.float32)
    a, g, _ = (x.astype(np.float32) for x in draws(6, 50, 8, 20))
    M = (g - g.mean(1, keepdims=True)).T @ a
    dense_a, dense_g = a.T.astype(np.float64) @ a, oracle.softmax_fisher(p, np.ones(20))
    wanted = oracle.factored_power(dense_a, dense_g, M, 1e-10)
    found = woodbury.head_factored(FORMS["eigen"](a), woodbury.softmax_head(p.T), M, 1e-10)
    assert relative(found, wanted) < 1e-3


@pytest.mark.parametrize("kind", ["eigen", "low_rank"])
def test_an_embedding_tied_to_its_head(kind):
    a, g, M = draws(7, 9, 5, 4)
    rows = np.random.default_rng(7).uniform(size=9) * (np.arange(9) % 3 > 0)
    with jax.enable_x64(True):
        (A, dense_a), (G, dense_g) = form("eigen", a), form(kind, g)
        F = oracle.block(dense_a, dense_g) + np.kron(np.diag(rows), np.eye(5))
        for damping in DAMPINGS:
            assert relative(woodbury.tied(A, G, rows, M, damping), oracle.damped_power(F, M, damping)) < 1e-8


def test_an_embedding_tied_to_its_head_with_the_true_fisher():
    a, _, M = draws(8, 9, 5, 4)
    p, rows = probabilities(8, 4, 9), np.random.default_rng(8).uniform(size=9)
    with jax.enable_x64(True):
        A, dense_a = form("eigen", a)
        head = woodbury.softmax_head(p.T)
        F = oracle.block(dense_a, oracle.softmax_fisher(p, np.ones(4))) + np.kron(np.diag(rows), np.eye(5))
        for damping in DAMPINGS:
            wanted = oracle.damped_power(F, M, damping)
            assert relative(woodbury.tied_head(A, head, rows, M, damping), wanted) < 1e-8


def test_subsampled_columns_keep_the_second_moment_in_expectation():
    _, g, _ = draws(9, 4, 3, 23)
    g[::5] = 0  # masked tokens are never drawn
    U, keys = jnp.asarray(g.T, jnp.float32), jax.random.split(jax.random.key(0), 8000)
    drawn = jax.vmap(lambda key: factors.subsample(U, 6, jax.random.uniform(key, (6,))))(keys)
    mean = jnp.einsum("kit,kjt->ij", drawn, drawn) / len(keys)
    np.testing.assert_allclose(mean, g.T @ g, atol=0.03 * np.linalg.norm(g.T @ g))
    assert jnp.all(jnp.any(drawn != 0, axis=1))
    few = U.at[:, 5:].set(0)
    kept = factors.subsample(few, 6, jax.random.uniform(keys[0], (6,)))
    np.testing.assert_allclose(kept @ kept.T, few @ few.T, rtol=1e-6)

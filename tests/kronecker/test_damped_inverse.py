"""Damped powers of a block equal the dense ones: float64 to 1e-8, float32 as the documentation says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_jax.kronecker.factors import forms as factors
from fisher_jax.kronecker.factors import tikhonov, woodbury
from tests import oracle_kronecker as oracle

DAMPINGS = (1e-8, 1e-3, 1e2)


def draws(seed, out, n, T, duplicated=False):
    """Inputs ``[T, in]``, output gradients ``[T, out]``, both of trace about a half, and a gradient; float64."""
    rng = np.random.default_rng(seed)
    a, g, M = rng.normal(size=(T, n)), rng.normal(size=(T, out)), rng.normal(size=(out, n))
    if duplicated:
        a[1::2], g[1::2] = a[: len(a[1::2])], g[: len(g[1::2])]
    return a / np.sqrt(2 * T * n), g / np.sqrt(2 * T * out), M


array = jnp.asarray  # inside of tests, where 64 bits may be on

FORMS = {
    "eigen": lambda rows: factors.eigen(array(rows.T @ rows)),
    "low_rank": lambda rows: factors.low_rank(rows.T),
    "diagonal": lambda rows: factors.diagonal((rows**2).sum(0)),
}


def dense(name, rows):
    """The matrix of a factor."""
    exactly = np.asarray(rows, np.longdouble) if name == "low_rank" else rows
    return np.diag((rows**2).sum(0)) if name == "diagonal" else exactly.T @ exactly


def relative(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


PAIRS = [
    ("eigen", "eigen"), ("eigen", "low_rank"), ("diagonal", "eigen"), ("diagonal", "low_rank"), ("low_rank", "eigen"),
    ("low_rank", "low_rank"),
]  # fmt: skip


def each(function):
    """``function(damping)`` at all dampings, as one array."""
    return jax.vmap(function)(array(DAMPINGS))


def agree(found, wanted, tolerance=1e-8):
    """``found`` has one result for each damping; ``wanted(damping)``."""
    for damping, one in zip(DAMPINGS, found, strict=True):
        assert relative(one, wanted(damping)) < tolerance, damping


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_exact_and_factored_damping_are_the_dense_power(pair):
    # One compilation for one token, fewer than outputs and more (with duplicates); factored damping at 0.
    cases = {T: draws(0, 6, 5, T, duplicated=T > 4) for T in (1, 4, 13)}

    @jax.jit
    def run(cases):
        found = {}
        for T, (a, g, M) in cases.items():
            A, G = FORMS[pair[0]](a), FORMS[pair[1]](g)
            for power in (-1.0, -0.5):
                found[T, power] = each(lambda d, A=A, G=G, M=M, power=power: tikhonov.exact(A, G, array(M), d, power))
                if T == 4:
                    found[0, power] = each(lambda d, A=A, G=G, M=M, p=power: tikhonov.factored(A, G, array(M), d, p))
        return found

    with jax.enable_x64(True):
        found = run(cases)
    for T, (a, g, M) in cases.items():
        dense_a, dense_g = dense(pair[0], a), dense(pair[1], g)
        F = oracle.block(dense_a, dense_g)
        for power in (-1.0, -0.5):
            agree(found[T, power], lambda d, F=F, M=M, power=power: oracle.damped_power(F, M, d, power))
            if T == 4:
                wanted = lambda d, A=dense_a, G=dense_g, M=M, p=power: oracle.factored_power(A, G, M, d, p)  # noqa: E731
                agree(found[0, power], wanted)


@pytest.mark.parametrize("tokens", [1, 13])
def test_a_gradient_of_the_factors_own_tokens_is_pushed_through(tokens):
    a, g, _ = draws(2, 6, 5, tokens, duplicated=True)
    B = a * 0.3

    @jax.jit
    def run(a, g, B):
        A, G = FORMS["eigen"](a), FORMS["low_rank"](g)
        return [each(lambda d, p=power: tikhonov.push_through(A, G, B, d, p)) for power in (-1.0, -0.5)]

    with jax.enable_x64(True):
        found = run(a, g, B)
    exact_a = a.astype(np.longdouble)
    F, M = oracle.block(exact_a.T @ exact_a, dense("low_rank", g)), g.T.astype(np.longdouble) @ B
    for power, one in zip((-1.0, -0.5), found, strict=True):
        agree(one, lambda d, power=power: oracle.damped_power(F, M, d, power))


@pytest.mark.parametrize("kind", ["eigen", "low_rank"])
def test_a_block_without_curvature_divides_by_the_damping(kind):
    M = np.arange(16.0).reshape(4, 4)

    @jax.jit
    def run(zero):
        A, G = FORMS["eigen"](zero), FORMS[kind](zero)
        return tikhonov.exact(A, G, array(M), 0.5, -0.5), tikhonov.factored(A, G, array(M), 0.5)

    with jax.enable_x64(True):
        exact, factored = run(np.zeros((3, 4)))
    np.testing.assert_allclose(exact, M / np.sqrt(0.5), rtol=1e-14)
    np.testing.assert_allclose(factored, M / 0.5, rtol=1e-14)


def test_stacked_layers_are_a_batch():
    layers = [draws(seed, 6, 5, 4) for seed in range(3)]
    run = jax.jit(jax.vmap(lambda a, g, M: tikhonov.exact(FORMS["eigen"](a), FORMS["low_rank"](g), array(M), 1e-3)))
    with jax.enable_x64(True):
        found = run(*(np.stack(parts) for parts in zip(*layers, strict=True)))
    for one, (ai, gi, Mi) in zip(found, layers, strict=True):
        assert relative(one, oracle.damped_power(oracle.block(ai.T @ ai, gi.T @ gi), Mi, 1e-3)) < 1e-8


def test_float32_errors_are_those_of_the_documentation_and_bfloat16_storage_is_inverted_exactly():
    a, g, M = (x.astype(np.float32) for x in draws(3, 14, 6, 9))
    dense_a, dense_g = a.T.astype(np.float64) @ a, g.T.astype(np.float64) @ g
    F = oracle.block(dense_a, dense_g)
    top = np.linalg.eigvalsh(F.astype(np.float64)).max()
    dampings = (1e-6, 1e-3, 1e-1)

    @jax.jit
    def run(a, g, M):
        A, G, half = FORMS["eigen"](a), FORMS["low_rank"](g), factors.low_rank(g.T, jnp.bfloat16)
        own = g.T @ a

        def three(damping):
            exact = tikhonov.exact(A, G, array(M), damping), tikhonov.exact(A, G, array(own), damping)
            return *exact, tikhonov.push_through(A, G, a, damping)

        return jax.vmap(three)(array(dampings)), half.columns, tikhonov.exact(A, half, array(M), 1e-2)

    found, columns, from_half = run(a, g, M)
    for damping, general, own, pushed in zip(dampings, *found, strict=True):
        scale = 6e-8 * top / damping
        assert relative(general, oracle.damped_power(F, M, damping)) < 1e-5
        wanted = oracle.damped_power(F, g.T.astype(np.float64) @ a, damping)
        assert relative(own, wanted) < 1e-5 + 4 * scale
        assert relative(pushed, wanted) < 1e-5 + scale / 20
    assert columns.dtype == jnp.bfloat16
    rounded = np.asarray(columns, np.float64)
    assert np.abs(rounded - g.T).max() <= 2.0**-8 * np.abs(g).max()
    assert relative(from_half, oracle.damped_power(oracle.block(dense_a, rounded @ rounded.T), M, 1e-2)) < 1e-5


def probabilities(seed, T, V, sharpness=2.0):
    z = np.random.default_rng(seed).normal(size=(T, V)) * sharpness
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("tokens", [1, 13])
def test_the_true_fisher_of_a_softmax_head(tokens):
    a, _, M = draws(5, 7, 5, tokens)
    p, w = probabilities(5, tokens, 7), np.random.default_rng(5).uniform(0.5, 2, size=tokens)
    w[-1] *= tokens == 1
    w[0] += tokens == 1

    @jax.jit
    def run(a, p, w, M):
        A, head = FORMS["eigen"](a), woodbury.softmax_head(array(p.T), w)
        solved = [each(lambda d, f=f: f(A, head, M, d)) for f in (woodbury.head_exact, woodbury.head_factored)]
        return woodbury.head_matrix(head), *solved

    with jax.enable_x64(True):
        matrix, exact, factored = run(a, p, w, M)
    dense_a, dense_g = dense("eigen", a), oracle.softmax_fisher(p, w)
    np.testing.assert_allclose(matrix, dense_g, atol=1e-15)
    agree(exact, lambda d: oracle.damped_power(oracle.block(dense_a, dense_g), M, d))
    agree(factored, lambda d: oracle.factored_power(dense_a, dense_g, M, d))


def test_the_true_fisher_of_a_softmax_head_at_small_damping_in_float32():
    # Softmax gradients sum to zero over the vocabulary, where the curvature has its null vector.
    p = probabilities(6, 20, 50).astype(np.float32)
    a, g, _ = (x.astype(np.float32) for x in draws(6, 50, 8, 20))
    M = (g - g.mean(1, keepdims=True)).T @ a
    dense_a, dense_g = a.T.astype(np.float64) @ a, oracle.softmax_fisher(p, np.ones(20))
    wanted = oracle.factored_power(dense_a, dense_g, M, 1e-10)
    solve = jax.jit(
        lambda: woodbury.head_factored(FORMS["eigen"](a), woodbury.softmax_head(array(p.T)), array(M), 1e-10)
    )
    assert relative(solve(), wanted) < 1e-3


@pytest.mark.parametrize("kind", ["eigen", "low_rank", "softmax"])
def test_an_embedding_tied_to_its_head(kind):
    a, g, M = draws(7, 9, 5, 4)
    rows = np.random.default_rng(7).uniform(size=9) * (np.arange(9) % 3 > 0)
    p = probabilities(8, 4, 9)

    @jax.jit
    def run(a, g, p, rows, M):
        A = FORMS["eigen"](a)
        if kind == "softmax":
            return each(lambda d: woodbury.tied_head(A, woodbury.softmax_head(array(p.T)), rows, array(M), d))
        return each(lambda d: woodbury.tied(A, FORMS[kind](g), rows, M, d))

    with jax.enable_x64(True):
        found = run(a, g, p, rows, M)
    dense_g = oracle.softmax_fisher(p, np.ones(4)) if kind == "softmax" else dense(kind, g)
    F = oracle.block(dense("eigen", a), dense_g) + np.kron(np.diag(rows), np.eye(5))
    agree(found, lambda d: oracle.damped_power(F, M, d))


def test_subsampled_columns_keep_the_second_moment_in_expectation():
    _, g, _ = draws(9, 4, 3, 23)
    g[::5] = 0  # masked tokens are never drawn

    @jax.jit
    def run(U):
        offsets = jax.random.uniform(jax.random.key(0), (8000, 6))
        drawn = jax.vmap(lambda x: factors.subsample(U, 6, x)[0])(offsets)
        few = U.at[:, 5:].set(0)
        mean = jnp.einsum("kit,kjt->ij", drawn, drawn) / len(offsets)
        return mean, jnp.all(jnp.any(drawn != 0, axis=1)), few, factors.subsample(few, 6, offsets[0])[0]

    mean, alive, few, kept = run(array(g.T, jnp.float32))
    np.testing.assert_allclose(mean, g.T @ g, atol=0.03 * np.linalg.norm(g.T @ g))
    assert alive
    few, kept = np.asarray(few), np.asarray(kept)
    np.testing.assert_allclose(kept @ kept.T, few @ few.T, rtol=1e-6)

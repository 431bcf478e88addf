"""K-FAC's factors and per-token projections on 1,024 tokens, against rows compiled apart and summed in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from tests.oracle_loops import case


@functools.cache
def rows():
    """Of each matrix, by path: inputs and cotangents ``[layers, tokens, size]`` of rows that run alone."""
    of = case()

    def loss(params, tokens, targets):
        log_p = jax.nn.log_softmax(of.apply(params, tokens))
        return jnp.sum(jnp.take_along_axis(log_p, targets[..., None], -1))

    run = jax.jit(lambda *given: fj.capture(loss)(*given)[1])
    parts: dict = {}
    for i in range(len(of.batch.inputs)):
        for tap in run(of.params, of.batch.inputs[i : i + 1], of.batch.targets[i : i + 1]):
            layers = len(tap.cotangents) if "layers" in tap.path else 1
            inputs, cotangents = (np.asarray(x, np.float64) for x in (tap.inputs[0], tap.cotangents))
            size = 1 if tap.kind == "embedding" else inputs.shape[-1]
            own = inputs.reshape(layers, -1, size), cotangents.reshape(layers, -1, cotangents.shape[-1])
            parts.setdefault(tap.path, []).append(own)
    return {path: tuple(np.concatenate(x, 1) for x in zip(*own, strict=True)) for path, own in parts.items()}


def dense(factor, n):
    """One factor as a matrix."""
    if hasattr(factor, "columns"):
        return factor.columns[n] @ factor.columns[n].T
    vectors = factor.vectors[n] if hasattr(factor, "vectors") else np.eye(factor.values.shape[1])
    return vectors * factor.values[n] @ vectors.T


@pytest.mark.parametrize("policy", ["never", "all"])
def test_factors_and_corrected_eigenvalues_are_those_of_rows_that_run_alone(policy):
    of = case()
    batch = fj.Batch(of.batch.inputs, of.batch.targets)
    chosen = fj.Curvature(policy=policy, eigenvalue_correction=True)
    factors = jax.jit(lambda params: fj.kfac_factors(of.apply, fj.categorical, params, batch, curvature=chosen))(
        of.params
    )
    factors = jax.tree.map(lambda x: np.asarray(x, np.float64), factors)
    tokens, compared = of.batch.inputs.size, 0
    for block, kept in zip(factors.plan, factors.blocks, strict=True):
        if kept.diagonal is not None:
            continue
        assert kept.eigenvalues is not None
        inputs, cotangents = rows()[block.path]
        for n, (a, g) in enumerate(zip(inputs, cotangents, strict=True)):
            if block.path == "['embedding']":
                a = np.eye(len(of.params["embedding"]))[a[:, 0].astype(int)]
            for found, wanted in ((kept.A, a.T @ a / tokens), (kept.G, g.T @ g / tokens)):
                assert np.abs(dense(found, n) - wanted).max() < 1e-4 * np.abs(wanted).max(), block.path
            compared += 1
            if policy == "all":  # the columns hold the eigenvectors of G only up to a rotation of equal values
                continue
            bases = (x.vectors[n] if hasattr(x, "vectors") else np.eye(x.values.shape[1]) for x in (kept.G, kept.A))
            on_g, on_a = (v @ basis for v, basis in zip((g, a), bases, strict=True))
            wanted = (on_g**2).T @ on_a**2 / tokens
            assert np.abs(kept.eigenvalues[n] - wanted).max() < 1e-4 * wanted.max(), block.path
    assert compared == 9

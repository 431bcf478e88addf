"""K-FAC as an operator, and its eigenvalues: against dense Kronecker matrices, built without the library."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.kronecker.curvature import spectrum
from tests import oracle_kronecker as oracle

V, H, K, T = 5, 3, 4, 7
TOKENS, LABELS = np.array([0, 3, 3, 1, 0, 4, 3]), np.array([1, 0, 3, 2, 2, 1, 0])
WEIGHTS = np.array([1.0, 0.5, 2.0, 0.0, 1.5, 1.0, 0.7])


def model(params, tokens, shifts=None):
    """Embedding, two stacked layers with a bias, a scale, a head; tied where there is no head of its own."""
    shifts = shifts or {"embed": 0.0, "layers": jnp.zeros((2, 1, H)), "scale": 1.0}
    x = params["embed"][tokens] + shifts["embed"]

    def layer(x, w):
        kernel, bias, shift = w
        return jnp.tanh(x @ kernel + bias + shift), x

    x, inputs = jax.lax.scan(layer, x, (params["kernel"], params["bias"], shifts["layers"]))
    hidden = x * params["scale"] * shifts["scale"]
    head = params["embed"].T if "head" not in params else params["head"]
    outputs = hidden @ head
    return outputs + shifts["head"] if "head" in shifts else outputs, (inputs, hidden)


def apply_fn(params, tokens):
    return model(params, tokens)[0]


def parameters(tied):
    rng = np.random.default_rng(3)
    shapes = {"embed": (V, H), "kernel": (2, H, H), "bias": (2, H), "scale": (H,)} | (
        {} if tied else {"head": (H, K)}
    )
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def statistics(params, labels_are_expected):
    """Inputs and weighted output gradients of every use, ``[T, ...]``, by shifting what it puts out."""
    n = V if "head" not in params else K
    shapes = {"embed": (T, H), "layers": (2, T, H), "scale": (T, H), "head": (T, n)}
    zeros = {name: jnp.full(shape, name == "scale", float) for name, shape in shapes.items()}

    def total(shifts):
        outputs, kept = model(params, jnp.asarray(TOKENS), shifts)
        picked = jax.nn.log_softmax(outputs)[jnp.arange(T), LABELS]
        return jnp.sum(jnp.sqrt(WEIGHTS) * picked), (outputs, kept)

    grads, (outputs, (inputs, hidden)) = jax.grad(total, has_aux=True)(zeros)
    p = np.asarray(jax.nn.softmax(outputs))
    head = oracle.softmax_fisher(p, WEIGHTS) if labels_are_expected else None
    return jax.tree.map(np.asarray, (grads, inputs, hidden)), head


def moment(rows):
    return rows.T @ rows / WEIGHTS.sum()


def dense_blocks(params, exact_head=False, corrected=False):
    """``{path: matrix}`` of each block, on row-major ``[out, in]`` of each layer; the scale's is a diagonal."""
    with jax.enable_x64(True):
        (g, inputs, hidden), head = statistics(params, exact_head)
    head = moment(g["head"]) if head is None else head
    of_head = hidden.T @ (hidden * WEIGHTS[:, None]) / WEIGHTS.sum()
    frequency = np.bincount(TOKENS, minlength=V) / T
    layers = []
    for layer in range(2):
        a = np.c_[inputs[layer], np.ones(T)]
        A, G = a.T @ a / T, moment(g["layers"][layer])
        layers.append(_corrected(a, g["layers"][layer], A, G) if corrected else oracle.block(A, G))
    # The shift multiplies the scale: its gradient is that of the scale, times the scale.
    scale = np.diag(np.sum((g["scale"] / params["scale"]) ** 2, 0) / WEIGHTS.sum())
    blocks = {"kernel": layers, "scale": [scale]}
    if "head" in params:
        table, lookups = (np.diag(frequency), moment(g["embed"])), np.eye(V)[TOKENS]
        blocks["embed"] = [_corrected(lookups, g["embed"], *table) if corrected else oracle.block(*table)]
        blocks["head"] = [_corrected(hidden, g["head"], of_head, head) if corrected else oracle.block(of_head, head)]
    else:
        own = frequency * np.trace(moment(g["embed"])) / H
        blocks["embed"] = [oracle.block(of_head, head) + np.kron(np.diag(own), np.eye(H))]
    return {path: [np.asarray(x, np.float64) for x in found] for path, found in blocks.items()}


def _corrected(a, g, A, G):
    """EK-FAC from its definition: the diagonal of the second moment in the basis ``V (x) P``."""
    basis = np.kron(np.linalg.eigh(G)[1], np.linalg.eigh(A)[1])
    scores = np.stack([np.kron(x, y) for x, y in zip(g, a, strict=True)])
    return basis @ np.diag(np.sum((scores @ basis) ** 2, 0) / WEIGHTS.sum()) @ basis.T


def as_blocks(tree, tied):
    """A tree of tangents with a leading axis as rows, in the order of `dense_blocks`."""
    joined = jnp.concatenate([jnp.swapaxes(tree["kernel"], 2, 3), tree["bias"][..., None]], -1)
    embed = tree["embed"] if tied else jnp.swapaxes(tree["embed"], 1, 2)
    out = {"kernel": [joined[:, i] for i in range(2)], "scale": [tree["scale"]], "embed": [embed]}
    if not tied:
        out["head"] = [jnp.swapaxes(tree["head"], 1, 2)]
    return {path: [np.asarray(x).reshape(len(x), -1) for x in found] for path, found in out.items()}


@functools.cache
def factors_of(tied, **options):
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, parameters(tied))
        batch = fj.Batch(jnp.asarray(TOKENS), jnp.asarray(LABELS), jnp.asarray(WEIGHTS))
        # Labels that the oracle knows stand for those drawn from the model.
        likelihood = fj.categorical._replace(sample=lambda key, outputs, temperature: jnp.asarray(LABELS))
        key, chosen = jax.random.key(0), fj.Curvature(**options)
        run = jax.jit(lambda p: fj.kfac_factors(apply_fn, likelihood, p, batch, key=key, curvature=chosen))
        return params, batch, run(params)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {"policy": "never"}),
        (False, {"policy": "never", "eigenvalue_correction": True}),
        (False, {"policy": "all", "eigenvalue_correction": True}),
        (False, {"policy": "all", "estimator": "exact_head"}),
        (True, {"policy": "all"}),
        (True, {"policy": "all", "estimator": "exact_head"}),
    ],
    ids=str,
)
def test_products_and_eigenvalues_are_those_of_the_dense_kronecker_matrices(tied, options):
    params, _, factors = factors_of(tied, **options)
    dense = dense_blocks(
        parameters(tied), options.get("estimator") == "exact_head", options.get("eigenvalue_correction", False)
    )
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        tangents = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(40, *x.shape))), params)
        found = as_blocks(jax.jit(jax.vmap(fj.operators.kfac(factors)))(tangents), tied)
        given = as_blocks(tangents, tied)
        for path, matrices in dense.items():
            for v, w, F in zip(given[path], found[path], matrices, strict=True):
                assert np.abs(w - v @ F).max() < 1e-10 * max(np.abs(F).max(), 1) * np.abs(v).max(), path
        seen = fj.kfac_tools.kfac_spectrum(factors)
    everything = []
    for path, matrices in dense.items():
        values = np.sort(np.concatenate([np.linalg.eigvalsh(F) for F in matrices]))[::-1]
        block = seen.blocks[f"['{path}']"]
        assert block.dimension == len(values)
        np.testing.assert_allclose(block.eigenvalues, values, atol=1e-10 * values.max())
        assert abs(block.trace - values.sum()) < 1e-10 * values.sum()
        assert block.num_zero == np.sum(values < 1e-9 * values.max()), path
        everything.append(values)
    everything = np.sort(np.concatenate(everything))[::-1]
    np.testing.assert_allclose(seen.eigenvalues, everything, atol=1e-10 * everything[0])
    assert seen.dimension == len(everything) == sum(x.size for x in jax.tree.leaves(params))
    assert abs(seen.trace - everything.sum()) < 1e-10 * everything.sum()


def test_the_largest_products_are_found_without_the_others():
    rng = np.random.default_rng(0)
    for m, n, k in ((1, 9, 4), (6, 5, 30), (20, 30, 17), (4, 4, 1)):
        a, g = np.round(rng.exponential(size=m), 1), rng.exponential(size=n)
        wanted = np.sort(np.outer(a, g).ravel())[::-1][:k]
        assert np.array_equal(spectrum.largest_products(a, g, k), wanted)
    _, _, factors = factors_of(False, policy="never")
    every, few = fj.kfac_tools.kfac_spectrum(factors), fj.kfac_tools.kfac_spectrum(factors, 6)
    assert np.array_equal(few.eigenvalues, every.eigenvalues[:6])
    assert few.paths == every.paths[:6]
    assert all(len(block.eigenvalues) <= 6 for block in few.blocks.values())
    for value, path in zip(few.eigenvalues, few.paths, strict=True):
        assert value in few.blocks[path].eigenvalues


def test_blocks_without_a_closed_form_are_left_to_lanczos_beyond_a_size(monkeypatch):
    _, _, factors = factors_of(True, policy="all", estimator="exact_head")
    wanted = fj.kfac_tools.kfac_spectrum(factors, 4)
    monkeypatch.setattr(spectrum, "DENSE_LIMIT", 0)
    with pytest.raises(ValueError, match=r"'embed'.*pass key="):
        fj.kfac_tools.kfac_spectrum(factors, 4)
    with jax.enable_x64(True):
        found = fj.kfac_tools.kfac_spectrum(factors, 4, key=jax.random.key(0))
        top = fj.lanczos(
            fj.operators.kfac(factors), parameters_like(True), num_steps=30, num_eigenvalues=4, key=jax.random.key(1)
        )
    np.testing.assert_allclose(found.eigenvalues, wanted.eigenvalues, rtol=1e-9)
    np.testing.assert_allclose(top.eigenvalues, wanted.eigenvalues, rtol=1e-9)
    block = found.blocks["['embed']"]
    assert block.num_zero == -1
    assert np.all(block.residuals < 1e-8)
    assert abs(block.trace - wanted.blocks["['embed']"].trace) < 1e-10


def parameters_like(tied):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in parameters(tied).items()}


def test_a_training_state_gives_the_factors_of_its_last_refresh():
    params, batch, _ = factors_of(False, policy="never")
    params, batch = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (params, batch))
    params["step"] = jnp.array(3)
    chosen = fj.Curvature(estimator="empirical", diagonal=lambda path: "embed" in path)
    tx = fj.kfac(apply_fn, example=batch, learning_rate=0.1, damping=0.1, curvature=chosen)
    state = tx.init(params)
    with pytest.raises(ValueError, match="after the first update"):
        fj.kfac_tools.kfac_factors_from_state(state, apply_fn, fj.categorical, params, batch)
    grads = jax.tree.map(lambda x: jnp.ones_like(x) if x.ndim else np.zeros((), jax.dtypes.float0), params)
    _, state = jax.jit(lambda g, s: tx.update(g, s, params, batch=batch))(grads, state)
    factors = fj.kfac_tools.kfac_factors_from_state(state, apply_fn, fj.categorical, params, batch, curvature=chosen)
    like = fj.operators.restrict(params)
    v = jax.tree.map(jnp.cos, like)
    product = jax.jit(lambda mv, v: mv(v))(fj.operators.kfac(factors), v)
    assert product["step"] is None
    back = fj.precondition(factors, jax.tree.map(lambda w, x: w + 1e-3 * x, product, v))
    for name in v:
        if v[name] is not None:
            np.testing.assert_allclose(back[name], v[name], rtol=5e-3, atol=5e-3, err_msg=name)
    with pytest.raises(ValueError, match=r"'embed'.*curvature="):
        fj.kfac_tools.kfac_factors_from_state(state, apply_fn, fj.categorical, params, batch)
    with pytest.raises(TypeError, match="kfac_factors_from_state"):
        fj.operators.kfac(state)
    with pytest.raises(ValueError, match="found 0"):
        fj.kfac_tools.kfac_factors_from_state((), apply_fn, fj.categorical, params, batch)
    with pytest.raises(ValueError, match=r"shape \[2, 3, 3\].*found \[3, 3\]"):
        fj.operators.kfac(factors)(v | {"kernel": v["kernel"][0]})
    with pytest.raises(ValueError, match=r"4 leaves.*5"):
        fj.operators.kfac(factors)(v | {"head": None})
    for k in (0, 10_000):
        with pytest.raises(ValueError, match="between 1 and the dimension"):
            fj.kfac_tools.kfac_spectrum(factors, k)

"""EK-FAC: the diagonal of the true per-token second moment in the eigenbases, never worse than K-FAC's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.kronecker.blocks.plan import Rules
from fisher_jax.kronecker.statistics import second_moments as statistics

V, T, D, K, L, DAMPING = 5, 9, 3, 4, 2, 1e-2


def model(params, tokens):
    """An embedding, two layers in a scan, one more, a head; tokens do not mix."""
    x = params["table"][tokens]
    x, _ = jax.lax.scan(lambda x, wb: (jnp.tanh(x @ wb[0] + wb[1]), None), x, (params["w"], params["b"]))
    return jnp.tanh(x @ params["dense"]) @ params["last"]


def setting():
    rng = np.random.default_rng(0)
    shapes = {"table": (V, D), "w": (L, D, D), "b": (L, D), "dense": (D, K), "last": (K, K)}
    params, grads = ({k: rng.normal(size=s) for k, s in shapes.items()} for _ in "ab")
    weights = rng.uniform(0.5, 2, size=T) * (np.arange(T) != 4)
    return params, grads, (rng.integers(0, V, size=T), rng.integers(0, K, size=T), weights)


def scores(params, x, y):
    """``[T, out, in]`` of every matrix, by one backward pass per token."""

    def one(params, x, y):
        return jax.nn.log_softmax(model(params, x[None])[0])[y]

    found = jax.vmap(jax.grad(one), (None, 0, 0))(params, x, y)
    stacked = jnp.concatenate([found["w"], found["b"][:, :, None]], 2)
    plain = {k: found[k].swapaxes(1, 2)[None] for k in ("table", "dense", "last")}
    return {"w": jnp.moveaxis(stacked, 1, 0).swapaxes(2, 3), **plain}


def basis_of(factor, n):
    """Orthonormal eigenvectors that have curvature, and where they are among those of a factor."""
    if not hasattr(factor, "columns"):
        return factor.vectors[n] if hasattr(factor, "vectors") else np.eye(factor.values.shape[1]), slice(None)
    alive = factor.values[n] > 1e-12 * factor.values[n].max()
    return (factor.columns[n] @ factor.vectors[n] / np.sqrt(np.where(alive, factor.values[n], 1)))[:, alive], alive


def test_eigenvalues_are_the_diagonal_of_the_true_second_moment_and_never_worse():
    params, grads, (x, y, w) = setting()

    @jax.jit
    def run(params, grads, batch):
        found = {}
        for policy in ("never", "all"):
            chosen = fj.Curvature(policy=policy, eigenvalue_correction=True)
            factors = fj.kfac_factors(model, fj.categorical, params, batch, damping=DAMPING, curvature=chosen)
            found[policy] = factors, fj.precondition(factors, grads)
        return found, scores(params, batch.inputs, batch.targets)

    with jax.enable_x64(True):
        found, s = jax.device_get(
            run(jax.tree.map(jnp.asarray, params), grads, fj.Batch(*map(jnp.asarray, (x, y, w))))
        )
    matrices = {"w": [np.vstack([a, b]).T for a, b in zip(grads["w"], grads["b"], strict=True)]}
    matrices |= {k: [grads[k].T] for k in ("table", "dense", "last")}
    gains = []
    for policy, (factors, natural) in found.items():
        for block, kept in zip(factors.plan, factors.blocks, strict=True):
            name = block.path[2:-2]
            assert block.low_rank == (policy == "all")
            for n, M in enumerate(matrices[name]):
                rows = s[name][n].reshape(T, -1)
                F = (rows * w[:, None]).T @ rows / w.sum()
                (on_g, alive), (on_a, _) = basis_of(kept.G, n), basis_of(kept.A, n)
                np.testing.assert_allclose(on_g.T @ on_g, np.eye(on_g.shape[1]), atol=1e-9)
                basis = np.kron(on_g, on_a)
                values = kept.eigenvalues[n] * (kept.G.values[n][:, None] if policy == "all" else 1)
                wanted = np.diag(basis.T @ F @ basis)
                np.testing.assert_allclose(values[alive].ravel(), wanted, rtol=1e-9, atol=1e-14)
                product = np.outer(kept.G.values[n][alive], kept.A.values[n])
                ours, theirs = ((basis * v.ravel()) @ basis.T for v in (wanted, product))
                errors = np.linalg.norm(ours - F), np.linalg.norm(theirs - F)
                assert errors[0] <= errors[1]
                gains.append(errors[0] / errors[1])
                X = np.linalg.solve(ours + DAMPING * np.eye(len(F)), M.ravel()).reshape(M.shape).T
                got = natural[name][n] if name == "w" else natural[name]
                np.testing.assert_allclose(got, X[: len(got)], rtol=1e-8, atol=1e-10)
                if name == "w":
                    np.testing.assert_allclose(natural["b"][n], X[D], rtol=1e-8, atol=1e-10)
    assert min(gains) < 0.95


def test_taps_of_the_training_step_give_the_same():
    params, grads, (x, y, _) = setting()
    params, grads = (jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), t) for t in (params, grads))
    batch = fj.Batch(jnp.asarray(x), jnp.asarray(y))
    chosen = fj.Curvature(policy="never", eigenvalue_correction=lambda path: path != "['dense']")
    options = {"curvature": chosen, "damping": 0.1}
    tx = fj.scale_by_kfac(model, example=batch, kl_clip=None, **options)

    @jax.jit
    def both(params, grads):
        loss = lambda p: -jnp.mean(fj.categorical.log_prob(model(p, batch.inputs), batch.targets))  # noqa: E731
        _, _, taps = fj.value_grad_and_taps(loss)(params)
        from_taps, state = tx.update(grads, tx.init(params), params, taps=taps, taps_scale=float(T))
        return (
            from_taps,
            fj.precondition(fj.kfac_factors(model, fj.categorical, params, batch, **options), grads),
            state.blocks,
        )

    from_taps, from_batch, blocks = both(params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), from_taps, from_batch)
    assert [b.eigenvalues is None for b in blocks] == [True, False, False, False]  # dense, last, table, w


def test_the_cap_keeps_the_inputs_of_the_columns_that_it_keeps():
    rng = np.random.default_rng(1)
    U = rng.normal(size=(2, 4, 10)) * (np.arange(10) % 3 > 0)
    masks = statistics.Masks(jnp.ones(10), None, jnp.asarray([0.1, 0.9, 0.4]), 10, True)
    with jax.enable_x64(True):
        run = jax.jit(lambda U: statistics.capped({"inputs": U[:, :2], "U": U}, Rules(token_cap=3), masks))
        kept = jax.device_get(run(U))
    assert kept["U"].shape == (2, 4, 3)
    # Of the six columns that are not zero one in two, and twice its second moment.
    np.testing.assert_allclose(kept["U"][:, :2], kept["inputs"] * np.sqrt(2), rtol=1e-12)


def test_what_cannot_be_corrected_is_named_and_the_table_says_what_is():
    tied = lambda params, tokens: jnp.tanh(params["e"][tokens] @ params["w"]) @ params["e"].T  # noqa: E731
    params = {"e": jnp.ones((5, 3)), "w": jnp.ones((3, 3)), "step": jnp.zeros((), int), "no": jnp.ones(2)}
    batch = fj.Batch(jnp.zeros((2, 4), int), jnp.zeros((2, 4), int))
    with pytest.raises(ValueError, match=r"\['e'\] cannot be corrected: an embedding tied.*path != \"\['e'\]\""):
        fj.scale_by_kfac(tied, example=batch, curvature=fj.Curvature(eigenvalue_correction=True)).init(params)
    with pytest.raises(ValueError, match=r"\['h'\] cannot be corrected: estimator='exact_head'"):
        fj.kfac_tools.kfac_coverage(
            lambda p, x: p["e"][x] @ p["h"],
            fj.categorical,
            {"e": params["e"], "h": params["w"]},
            batch,
            curvature=fj.Curvature(eigenvalue_correction=True, estimator="exact_head"),
        )
    found = fj.kfac_tools.kfac_coverage(
        tied,
        fj.categorical,
        params,
        batch,
        curvature=fj.Curvature(policy="all", eigenvalue_correction=lambda path: "w" in path),
    )
    assert str(found).splitlines() == [
        "['e']     [5, 3]  A [3, 3] (x) G [5, 5] by 8 columns, tied to its use as embedding",
        "['no']    [2]     no curvature: not used by the loss",
        "['step']  []      stays: not floating",
        "['w']     [3, 3]  A [3, 3] (x) G [3, 3] by 8 columns, eigenvalues corrected",
    ]

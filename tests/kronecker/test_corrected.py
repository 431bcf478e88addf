"""EK-FAC: the diagonal of the true per-token second moment in the eigenbases, never worse than K-FAC's."""

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj

T, D, K, L, DAMPING = 9, 3, 4, 2, 1e-2


def model(params, x):
    """Two layers in a scan, one more, a head; tokens do not mix."""
    x, _ = jax.lax.scan(lambda x, wb: (jnp.tanh(x @ wb[0] + wb[1]), None), x, (params["w"], params["b"]))
    return jnp.tanh(x @ params["head"]) @ params["last"]


def setting():
    rng = np.random.default_rng(0)
    shapes = {"w": (L, D, D), "b": (L, D), "head": (D, K), "last": (K, K)}
    params, grads = ({k: rng.normal(size=s) for k, s in shapes.items()} for _ in "ab")
    weights = rng.uniform(0.5, 2, size=T) * (np.arange(T) != 4)
    return params, grads, (rng.normal(size=(T, D)), rng.integers(0, K, size=T), weights)


def scores(params, x, y):
    """``[T, out, in]`` of every matrix, by one backward pass per token."""

    def one(params, x, y):
        return jax.nn.log_softmax(model(params, x[None])[0])[y]

    found = jax.vmap(jax.grad(one), (None, 0, 0))(params, x, y)
    stacked = jnp.concatenate([found["w"], found["b"][:, :, None]], 2)
    return {
        "w": jnp.moveaxis(stacked, 1, 0).swapaxes(2, 3),
        **{k: found[k].swapaxes(1, 2)[None] for k in ("head", "last")},
    }


def test_eigenvalues_are_the_diagonal_of_the_true_second_moment_and_never_worse():
    params, grads, (x, y, w) = setting()

    @jax.jit
    def run(params, grads, batch):
        options = {"policy": "never", "damping": DAMPING, "eigenvalue_correction": True}
        factors = fj.kfac_factors(model, params, batch, **options)
        tx = fj.scale_by_kfac(model, example=batch, **options)
        from_batch, _ = tx.update(grads, tx.init(params), params, batch=batch)
        return factors, fj.precondition(factors, grads), scores(params, batch.inputs, batch.targets), from_batch

    with jax.enable_x64(True):
        factors, found, s, inside = jax.device_get(
            run(jax.tree.map(jnp.asarray, params), grads, fj.Batch(*map(jnp.asarray, (x, y, w))))
        )
    matrices = {"w": [np.vstack([a, b]).T for a, b in zip(grads["w"], grads["b"], strict=True)]}
    matrices |= {k: [grads[k].T] for k in ("head", "last")}
    gains = []
    for block, kept in zip(factors.plan, factors.blocks, strict=True):
        name = block.path[2:-2]
        for n, M in enumerate(matrices[name]):
            rows = s[name][n].reshape(T, -1)
            F = (rows * w[:, None]).T @ rows / w.sum()
            basis = np.kron(kept.G.vectors[n], kept.A.vectors[n])
            wanted = np.diag(basis.T @ F @ basis).reshape(M.shape)
            np.testing.assert_allclose(kept.eigenvalues[n], wanted, rtol=1e-9, atol=1e-14)
            product = np.outer(kept.G.values[n], kept.A.values[n])
            ours, theirs = ((basis * v.ravel()) @ basis.T for v in (kept.eigenvalues[n], product))
            errors = np.linalg.norm(ours - F), np.linalg.norm(theirs - F)
            assert errors[0] <= errors[1]
            gains.append(errors[0] / errors[1])
            X = np.linalg.solve(ours + DAMPING * np.eye(len(F)), M.ravel()).reshape(M.shape).T
            tree = found[name][n] if name == "w" else found[name]
            np.testing.assert_allclose(tree, X[:D] if name == "w" else X, rtol=1e-8, atol=1e-10)
            if name == "w":
                np.testing.assert_allclose(found["b"][n], X[D], rtol=1e-8, atol=1e-10)
    assert min(gains) < 0.95
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), inside, found)


def test_taps_of_the_training_step_give_the_same():
    params, grads, (x, y, _) = setting()
    params, grads = (jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), t) for t in (params, grads))
    batch = fj.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y))
    tx = fj.scale_by_kfac(model, example=batch, policy="never", eigenvalue_correction=True, damping=0.1)

    @jax.jit
    def both(params, grads):
        loss = lambda p: -jnp.mean(fj.categorical.log_prob(model(p, batch.inputs), batch.targets))  # noqa: E731
        _, _, taps = fj.value_grad_and_taps(loss)(params)
        state = tx.init(params)
        kwargs = {"taps": taps, "taps_scale": float(T)}
        return tx.update(grads, state, params, **kwargs)[0], tx.update(grads, state, params, batch=batch)[0]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), *both(params, grads))

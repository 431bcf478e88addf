"""K-FAC of a mixture of experts: one pair of factors for each expert, of the tokens that it is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax._tracing.program import trace
from tests.kronecker import expert_models as m

ROWS, LENGTH = 2, 4
EVERY = np.ones(ROWS * LENGTH, bool)
EXACT = fj.Curvature(policy="never")


def batch(real=None, weights=None):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(ROWS, LENGTH, m.D)))
    return fj.Batch(x, jnp.asarray(rng.integers(0, m.V, (ROWS, LENGTH))), weights=weights, real=real)


def doubles(name):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), m.parameters(name))


@functools.cache
def scores():
    """Of every token the gradient of its log-likelihood, its inputs of both kernels, and the experts it is given."""
    with jax.enable_x64(True):
        params, data = doubles("by_weights"), batch()
        inputs, targets = np.asarray(data.inputs).reshape(-1, m.D), np.asarray(data.targets).ravel()

        def loss(kernels, x, y):
            return jax.nn.log_softmax(m.by_weights(params | kernels, x[None, None])[0, 0])[y]

        grads = jax.jit(jax.grad(loss))
        kernels = {name: params[name] for name in ("up", "down")}
        found = [grads(kernels, x, y) for x, y in zip(inputs, targets, strict=True)]
        gradients = {name: np.stack([np.asarray(g[name]) for g in found]) for name in kernels}
        hidden = np.asarray(jax.nn.gelu(jnp.einsum("td,edf->etf", inputs, params["up"])))
        logits = inputs @ np.asarray(params["router"])
    given = np.argsort(np.argsort(-logits, 1), 1) < m.K
    shares = np.exp(logits) * given
    weighted = hidden * (shares / shares.sum(1, keepdims=True)).T[..., None]
    return gradients, {"up": np.stack([inputs] * m.E), "down": hidden, "weighted down": weighted}, given


def oracle(name, counts=EVERY, weighted=False):
    """``A [E, in, in]`` over the tokens that an expert is given, and that count, and ``G [E, out, out]`` over all.

    ``weighted``: the weights of the router are in the inputs of the second kernel, not in its output gradients.
    """
    gradients, inputs, given = scores()
    A, G = [], []
    for e in range(m.E):
        a, score = inputs["weighted down" if weighted and name == "down" else name][e], gradients[name][:, e]
        own = given[:, e] & counts
        assert own.sum() >= 2
        assert not score[~given[:, e]].any()
        A.append(a[own].T @ a[own] / own.sum())
        g = np.einsum("ti,tio->to", a, score) / np.maximum((a**2).sum(1, keepdims=True), 1e-300)
        G.append(g[counts].T @ g[counts] / counts.sum())
    return np.stack(A), np.stack(G)


def dense(factor):
    vectors, values = np.asarray(factor.vectors), np.asarray(factor.values)
    return np.einsum("nij,nj,nkj->nik", vectors, values, vectors)


def factors(name, data, curvature=EXACT):
    run = jax.jit(
        lambda params, data: fj.kfac_factors(m.FORMS[name], fj.categorical, params, data, curvature=curvature)
    )
    return run(doubles(name), data)


def of_kernel(found, kernel):
    """``A`` and ``G`` of every expert, of stacked or separate kernels."""
    own = [b for b, block in zip(found.blocks, found.plan, strict=True) if block.path.endswith(f"['{kernel}']")]
    return (np.concatenate([dense(getattr(b, side)) for b in own]) for side in "AG")


KEPT = [
    "by_einsum", "by_weighted_sum", "by_scan", "by_vmap", "by_loop", "by_mask", "by_leaves", "by_capacity",
    "by_gather", "by_ragged",
]  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_inputs_of_an_expert_are_those_of_its_tokens(name):
    with jax.enable_x64(True):
        found = factors(name, batch())
    for kernel in ("up", "down"):
        for side, own, wanted in zip(
            "AG", of_kernel(found, kernel), oracle(kernel, weighted=name == "by_einsum"), strict=True
        ):
            assert own.shape == wanted.shape
            np.testing.assert_allclose(own, wanted, rtol=1e-9, atol=1e-12, err_msg=f"{kernel} {side}")


def test_padding_and_unscored_tokens_are_not_among_an_expert_s():
    """What no gradient reaches is neither; a token that is no padding counts where its row is known."""
    real = np.ones((ROWS, LENGTH), bool)
    real[1, 2:] = False
    with jax.enable_x64(True):
        found = factors("by_vmap", batch(jnp.asarray(real), jnp.asarray(real, jnp.float64)))
    for kernel in ("up", "down"):
        for own, wanted in zip(of_kernel(found, kernel), oracle(kernel, real.ravel()), strict=True):
            np.testing.assert_allclose(own, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["by_scan", "by_loop"])
def test_corrected_eigenvalues_are_of_an_expert_s_own_tokens(name):
    gradients, _, given = scores()
    with jax.enable_x64(True):
        data = batch()
        found = factors(name, data, fj.Curvature(policy="never", eigenvalue_correction=lambda p: "up" in p))
        (own,) = [b for b, block in zip(found.blocks, found.plan, strict=True) if "up" in block.path]
    for e in range(m.E):
        turned = np.asarray(own.G.vectors[e]).T @ gradients["up"][:, e].swapaxes(1, 2) @ np.asarray(own.A.vectors[e])
        np.testing.assert_allclose(own.eigenvalues[e], (turned**2).mean(0), rtol=1e-9, atol=1e-14)
    assert not given.all()


def test_taps_of_the_training_step_give_the_same_factors():
    """A balancing loss beside the likelihood reads the router alone."""
    with jax.enable_x64(True):
        params, data = doubles("by_scan"), batch()

        def loss(params, data):
            logits = jax.nn.log_softmax(m.by_scan(params, data.inputs))
            scores = jnp.take_along_axis(logits, data.targets[..., None], -1)
            return -jnp.mean(scores) + 0.1 * jnp.mean(m.routed(params, data.inputs)[2] ** 2)

        transform = fj.scale_by_kfac(m.by_scan, fj.categorical, example=data, curvature=EXACT)

        def run(params, data):
            _, grads, taps = fj.value_grad_and_taps(loss)(params, data)
            state = transform.init(params)
            more = {"taps": taps, "taps_scale": float(ROWS * LENGTH)}
            return transform.update(grads, state, params, **more)[1]

        state = jax.jit(run)(params, data)
        found = fj.kfac_tools.kfac_factors_from_state(state, m.by_scan, fj.categorical, params, data, curvature=EXACT)
    for kernel in ("up", "down"):
        for own, wanted in zip(of_kernel(found, kernel), oracle(kernel), strict=True):
            np.testing.assert_allclose(own, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "what"), [("a part", "slice"), ("by_weights", "every token looks up")])
def test_what_has_no_block_for_each_expert_is_refused(name, what):
    """A slice that nobody uses would be left out."""
    params, model = m.parameters(name), m.FORMS.get(name, m.by_loop)
    if name == "a part":
        params = {k: jnp.concatenate([x, x[:1]]) if k in ("up", "down") else x for k, x in params.items()}
    with pytest.raises(ValueError, match=rf"\['(up|down)'\].*{what}.* at expert_models.py.*diagonal="):
        fj.kfac_tools.kfac_coverage(model, fj.categorical, params, batch())


def test_a_padded_dispatch_by_index_is_refused_and_its_way_out_taken():
    data = batch(jnp.ones((ROWS, LENGTH), bool))
    told = fj.Curvature(positions={f"['{kernel}']": None for kernel in ("up", "down")})
    params = m.parameters("by_gather")
    with pytest.raises(ValueError, match=r"Batch.real cannot be laid .*\['up'\] at expert_models.py.*None"):
        fj.kfac_tools.kfac_coverage(m.by_gather, fj.categorical, params, data)
    found = fj.kfac_tools.kfac_coverage(m.by_gather, fj.categorical, params, data, curvature=told)
    assert f"{m.E} of them" in str(found)


def test_kernels_that_no_router_decides_over_are_nobody_s():
    """Neither a router, nor an attention over a segment, nor a norm."""

    def attending(params, x):
        same = (x[..., :1] > 0) == jnp.swapaxes(x[..., :1] > 0, 1, 2)
        seen = jnp.where(same, jnp.einsum("bsd,btd->bst", x @ params["q"], x @ params["k"]), -1e9)
        y = jax.nn.softmax(seen) @ (x @ params["v"])
        return m.by_scan(params, y * jax.lax.rsqrt((y**2).mean(-1, keepdims=True)))

    square = jnp.eye(m.D)
    params = m.parameters("by_scan") | {"q": square, "k": square, "v": square}
    program = trace(attending, params, (batch().inputs,), lead=None)
    experts = {program.paths[spec.leaf] for spec in program.specs if spec.use.experts is not None}
    assert experts == {"['up']", "['down']"}


@pytest.mark.parametrize(
    ("name", "estimator"),
    [(name, "sequence") for name in ("by_einsum", "by_loop", "by_leaves", "by_capacity", "by_weights")]
    + [("by_ragged", "exact"), ("by_scan", "exact")],
)
def test_fisher_by_expert_is_that_of_its_kernels(name, estimator):
    gradients, _, _ = scores()
    per = 1 if estimator == "exact" else LENGTH
    with jax.enable_x64(True):
        params, data = doubles(name), batch()
        by_expert = fj.group_fisher(m.FORMS[name], estimator=estimator, groups=fj.groups.expert, example=data)
        by_expert.init(params)  # of a dispatch values say once whether rows are apart
        found = fj.welford.mean(jax.jit(by_expert.observe)(params, data))
        assert jax.tree.map(jnp.shape, by_expert.group_sizes(params)) == jax.tree.map(jnp.shape, found)
    for kernel, scores_of in gradients.items():
        summed = scores_of.reshape(-1, per, *scores_of.shape[1:]).sum(1)
        wanted = (summed**2).sum((0, 2, 3)) / (ROWS * LENGTH)
        own = np.stack([x[kernel] for x in found["experts"]]) if "experts" in found else found[kernel]
        np.testing.assert_allclose(own, wanted, rtol=1e-9)
    assert jnp.shape(found["router"]) == ()


def test_experts_are_asked_of_a_model_without_any():
    with pytest.raises(ValueError, match=r"no parameter is an expert's.*fj.groups.tensor"):
        fj.group_fisher(lambda p, x: x @ p["w"], groups=fj.groups.expert, example=batch()).init(
            {"w": jnp.ones((3, 5))}
        )


def test_saved_factors_of_experts_solve_as_they_did(tmp_path):
    params = m.parameters("by_vmap")
    found = jax.jit(lambda p, b: fj.kfac_factors(m.by_vmap, fj.categorical, p, b, curvature=EXACT))(params, single())
    fj.checkpoint.save(tmp_path / "factors", found)
    again = fj.checkpoint.restore(tmp_path / "factors")
    solved, wanted = (jax.jit(fj.precondition)(x, params) for x in (again, found))
    jax.tree.map(np.testing.assert_array_equal, solved, wanted)


def single():
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, batch())

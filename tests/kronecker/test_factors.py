"""Factors that come from taps: preconditioned trees equal dense inverses built by hand, float64 to 1e-8."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.kronecker.curvature import factors as curvature
from fisher_jax.kronecker.factors.forms import eigen, low_rank
from tests import oracle_kronecker as oracle

T, WIDTHS = 6, (3, 4, 5)


def classifier(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"]) * params["scale"]
    return hidden @ params["w2"] + params["b2"]


def classifier_params(rng):
    n, h, k = WIDTHS
    shapes = {"w1": (n, h), "b1": (h,), "scale": (h,), "w2": (h, k), "b2": (k,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def forward(params, x):
    """Inputs of both layers with a 1, the tanh, probabilities."""
    t = np.tanh(x @ params["w1"] + params["b1"])
    hidden = t * params["scale"]
    z = hidden @ params["w2"] + params["b2"]
    p = np.exp(z - z.max(1, keepdims=True))
    return np.c_[x, np.ones(len(x))], t, np.c_[hidden, np.ones(len(x))], p / p.sum(1, keepdims=True)


def expected(params, x, y, w, fisher):
    """``A`` and ``G`` of both layers and the diagonal of the scale, by the chain rule."""
    a1, t, a2, p = forward(params, x)
    F = [np.diag(pt) - np.outer(pt, pt) for pt in p]
    if fisher == "ggn":
        outputs = [w[i] * F[i] for i in range(T)]
    else:
        g = np.sqrt(w)[:, None] * (np.eye(p.shape[1])[y] - p)
        outputs = [np.outer(r, r) for r in g]
    to_pre = [(params["w2"].T * params["scale"] * (1 - t[i] ** 2)).T for i in range(T)]  # [h, k]
    to_scale = [(params["w2"].T * t[i]).T for i in range(T)]
    W = w.sum()
    G1 = sum(J @ S @ J.T for J, S in zip(to_pre, outputs, strict=True)) / W
    G2 = (sum(w[i] * F[i] for i in range(T)) if fisher == "exact_head" else sum(outputs)) / W
    scale = sum(np.diag(J @ S @ J.T) for J, S in zip(to_scale, outputs, strict=True)) / W
    return oracle.second_moment(a1, np.ones(T), T), G1, oracle.second_moment(a2, w, W), G2, scale


def damped(A, G, M, damping, form, power=-1.0):
    if form == "factored":
        return oracle.factored_power(A, G, M, damping, power)
    return oracle.damped_power(oracle.block(A, G), M, damping, power)


def relative(found, wanted):
    return np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted)


def setting(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    params, x = classifier_params(rng), rng.normal(size=(T, WIDTHS[0]))
    y, w = rng.integers(0, WIDTHS[2], size=T), rng.uniform(0.5, 2, size=T) * (np.arange(T) != 2)
    tree = classifier_params(rng)
    cast = lambda t: {k: jnp.asarray(v, dtype) for k, v in t.items()}  # noqa: E731
    return params, x, y, w, tree, cast


def check(found, tree, want, damping, form, head_form, power=-1.0, tolerance=1e-8):
    A1, G1, A2, G2, scale = want
    for kernel, bias, A, G, own in (("w1", "b1", A1, G1, form), ("w2", "b2", A2, G2, head_form)):
        M = np.vstack([tree[kernel], tree[bias]]).T
        X = damped(A, G, M, damping, own, power)
        assert relative(np.vstack([found[kernel], found[bias]]).T, X) < tolerance, (kernel, damping, form)
    assert relative(found["scale"], (scale + damping) ** power * tree["scale"]) < tolerance


FIXED = fj.categorical._replace


KINDS = ("empirical", "exact_head", "ggn")


@pytest.mark.parametrize(
    ("policy", "fisher"), [("all", "sampled"), *((p, f) for p in ("all", "never") for f in KINDS)]
)
def test_every_curvature_gives_the_dense_inverse(policy, fisher):
    params, x, y, w, tree, cast = setting()
    # Labels that the oracle knows stand for those drawn from the model.
    likelihood = fj.categorical
    if fisher in ("sampled", "exact_head"):
        likelihood = FIXED(sample=lambda key, outputs, temperature: jnp.asarray(y))
    low_rank_head = fisher == "exact_head" and policy == "all"
    cases = [(1e-4, form, -1.0) for form in ("auto", "exact", "factored")] + [(1e2, "auto", -1.0)]
    cases += [] if low_rank_head else [(1e-3, "exact", -0.5)]

    @jax.jit
    def run(params, tree):
        batch = fj.Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray(w))
        chosen = fj.Curvature(estimator=fisher, policy=policy)
        factors = fj.kfac_factors(classifier, likelihood, params, batch, key=jax.random.key(0), curvature=chosen)
        return [
            fj.precondition(curvature.Factors(factors.blocks, jnp.asarray(d), factors.plan, form, power), tree)
            for d, form, power in cases
        ]

    with jax.enable_x64(True):
        found = run(cast(params), cast(tree))
    want = expected(params, x, y, w, fisher)
    for one, (damping, form, power) in zip(found, cases, strict=True):
        head_form = "factored" if form == "auto" and low_rank_head else form
        check(one, tree, want, damping, form, head_form, power)


@pytest.mark.parametrize(("rows", "auto"), [(3, (True, True)), (4, (False, True)), (6, (False, False))])
def test_policies_keep_columns_where_they_say(rows, auto):
    # Outputs of the two layers: 4 and 5.
    params, x, y, _, _, _ = setting()
    batch = fj.Batch(jnp.asarray(x[:rows], jnp.float32), jnp.asarray(y[:rows]))
    for policy, wanted in {"auto": auto, "hybrid": (False,) * 2, "all": (True,) * 2, "never": (False,) * 2}.items():
        chosen = fj.Curvature(policy=policy)
        build = functools.partial(fj.kfac_factors, classifier, fj.categorical, batch=batch, curvature=chosen)
        factors = jax.eval_shape(build, params=cast32(params))
        dense = {b.path: b.low_rank for b in factors.plan if b.kind == "dense"}
        assert (dense["['w1']"], dense["['w2']"]) == wanted, policy


def test_float32_of_a_real_layer_agrees_between_woodbury_and_eigendecomposition():
    params, x, y, w, tree, _ = setting()
    batch = fj.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y), jnp.asarray(w, jnp.float32))
    want = expected(params, x, y, w, "empirical")
    for policy in ("all", "never"):

        @jax.jit
        def run(params, tree, policy=policy):
            factors = fj.kfac_factors(
                classifier, fj.categorical, params, batch, damping=1e-2, curvature=fj.Curvature(policy=policy)
            )
            return fj.precondition(factors, tree)

        found = run(cast32(params), cast32(tree))
        assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}
        check(found, tree, want, 1e-2, "exact", "exact", tolerance=2e-5)


def cast32(tree):
    return {k: jnp.asarray(v, jnp.float32) for k, v in tree.items()}


def linear(params, x):
    return x @ params["w"] + params["b"]


@functools.cache
def linear_step():
    """The natural gradients of a linear Gaussian model on a batch, for a stack of trees."""

    def run(params, batch, damping, trees):
        factors = fj.kfac_factors(
            linear, fj.gaussian, params, batch, damping=damping, curvature=fj.Curvature(estimator="ggn")
        )
        return jax.vmap(lambda tree: fj.precondition(factors, tree))(trees)

    return jax.jit(run)


def linear_batch():
    rng = np.random.default_rng(1)
    x, y, w = rng.normal(size=(9, 3)), rng.normal(size=(9, 2)), rng.uniform(0.1, 1, size=9)
    return rng, x, y, w


def test_a_linear_gaussian_model_has_its_exact_fisher():
    # The Fisher of a linear Gaussian model is mean(a a^T) (x) I; here from the factors' columns, over labels exactly.
    _, x, y, w = linear_batch()
    basis = {"w": np.eye(8)[:, :6].reshape(8, 3, 2), "b": np.eye(8)[:, 6:]}
    with jax.enable_x64(True):
        zero = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
        found = linear_step()(zero, fj.Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray(w)), 1e-2, basis)
    found = jax.device_get(found)
    J = np.sqrt(w / w.sum())[:, None] * np.array([linear({k: v[i] for k, v in basis.items()}, x) for i in range(8)])
    J = J.reshape(8, -1).T
    inverse = np.linalg.inv(J.T @ J + 1e-2 * np.eye(8))
    columns = np.c_[np.reshape(found["w"], (8, 6)), found["b"]]
    np.testing.assert_allclose(columns, inverse, rtol=1e-10, atol=1e-11)


def test_one_undamped_step_solves_least_squares():
    rng, x, y, w = linear_batch()
    params = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}
    residual = (w / w.sum())[:, None] * (linear(params, x) - y)
    grads = {"w": np.tile(x.T @ residual, (8, 1, 1)), "b": np.tile(residual.sum(0), (8, 1))}
    with jax.enable_x64(True):
        cast = lambda t: {k: jnp.asarray(v) for k, v in t.items()}  # noqa: E731
        batch = fj.Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray(w))
        step = jax.device_get(linear_step()(cast(params), batch, 1e-12, cast(grads)))
    root = np.sqrt(w)[:, None]
    best = np.linalg.lstsq(root * np.c_[x, np.ones(9)], root * y)[0]
    np.testing.assert_allclose(params["w"] - step["w"][0], best[:3], rtol=1e-9)
    np.testing.assert_allclose(params["b"] - step["b"][0], best[3], rtol=1e-9)


V, D, L, B, S = 7, 4, 2, 3, 5


def language_model(params, tokens, at=None):
    """Tied embedding, positions mixed by running means, two layers in a scan; ``at`` perturbs every dense output."""
    at = {} if at is None else at
    x = params["embed"][tokens] + at.get("embed", 0)

    def layer(x, parts):
        w, b, extra = parts
        mixed = jnp.cumsum(x, 1) / jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return x + jnp.tanh(mixed @ w + b + extra), mixed

    extra = at.get("layers", jnp.zeros((L, *tokens.shape, D), x.dtype))
    x, inputs = jax.lax.scan(layer, x, (params["w"], params["b"], extra))
    logits = x @ params["embed"].T + at.get("head", 0)
    return (logits, inputs, x) if at else logits


def language_setting():
    rng = np.random.default_rng(3)
    params = {"embed": rng.normal(size=(V, D)), "w": rng.normal(size=(L, D, D)), "b": rng.normal(size=(L, D))}
    tokens = rng.integers(0, V, size=(B, S + 1))
    mask = np.ones((B, S + 1), int)
    mask[1, 4:] = 0
    loss_mask = mask.copy()
    loss_mask[:, :3] = 0  # a prompt
    return params, tokens, mask, loss_mask


@functools.cache
def language_statistics():
    """``A``, ``G`` of the stacked layers, of the head, and of the embedding; by perturbations written out."""
    params, tokens, mask, loss_mask = language_setting()
    with jax.enable_x64(True):
        batch = fj.next_token_batch(jnp.asarray(tokens), mask, loss_mask)
        return statistics_of({k: jnp.asarray(v) for k, v in params.items()}, batch)


def statistics_of(params, batch):
    w = np.asarray(batch.weights, np.float64)

    def loss(at):
        logits, _, _ = language_model(params, batch.inputs, at)
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(w * jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0])

    shapes = {"embed": (B, S, D), "layers": (L, B, S, D), "head": (B, S, V)}
    at = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    g = {
        name: np.asarray(x).reshape(*x.shape[:-3], B * S, x.shape[-1])
        for name, x in jax.jit(jax.grad(loss))(at).items()
    }
    _, inputs, last = jax.jit(language_model)(params, batch.inputs, at)
    real = np.asarray(batch.real, np.float64).ravel()
    W, P = w.sum(), real.sum()
    layers = []
    for i in range(L):
        a = np.c_[np.asarray(inputs[i]).reshape(-1, D), np.ones(B * S)]
        layers.append((oracle.second_moment(a, real, P), oracle.second_moment(g["layers"][i], np.ones(B * S), W)))
    head_a = oracle.second_moment(np.asarray(last).reshape(-1, D), w.ravel(), W)
    head_g = oracle.second_moment(g["head"], np.ones(B * S), W)
    frequency = np.bincount(np.asarray(batch.inputs).ravel(), real, minlength=V) / P
    table_g = oracle.second_moment(g["embed"], np.ones(B * S), W)
    return layers, head_a, head_g, frequency, table_g


@pytest.mark.parametrize("policy", ["all", "never"])
def test_a_tied_language_model_with_stacked_layers_and_two_masks(policy):
    params, tokens, mask, loss_mask = language_setting()
    with jax.enable_x64(True):
        cast = lambda t: {k: jnp.asarray(v) for k, v in t.items()}  # noqa: E731
        batch = fj.next_token_batch(jnp.asarray(tokens), mask, loss_mask)
        tree = {k: np.random.default_rng(4).normal(size=v.shape) for k, v in params.items()}

        @jax.jit
        def run(params, tree):
            factors = fj.kfac_factors(
                language_model, fj.categorical, params, batch, damping=1e-3, curvature=fj.Curvature(policy=policy)
            )
            return factors, fj.precondition(factors, tree)

        factors, found = run(cast(params), cast(tree))
        assert [(b.kind, b.path, b.number) for b in factors.plan] == [("tied", "['embed']", 1), ("dense", "['w']", L)]
    layers, head_a, head_g, frequency, table_g = language_statistics()
    for i, (A, G) in enumerate(layers):
        M = np.vstack([tree["w"][i], tree["b"][i]]).T
        X = oracle.damped_power(oracle.block(A, G), M, 1e-3)
        assert relative(np.vstack([found["w"][i], found["b"][i]]).T, X) < 1e-8
    rows = frequency * np.trace(table_g) / D
    F = oracle.block(head_a, head_g) + np.kron(np.diag(rows), np.eye(D))
    assert relative(found["embed"], oracle.damped_power(F, tree["embed"], 1e-3)) < 1e-8


def test_an_untied_embedding_has_its_frequencies():
    params, tokens, mask, loss_mask = language_setting()
    rng = np.random.default_rng(5)
    params["head"] = rng.normal(size=(2, 2, V))  # a multi-axis kernel, [heads, dim, V]

    def model(params, tokens):
        x = language_model_body(params, tokens)
        return jnp.einsum("bshd,hdv->bsv", x.reshape(*x.shape[:2], 2, 2), params["head"])

    def language_model_body(params, tokens):
        x = params["embed"][tokens]
        mixed = jnp.cumsum(x, 1)
        return x + jnp.tanh(mixed @ params["w"][0] + params["b"][0])

    with jax.enable_x64(True):
        cast = lambda t: {k: jnp.asarray(v) for k, v in t.items()}  # noqa: E731
        batch = fj.next_token_batch(jnp.asarray(tokens), mask, loss_mask)
        slices = {**params, "w": params["w"][:1], "b": params["b"][:1]}
        tree = {k: rng.normal(size=v.shape) for k, v in slices.items()}
        results = {}
        for policy in ("all", "never"):

            @jax.jit
            def run(params, tree, policy=policy):
                factors = fj.kfac_factors(
                    model, fj.categorical, params, batch, damping=1e-3, curvature=fj.Curvature(policy=policy)
                )
                return factors, fj.precondition(factors, tree)

            factors, results[policy] = run(cast(slices), cast(tree))
        kinds = {b.path: (b.kind, b.units, b.width) for b in factors.plan}
        assert kinds["['embed']"] == ("embedding", D, V)
        assert kinds["['head']"] == ("dense", V, D)
        for name in slices:
            np.testing.assert_allclose(results["all"][name], results["never"][name], rtol=1e-8, atol=1e-10)
        _, taps = jax.jit(fj.capture(lambda p: log_likelihood(model, p, batch)))(cast(slices))
        (tap,) = [tap for tap in taps if tap.kind == "embedding"]
        g = np.asarray(tap.cotangents).reshape(-1, D)
        frequency = np.bincount(np.asarray(batch.inputs).ravel(), np.ravel(batch.real), minlength=V)
        A, G = np.diag(frequency / frequency.sum()), g.T @ g / np.sum(batch.weights)
        X = oracle.damped_power(oracle.block(A, G), tree["embed"].T, 1e-3)
        assert relative(results["all"]["embed"].T, X) < 1e-8


def log_likelihood(model, params, batch):
    return jnp.sum(batch.weights * fj.categorical.log_prob(model(params, batch.inputs), batch.targets))


def test_shared_weights_reduced_by_row():
    rng = np.random.default_rng(6)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "v": jnp.ones((4, 2))}

    def model(params, x):
        return jnp.tanh(x @ params["w"]).mean(1) @ params["v"]

    batch = fj.Batch(jnp.asarray(rng.normal(size=(5, 6, 3)), jnp.float32), jnp.array([0, 1, 1, 0, 1]))
    loss = lambda p: jnp.sum(fj.categorical.log_prob(model(p, batch.inputs), batch.targets))  # noqa: E731
    M = rng.normal(size=(3, 4))

    @jax.jit
    def run(params, tree):
        factors = fj.kfac_factors(
            model, fj.categorical, params, batch, damping=0.1, curvature=fj.Curvature(shared="reduce", policy="never")
        )
        return fj.precondition(factors, tree)["w"], fj.capture(loss)(params)[1]

    found, taps = run(params, {"w": jnp.asarray(M, jnp.float32), "v": jnp.ones((4, 2))})
    (tap,) = [tap for tap in taps if tap.path == "['w']"]
    a, g = np.asarray(tap.inputs[0]).mean(1), np.asarray(tap.cotangents).sum(1)
    assert relative(found, oracle.damped_power(oracle.block(a.T @ a / 5, g.T @ g / 5), M.T, 0.1).T) < 1e-5


def test_a_parameter_without_a_block_is_named_with_its_line_and_the_way_out():
    model = lambda params, x: jnp.sin(params["w"] * x) @ jnp.exp(params["v"])  # noqa: E731
    params = {"w": jnp.ones(3), "v": jnp.ones((3, 2))}
    batch = fj.Batch(jnp.ones((4, 3)), jnp.zeros(4, int))
    with pytest.raises(
        ValueError, match=r"K-FAC has no block for \['v'\].*exp.*test_factors.py:\d+.*multi_transform"
    ):
        fj.kfac_factors(model, fj.categorical, params, batch)

    @jax.jit
    def run(params):
        factors = fj.kfac_factors(
            model,
            fj.categorical,
            params,
            batch,
            damping=0.5,
            curvature=fj.Curvature(diagonal=lambda path: path == "['v']"),
        )
        loss = lambda p: jnp.sum(fj.categorical.log_prob(model(p, batch.inputs), batch.targets))  # noqa: E731
        return fj.precondition(factors, params)["v"], jax.grad(loss)(params)

    found, gradient = run(params)
    np.testing.assert_allclose(found, 1 / (gradient["v"] ** 2 / 4 + 0.5), rtol=1e-5)


@pytest.mark.parametrize("decompose", [eigen, jax.vmap(eigen), jax.vmap(low_rank)])
def test_stacked_layers_are_decomposed_one_after_the_other(decompose):
    # Two batches of LAPACK at once wait for each other for ever where there are two threads.
    stack = jax.random.normal(jax.random.key(0), (3, 5, 4))
    matrices = stack @ stack.swapaxes(1, 2)
    program = jax.jit(decompose).lower(matrices).as_text()
    assert "syevd" in program
    assert not re.search(r"syevd.*tensor<3x5x5", program)

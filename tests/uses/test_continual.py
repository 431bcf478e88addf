"""A penalty with the gradient of a quadratic, steps scaled and projected by Fisher, in chains and under masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_jax as fj


def problem():
    rng = np.random.default_rng(0)
    params, anchor = ({"w": rng.standard_normal((4, 3)), "b": rng.standard_normal(3)} for _ in range(2))
    return params, anchor, {"w": rng.lognormal(0, 2, (4, 3)), "b": rng.lognormal(0, 2, 3)}


def test_the_penalty_and_its_gradient_are_the_quadratics():
    params, anchor, fisher = problem()
    with jax.enable_x64(True):
        value, grads = jax.jit(jax.value_and_grad(fj.ewc_penalty))(params, anchor, fisher, strength=2.5)
    wanted = sum(0.5 * 2.5 * np.sum(fisher[k] * (params[k] - anchor[k]) ** 2) for k in params)
    np.testing.assert_allclose(value, wanted, rtol=1e-14)
    for k in params:
        np.testing.assert_allclose(grads[k], 2.5 * fisher[k] * (params[k] - anchor[k]), rtol=1e-13)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), jax.grad(fj.ewc_penalty)(params, params, fisher))


def test_it_is_the_growth_of_the_former_loss():
    """Of linear regression, whose Hessian is its Fisher matrix; inputs are one-hot, so that it is diagonal."""
    inputs, kernel = np.eye(4)[[0, 1, 1, 2, 3, 3, 3]], jnp.arange(8.0).reshape(4, 2)

    def loss(w):
        return -fj.gaussian.log_prob(jnp.asarray(inputs) @ w, jnp.asarray(inputs) @ kernel).mean()

    fisher = np.broadcast_to(inputs.sum(0)[:, None] / 7, (4, 2))
    other = kernel + jnp.asarray(np.random.default_rng(1).standard_normal((4, 2)), jnp.float32)
    np.testing.assert_allclose(fj.ewc_penalty(other, kernel, fisher), loss(other) - loss(kernel), rtol=1e-5)


def test_group_sums_are_spread_evenly():
    params, anchor, fisher = problem()
    rows = {"w": fisher["w"].sum(0), "b": np.float32(fisher["b"].sum())}
    spread = {"w": np.broadcast_to(rows["w"] / 4, (4, 3)), "b": np.full(3, rows["b"] / 3)}
    wanted = fj.ewc_penalty(params, anchor, spread)
    np.testing.assert_allclose(fj.ewc_penalty(params, anchor, rows), wanted, rtol=1e-6)
    moments = fj.welford.observe(jax.tree.map(lambda x: jnp.stack([jnp.float32(x)] * 2), rows))
    np.testing.assert_allclose(fj.ewc_penalty(params, anchor, moments), wanted, rtol=1e-6)


def test_half_precision_parameters_are_penalised_in_float32():
    params = jnp.full(3, 1 + 2**-7, jnp.bfloat16)
    found = fj.ewc_penalty(params, jnp.ones(3, jnp.bfloat16), jnp.full(3, 1e-6))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1.5e-6 * 2.0**-14, rtol=1e-6)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_updates_are_scaled_by_the_fisher(power):
    params, grads, fisher = problem()
    tx = fj.continual.scale_by_fisher(fisher, damping=0.1, power=power)
    state = tx.init(params)
    found, after = jax.jit(tx.update)(jax.tree.map(jnp.float32, grads), state)
    for k in params:
        np.testing.assert_allclose(found[k], grads[k] * (0.1 / (fisher[k] + 0.1)) ** power, rtol=1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_half_precision_updates_keep_their_dtype():
    tx = fj.continual.scale_by_fisher(jnp.array([0.0, 3.0]), damping=1.0)
    found, _ = tx.update(jnp.ones(2, jnp.bfloat16), tx.init(jnp.ones(2, jnp.bfloat16)))
    assert found.dtype == jnp.bfloat16
    assert found.tolist() == [1, 0.25]


def test_they_work_in_chains_and_on_parts_of_the_tree():
    params, grads, fisher = (jax.tree.map(jnp.float32, x) for x in problem())
    labels = {"w": "protected", "b": "free"}
    chains = {
        "protected": optax.chain(
            fj.continual.scale_by_fisher(fisher, damping=1.0), fj.continual.protect_important(fisher, 0.25)
        ),
        "free": optax.identity(),
    }
    tx = optax.chain(optax.multi_transform(chains, labels), optax.scale(-0.1))
    found, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(found["b"], -0.1 * grads["b"], rtol=1e-6)
    scaled = -0.1 * grads["w"] / (fisher["w"] + 1)
    top = fisher["w"] >= np.sort(fisher["w"].ravel())[-3]
    np.testing.assert_allclose(found["w"], np.where(top, 0, scaled), rtol=1e-5)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_projection_zeroes_the_most_important_and_nothing_else(scope):
    tree, _, fisher = problem()
    found = fj.continual.project_away(tree, fisher, 1 / 3, scope=scope)
    everything = np.concatenate([x.ravel() for x in fisher.values()])
    for k, f in fisher.items():
        pool = everything if scope == "global" else f.ravel()
        top = f >= np.sort(pool)[-pool.size // 3]
        np.testing.assert_array_equal(found[k], np.where(top, 0, np.float32(tree[k])))
    again = fj.continual.project_away(found, fisher, 1 / 3, scope=scope)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    jax.tree.map(
        np.testing.assert_array_equal, fj.continual.project_away(tree, fisher, 0.0), jax.tree.map(np.float32, tree)
    )


def test_whole_groups_are_protected_together():
    tree = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    found = fj.continual.project_away(tree, {"w": jnp.array([1.0, 8.0, 2.0]), "b": jnp.array(0.3)}, 0.25)
    np.testing.assert_array_equal(found["w"], np.broadcast_to([1, 0, 1], (4, 3)))
    np.testing.assert_array_equal(found["b"], 1)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p, f: fj.ewc_penalty(p, {"w": p["w"]}, f), r"only in the parameters: \['b'\]"),
        (lambda p, f: fj.ewc_penalty(p, p | {"b": jnp.ones(2)}, f), r"\['b'\] has shape \[3\] in the parameters and"),
        (lambda p, f: fj.ewc_penalty(p, p, f | {"b": -f["b"]}), r"\['b'\] of the Fisher has the entry -"),
        (
            lambda p, f: fj.continual.scale_by_fisher(f, damping=0),
            "damping is positive, in units of the Fisher, found 0",
        ),
        (lambda p, f: fj.continual.scale_by_fisher(f, damping=1, power=-1), "power is not negative, found -1"),
        (lambda p, f: fj.continual.scale_by_fisher(f, damping=1).init({"w": p["w"]}), r"only in the Fisher: \['b'\]"),
        (
            lambda p, f: fj.continual.project_away(p, f, 1.5),
            r"fraction is the share to protect, a static number in \[0, 1\]",
        ),
        (lambda p, f: fj.continual.protect_important(f, 0.5).init({"w": p["w"]}), r"only in the Fisher: \['b'\]"),
    ],
)
def test_bad_input_is_one_sentence_that_names_it(call, sentence):
    params, _, fisher = problem()
    with pytest.raises(ValueError, match=sentence):
        call(params, fisher)

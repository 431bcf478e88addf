"""The diagonal of a scale or a bias: squares of a token's whole gradient, whatever else it is broadcast along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

ROWS, LENGTH, HEADS, SIZE, K = 3, 4, 2, 3, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, LENGTH, HEADS * SIZE))
WEIGHTS = np.array([[1.0, 0.5, 2.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0]])
BATCH = fj.Batch(jnp.asarray(X, jnp.float32), jnp.asarray(RNG.integers(0, K, (ROWS, LENGTH))), jnp.asarray(WEIGHTS))


def heads(x):
    return x.reshape(*x.shape[:-1], HEADS, SIZE)


def joined(x):
    return x.reshape(*x.shape[:-2], HEADS * SIZE)


def recurrent(p, x):
    """Each position by itself in a loop."""

    def step(carry, position):
        return carry, joined(jnp.tanh(heads(position) * p["a"]))

    return jnp.swapaxes(jax.lax.scan(step, 0.0, jnp.swapaxes(x, 0, 1))[1], 0, 1)


# What the head meets, and the shape of the parameter ``a``.
MODELS = {
    "scalar": (lambda p, x: x * p["a"], ()),
    "scalar bias": (lambda p, x: jnp.tanh(x + p["a"]), ()),
    "one number": (lambda p, x: jnp.tanh(x * p["a"]), (1,)),
    "ReZero": (lambda p, x: x + p["a"] * jnp.tanh(x), ()),
    "PReLU": (lambda p, x: jnp.where(x > 0, x, p["a"] * x), ()),
    "a scale of every head": (lambda p, x: joined(jnp.tanh(heads(x) * p["a"])), (SIZE,)),
    "a bias of every head": (lambda p, x: joined(jnp.tanh(heads(x) + p["a"])), (SIZE,)),
    "one scale a head": (lambda p, x: joined(jnp.tanh(heads(x) * p["a"])), (HEADS, 1)),
    "folded rows": (
        lambda p, x: joined(jnp.tanh(heads(x.reshape(-1, HEADS * SIZE)) * p["a"])).reshape(x.shape), (SIZE,)
    ),
    "heads before positions": (
        lambda p, x: joined(jnp.moveaxis(jnp.tanh(jnp.moveaxis(heads(x), 2, 1) * p["a"]), 1, 2)), (SIZE,)
    ),
    "flipped positions": (lambda p, x: joined(jnp.tanh(heads(x[:, ::-1]) * p["a"]))[:, ::-1], (SIZE,)),
    "loop over positions": (recurrent, (SIZE,)),
    "a plain scale": (lambda p, x: jnp.tanh(x * p["a"]), (HEADS * SIZE,)),
}  # fmt: skip


def model_of(name):
    hidden, shape = MODELS[name]
    params = {"a": RNG.normal(size=shape), "o": RNG.normal(size=(HEADS * SIZE, K))}
    return lambda p, x: hidden(p, x) @ p["o"], jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def squares(apply_fn, params):
    """``sum_t w_t s_t**2 / sum_t w_t`` of ``a`` by a loop in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        x, targets = jnp.asarray(BATCH.inputs, jnp.float64), np.asarray(BATCH.targets)

        def log_prob(a, b, s):
            return jax.nn.log_softmax(apply_fn({**wide, "a": a}, x))[b, s, targets[b, s]]

        found = sum(
            WEIGHTS[b, s] * np.square(np.asarray(jax.grad(log_prob)(wide["a"], b, s)))
            for b, s in np.ndindex(ROWS, LENGTH)
        )
    return found / WEIGHTS.sum()


def diagonal(apply_fn, params, damping=1e-3, **curvature):
    """Of ``a``, out of the inverse."""
    options = fj.Curvature(**curvature)
    factors = fj.kfac_factors(apply_fn, fj.categorical, params, BATCH, damping=damping, curvature=options)
    return 1 / np.asarray(fj.precondition(factors, jax.tree.map(jnp.ones_like, params))["a"]) - damping


@pytest.mark.parametrize("name", MODELS)
def test_a_tokens_gradient_is_summed_before_it_is_squared(name):
    apply_fn, params = model_of(name)
    np.testing.assert_allclose(diagonal(apply_fn, params), squares(apply_fn, params), rtol=2e-4)


def test_where_positions_are_lost_the_user_says_which_axes_they_are():
    """A sort by data; of heads and positions one is summed first."""
    order = jnp.argsort(jnp.argsort(BATCH.inputs[..., 0], 1), 1)

    def apply_fn(p, x):
        places = jnp.argsort(x[..., 0], 1)[..., None]
        mixed = jnp.tanh(heads(jnp.take_along_axis(x, places, 1)) * p["a"])
        return jnp.take_along_axis(joined(mixed), order[..., None], 1) @ p["o"]

    _, params = model_of("a scale of every head")
    options = {"diagonal": lambda path: "o" in path}
    with pytest.raises(ValueError, match=r"\['a'\].* axes \[0, 1, 2\] .*positions=\{\"\['a'\]\": axes\}"):
        diagonal(apply_fn, params, **options)
    found = diagonal(apply_fn, params, positions={"['a']": (0, 1)}, **options)
    np.testing.assert_allclose(found, squares(apply_fn, params), rtol=2e-4)
    with pytest.raises(ValueError, match=r"tokens lie along axes 0, 1, 2 .* not along axes 0, 3"):
        diagonal(apply_fn, params, positions={"['a']": (0, 3)}, **options)


def to_slots(p, x):
    """Two experts, whose tokens a dispatch that reads the data brings to slots: positions are summed away."""
    gate = jnp.argmax(0 * x[..., :2] + jax.nn.one_hot(jnp.arange(LENGTH) % 2, 2), -1)
    chosen = jax.nn.one_hot(gate, 2)
    slot = jnp.sum((jnp.cumsum(chosen, 1) - 1) * chosen, -1).astype(int)
    dispatch = chosen[..., None] * jax.nn.one_hot(slot, LENGTH)[:, :, None]
    hidden = jnp.tanh(jnp.einsum("btec,btd->becd", dispatch, x) + p["a"][:, None])
    return jnp.einsum("btec,becd->btd", dispatch, hidden)


def test_a_bias_in_slots_of_experts_asks_for_its_tokens_and_takes_them():
    def in_slots(p, x):
        return to_slots(p, x) @ p["o"]

    def in_place(p, x):
        return jnp.tanh(x + p["a"][jnp.arange(LENGTH) % 2]) @ p["o"]

    shapes = {"a": (2, HEADS * SIZE), "o": (HEADS * SIZE, K)}
    params = {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    options = {"estimator": "empirical", "policy": "never"}
    with pytest.raises(ValueError, match=r"\['a'\].*slots.*positions="):
        fj.kfac_factors(in_slots, fj.categorical, params, BATCH, curvature=fj.Curvature(**options))
    told = fj.Curvature(**options, positions={"['a']": (0, 2)})
    factors = fj.kfac_factors(in_slots, fj.categorical, params, BATCH, curvature=told)
    ones = jax.tree.map(jnp.ones_like, params)
    found = fj.operators.kfac(factors)(ones)["a"]
    exact = fj.group_fisher(in_place, estimator="exact", example=BATCH)
    np.testing.assert_allclose(found, fj.mean(exact.observe(params, BATCH))["a"], rtol=1e-5)

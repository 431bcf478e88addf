"""The estimator ``head``, and taps of a training step in place of a pass of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_jax as fj
from fisher_jax.errors import RejectedBatchError

B, S, V, D, L = 3, 4, 11, 5, 2


def block(x, p):
    h = x * p["scale"]
    return x + jnp.tanh(h @ p["up"] + p["bias"]) @ p["down"].T, None


def apply_fn(params, inputs):
    x = jnp.take(params["embed"], inputs, axis=0)
    x = x + jnp.cumsum(jnp.tanh(x @ params["mix"]), 1)
    x, _ = jax.lax.scan(block, x, params["layers"])
    return x @ params["head"] + params["head_bias"]


SHAPES = {
    "embed": (V, D), "mix": (D, D), "head": (D, V), "head_bias": (V,),
    "layers": {"scale": (L, D), "up": (L, D, 7), "bias": (L, 7), "down": (L, D, 7)},
}  # fmt: skip


def problem(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s) * 0.6, dtype), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
    )
    inputs, targets = jnp.asarray(rng.integers(0, V, (B, S))), jnp.asarray(rng.integers(0, V, (B, S)))
    weights = jnp.asarray([[1.0, 0.5, 1, 1], [1, 2, 0, 0], [1, 1, 1, 1]], dtype)
    return params, fj.Batch(inputs, targets, weights, units=jnp.array([3, 3, 4]))


def mean_loss(params, batch):
    """What a training step differentiates."""
    log_p = jax.nn.log_softmax(apply_fn(params, batch.inputs))
    picked = jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    return -jnp.sum(batch.weights * picked) / batch.weights.sum()


def assert_close(found, wanted, rtol=1e-10):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize("group", ["param", "row", "column", "tensor"])
def test_head_equals_the_exact_estimator_at_its_leaf(group, kind):
    with jax.enable_x64(True):
        params, batch = problem()
        options = {"kind": kind, "example": batch}
        fisher = fj.group_fisher(apply_fn, estimator="head", groups=group, unit="token", **options)
        state = jax.jit(fisher.update)(fisher.init(params), params, batch)
        found = fj.welford.mean(state)
        assert {name for name, x in found.items() if jax.tree.leaves(x)} == {"head"}
        exact = fj.group_fisher(apply_fn, estimator="exact", groups=group, **options)
        wanted = exact.observe(params, batch)
        np.testing.assert_allclose(found["head"], fj.welford.mean(wanted)["head"], rtol=1e-10)
        np.testing.assert_allclose(
            fj.welford.standard_error(state)["head"], fj.welford.standard_error(wanted)["head"], rtol=1e-7
        )
        assert fisher.group_sizes(params)["head"].sum() == params["head"].size


def capped(params, inputs):
    x = jnp.tanh(params["embed"][inputs]).astype(jnp.float32)
    logits = (x.reshape(-1, D) @ params["head"].T.astype(jnp.float32)).reshape(*inputs.shape, V)
    return (3 * jnp.tanh(logits / 3)).astype(jnp.float64)


def test_head_behind_casts_reshapes_a_transpose_and_a_soft_cap():
    with jax.enable_x64(True):
        _, batch = problem()
        params = {"embed": problem()[0]["embed"], "head": problem()[0]["embed"] * 3}
        options = {"groups": "row", "example": batch}
        found = fj.group_fisher(capped, estimator="head", **options).observe(params, batch)
        wanted = fj.group_fisher(capped, estimator="exact", unit="sequence", **options).observe(params, batch)
        assert_close(fj.welford.mean(found)["head"], fj.welford.mean(wanted)["head"], 1e-5)
        with pytest.raises(ValueError, match=r"follows the outputs back .* use fj\.lm_head\.estimator"):
            fj.group_fisher(lambda p, x: jnp.exp(capped(p, x)), estimator="head", **options).init(params)


@pytest.mark.parametrize("unit", ["sequence", "document"])
@pytest.mark.parametrize("group", ["param", "row", "column", "tensor"])
@pytest.mark.parametrize("estimator", ["head", "sequence"])
def test_taps_of_the_training_loss_give_what_a_pass_of_its_own_gives(estimator, group, unit):
    with jax.enable_x64(True):
        params, batch = problem()
        fisher = fj.group_fisher(apply_fn, estimator=estimator, groups=group, unit=unit, example=batch)

        @jax.jit
        def both(params, batch):
            _, grads, taps = fj.value_grad_and_taps(mean_loss)(params, batch)
            given = fisher.observe(params, batch, taps=taps, taps_scale=batch.weights.sum())
            return grads, given, fisher.observe(params, batch)

        _, given, own = both(params, batch)
        state, wanted = (fj.welford.add(fisher.init(params), m) for m in (given, own))
        assert_close(fj.welford.mean(state), fj.welford.mean(wanted))
        assert_close(fj.welford.standard_error(state), fj.welford.standard_error(wanted), 1e-7)
        assert fj.welford.count(state) == fj.welford.count(wanted) == (3 if unit == "sequence" else 2)


def test_tracking_from_taps_in_a_chain():
    params, batch = problem(jnp.float32)
    fisher = fj.group_fisher(apply_fn, estimator="sequence", groups="row", example=batch)
    tx = optax.chain(fj.track_fisher(fj.ema(fisher, 0.5)), fj.track_fisher(fisher), optax.sgd(0.1))

    @jax.jit
    def step(params, opt_state):
        _, grads, taps = fj.value_grad_and_taps(mean_loss)(params, batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, batch=batch, taps=taps, taps_scale=batch.weights.sum()
        )
        return optax.apply_updates(params, updates), opt_state

    moved, opt_state = step(params, tx.init(params))
    wanted = fisher.update(fisher.init(params), params, batch)
    assert_close(fj.welford.mean(opt_state[1]), fj.welford.mean(wanted), 1e-4)
    assert_close(fj.moving_average.mean(opt_state[0].fisher), fj.welford.mean(wanted), 1e-4)
    assert fj.welford.count(step(moved, opt_state)[1][1].fisher) == 2 * B


def test_taps_that_cannot_serve_are_refused():
    params, batch = problem(jnp.float32)
    _, _, taps = fj.value_grad_and_taps(mean_loss)(params, batch)
    for estimator in ("signs", "sampled", "exact"):
        fisher = fj.group_fisher(apply_fn, estimator=estimator)
        with pytest.raises(ValueError, match="takes no taps of another; only head and sequence do"):
            fisher.observe(params, batch, jax.random.key(0), taps=taps)
    sequence = fj.group_fisher(apply_fn, estimator="sequence")
    head = fj.group_fisher(apply_fn, estimator="head", example=batch)
    _, reduced = fj.capture(mean_loss, reduce=lambda inputs, cotangents: cotangents.sum())(params, batch)
    for fisher in (sequence, head):
        with pytest.raises(ValueError, match="reduced"):
            fisher.observe(params, batch, taps=reduced)
    with pytest.raises(ValueError, match="not 2 rows of the batch"):
        sequence.observe(params, jax.tree.map(lambda x: x[:2], batch), taps=taps)
    with pytest.raises(ValueError, match="the taps are of 12 tokens and the batch has 8"):
        head.observe(params, jax.tree.map(lambda x: x[:2], batch), taps=taps)
    with pytest.raises(ValueError, match=r"the head \['head'\] needs one tap .* found 0 uses"):
        head.observe(params, batch, taps=[t for t in taps if "head" not in t.path])

    def by_time(params, inputs):
        x = params["embed"][inputs.T]
        return jnp.swapaxes(x @ params["head"], 0, 1)

    def loss(params, batch):
        return jnp.sum(by_time(params, batch.inputs))

    _, _, taps = fj.value_grad_and_taps(loss)(params, batch)
    square = fj.Batch(batch.inputs[:, :B], batch.targets[:, :B])
    with pytest.raises(ValueError, match="rows of the batch are not the first tokens"):
        fj.group_fisher(by_time, estimator="sequence").observe(
            params, square, taps=fj.value_grad_and_taps(loss)(params, square)[2]
        )
    weighty = jax.tree.map(lambda x: x, batch)
    broken = jax.tree.map(lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
    _, _, bad = fj.value_grad_and_taps(mean_loss)(broken, weighty)
    for fisher in (sequence, head):
        with pytest.raises(RejectedBatchError, match="NaN"):
            fj.check(fj.welford.add(fisher.init(params), fisher.observe(params, batch, taps=bad)))

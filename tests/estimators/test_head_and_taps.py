"""The estimator ``head``, and taps of a training step in place of a pass of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_jax as fj
from fisher_jax._support.errors import RejectedBatchError

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


@functools.cache
def exact_head(kind):
    """Every entry of the head, from per-token gradients of the head alone."""
    params, batch = problem()
    head = {name: params[name] for name in ("head", "head_bias")}
    fisher = fj.group_fisher(lambda p, x: apply_fn(params | p, x), estimator="exact", kind=kind, chunk_size=64)
    moments = jax.jit(fisher.observe)(head, batch)
    return fj.welford.mean(moments)["head"], fj.welford.standard_error(moments)["head"]


# Every group with every kind is a test of `fj.lm_head`.
@pytest.mark.parametrize(
    ("group", "kind"),
    [("param", "empirical"), ("param", "true"), ("row", "true"), ("column", "empirical"), ("tensor", "true")],
)
def test_head_equals_the_exact_estimator_at_its_leaf(group, kind):
    with jax.enable_x64(True):
        params, batch = problem()
        options = {"kind": kind, "example": batch}
        fisher = fj.group_fisher(apply_fn, estimator="head", groups=group, unit="token", **options)
        state = jax.jit(fisher.update)(fisher.init(params), params, batch)
        found = fj.welford.mean(state)
        assert {name for name, x in found.items() if jax.tree.leaves(x)} == {"head"}
        mean, error = exact_head(kind)
        axes = {"param": (), "row": (0,), "column": (1,), "tensor": (0, 1)}[group]
        np.testing.assert_allclose(found["head"], np.asarray(mean).sum(axes), rtol=1e-10)
        if group == "param":
            np.testing.assert_allclose(fj.welford.standard_error(state)["head"], error, rtol=1e-7)
        assert fisher.group_sizes(params)["head"].sum() == params["head"].size


def capped(params, inputs):
    x = jnp.tanh(params["embed"][inputs]).astype(jnp.float32)
    logits = (x.reshape(-1, D) @ params["head"].T.astype(jnp.float32)).reshape(*inputs.shape, V)
    return (3 * jnp.tanh(logits / 3)).astype(jnp.float64)


@pytest.mark.parametrize("scales", [(0.7,), (-2.0,), (0.5, 3.0), (1.5, None), (1.5, None, 2.0), (1.5, None, -2.0)])
def test_head_behind_scales_and_caps_of_every_order(scales):
    """A number multiplies or divides; ``None`` is tanh."""

    def scaled(params, inputs):
        logits = jnp.tanh(params["embed"][inputs]) @ params["head"].T + params["bias"][None, None, :]
        for i, scale in enumerate(scales):
            logits = jnp.tanh(logits) if scale is None else logits / scale if i % 2 else logits * scale
        return logits

    with jax.enable_x64(True):
        params, batch = problem()
        params = {"embed": params["embed"], "head": params["embed"] * 3, "bias": jnp.linspace(-1.0, 1.0, V)}
        options = {"groups": "row", "example": batch}
        found = jax.jit(fj.group_fisher(scaled, estimator="head", **options).observe)(params, batch)
        wanted = jax.jit(fj.group_fisher(scaled, estimator="exact", unit="sequence", **options).observe)(
            params, batch
        )
        assert_close(fj.welford.mean(found)["head"], fj.welford.mean(wanted)["head"], 1e-9)


def test_head_behind_casts_reshapes_a_transpose_and_a_soft_cap():
    with jax.enable_x64(True):
        _, batch = problem()
        params = {"embed": problem()[0]["embed"], "head": problem()[0]["embed"] * 3}
        options = {"groups": "row", "example": batch}
        found = jax.jit(fj.group_fisher(capped, estimator="head", **options).observe)(params, batch)
        exact = fj.group_fisher(capped, estimator="exact", unit="sequence", **options)
        wanted = jax.jit(exact.observe)(params, batch)
        assert_close(fj.welford.mean(found)["head"], fj.welford.mean(wanted)["head"], 1e-5)
        with pytest.raises(ValueError, match=r"follows the outputs back .* use fj\.lm_head\.estimator"):
            fj.group_fisher(lambda p, x: jnp.exp(capped(p, x)), estimator="head", **options).init(params)

        def merged(p, x):
            return p["embed"][x] @ jnp.tanh(p["head"]).T

        with pytest.raises(ValueError, match=r"found dot_general at .*neither side of which is a parameter as it is"):
            fj.group_fisher(merged, estimator="head", **options).init(params)


@pytest.mark.parametrize(
    ("estimator", "group", "unit"),
    [
        ("head", "param", "sequence"),
        ("head", "row", "document"),
        ("head", "column", "sequence"),
        ("head", "tensor", "sequence"),
        ("sequence", "param", "document"),
        ("sequence", "row", "sequence"),
        ("sequence", "column", "sequence"),
        ("sequence", "tensor", "document"),
    ],
)
def test_taps_of_the_training_loss_give_what_a_pass_of_its_own_gives(estimator, group, unit):
    with jax.enable_x64(True):
        params, batch = problem()
        fisher = fj.group_fisher(apply_fn, estimator=estimator, groups=group, unit=unit, example=batch)

        @jax.jit
        def both(params, batch):
            _, grads, taps = fj.value_grad_and_taps(mean_loss)(params, batch)
            given = fisher.observe(params, batch, taps=taps, taps_scale=batch.weights.sum())
            states = [fj.welford.add(fisher.init(params), m) for m in (given, fisher.observe(params, batch))]
            return grads, states, [(fj.welford.mean(x), fj.welford.standard_error(x)) for x in states]

        _, (state, wanted), ((mean, error), (own_mean, own_error)) = both(params, batch)
        assert_close(mean, own_mean)
        assert_close(error, own_error, 1e-7)
        assert fj.welford.count(state) == fj.welford.count(wanted) == (3 if unit == "sequence" else 2)


def of_outputs(loss):
    """A training loss from one pass through the model."""

    def total(params, batch):
        outputs = apply_fn(params, batch.inputs)
        return loss(outputs, fj.categorical.log_prob(outputs, batch.targets), batch.weights)

    return total


def mean(values, weights):
    return jnp.sum(weights * values) / weights.sum()


OTHER_LOSSES = {
    "a penalty of the outputs": lambda z, lp, w: mean(0.1 * jax.nn.logsumexp(z, -1) ** 2 - lp, w),
    "smoothed labels": lambda z, lp, w: -mean(0.8 * lp + 0.2 * jax.nn.log_softmax(z).mean(-1), w),
    "a mean of the means of rows": lambda z, lp, w: -jnp.mean((w * lp).sum(-1) / jnp.maximum(w.sum(-1), 1e-9)),
    "a sum": lambda z, lp, w: -jnp.sum(w * lp),
}


@pytest.mark.parametrize("estimator", ["head", "sequence"])
def test_taps_of_another_loss_are_rejected(estimator):
    params, batch = problem(jnp.float32)
    fisher = fj.group_fisher(apply_fn, estimator=estimator, groups="row", example=batch)

    @functools.partial(jax.jit, static_argnums=2)
    def observed(params, batch, loss):
        taps = fj.capture(of_outputs(loss))(params, batch)[1]
        return fisher.observe(params, batch, taps=taps, taps_scale=batch.weights.sum())

    fj.check(observed(params, batch, lambda z, lp, w: -mean(lp, w)))
    fj.check(observed(params, batch, lambda z, lp, w: mean(lp, w)))
    for loss in OTHER_LOSSES.values():
        moments = observed(params, batch, loss)
        with pytest.raises(fj.RejectedBatchError, match="taps_scale, is not that of the summed log-likelihood"):
            fj.check(moments)


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
    wanted = jax.jit(fisher.update)(fisher.init(params), params, batch)
    assert_close(fj.welford.mean(opt_state[1]), fj.welford.mean(wanted), 1e-4)
    assert_close(fj.moving_average.mean(opt_state[0].fisher), fj.welford.mean(wanted), 1e-4)
    assert fj.welford.count(step(moved, opt_state)[1][1].fisher) == 2 * B


def taps_of(loss, params, batch, **options):
    """Shapes of taps: what cannot serve is refused while tracing."""
    return jax.eval_shape(lambda p, b: fj.capture(loss, **options)(p, b)[1], params, batch)


def observed(fisher, params, batch, taps):
    return jax.eval_shape(
        lambda *given: fisher.observe(*given[:2], given[2], taps=given[3]), params, batch, KEY, taps
    )


KEY = jax.random.key(0)


def test_taps_that_cannot_serve_are_refused():
    params, batch = problem(jnp.float32)
    taps = taps_of(mean_loss, params, batch)
    for estimator in ("signs", "sampled", "exact"):
        with pytest.raises(ValueError, match="takes no taps of another; only head and sequence do"):
            observed(fj.group_fisher(apply_fn, estimator=estimator), params, batch, taps)
    sequence = fj.group_fisher(apply_fn, estimator="sequence")
    head = fj.group_fisher(apply_fn, estimator="head", example=batch)
    reduced = taps_of(mean_loss, params, batch, reduce=lambda inputs, cotangents: cotangents.sum())
    for fisher in (sequence, head):
        with pytest.raises(ValueError, match="reduced"):
            observed(fisher, params, batch, reduced)
    with pytest.raises(ValueError, match="not 2 rows of the batch"):
        observed(sequence, params, jax.tree.map(lambda x: x[:2], batch), taps)
    with pytest.raises(ValueError, match="the taps are of 12 tokens and the batch has 8"):
        observed(head, params, jax.tree.map(lambda x: x[:2], batch), taps)
    with pytest.raises(ValueError, match=r"the head \['head'\] needs one tap .* found 0 uses"):
        observed(head, params, batch, [t for t in taps if "head" not in t.path])

    def decayed(params, batch):
        return mean_loss(params, batch) + jnp.sum(params["mix"] ** 2)

    with pytest.raises(ValueError, match=r"parameter \['mix'\] is used by .* the gradient of all rows together"):
        observed(sequence, params, batch, taps_of(decayed, params, batch))


MOVED = {
    "time first": (lambda x: jnp.swapaxes(x, 0, 1), lambda x: jnp.swapaxes(x, 0, 1)),
    "rows and positions reversed": (lambda x: x[::-1, ::-1], lambda x: x[::-1, ::-1]),
    "one axis": (
        lambda x: jnp.swapaxes(x, 0, 1).ravel(),
        lambda x: jnp.swapaxes(x.reshape(S, B, -1), 0, 1),
    ),
}


@pytest.mark.parametrize("estimator", ["head", "sequence"])
@pytest.mark.parametrize("name", MOVED)
def test_rows_are_found_where_a_model_moves_them(name, estimator):
    there, back = MOVED[name]
    params, batch = problem(jnp.float32)
    params = {key: params[key] for key in ("embed", "mix", "head")}

    def plain(params, inputs):
        return jnp.tanh(jnp.take(params["embed"], inputs, axis=0) @ params["mix"]) @ params["head"]

    def moved(params, inputs):
        return back(plain(params, there(inputs)))

    def loss(params, batch):
        log_p = jax.nn.log_softmax(moved(params, batch.inputs))
        return jnp.sum(batch.weights * jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0])

    options = {"estimator": estimator, "groups": "row", "example": batch, "unit": "sequence"}
    wanted = fj.group_fisher(plain, **options).observe(params, batch)
    taps = fj.capture(loss)(params, batch)[1]
    # A model of a fixed number of rows runs none alone, but its taps tell them apart.
    alone = estimator == "head" or name != "one axis"
    for given in ({"taps": taps}, *([{}] if alone else [])):
        found = fj.group_fisher(moved, **options).observe(params, batch, **given)
        for path in params:
            if wanted.mean[path] is not None:
                np.testing.assert_allclose(found.mean[path], wanted.mean[path], rtol=1e-5, err_msg=path)


def test_a_model_of_a_fixed_number_of_rows_runs_none_alone():
    params, batch = problem(jnp.float32)

    def fixed(params, inputs):
        return apply_fn(params, inputs) + jnp.zeros((B, 1, 1))

    with pytest.raises(ValueError, match=r"one row of the batch alone gives outputs of shape \[3, 4, 11\].*taps="):
        fj.group_fisher(fixed, estimator="sequence").observe(params, batch)


@pytest.mark.parametrize("estimator", ["head", "sequence"])
def test_taps_of_a_loss_that_is_no_number_are_rejected(estimator):
    params, batch = problem(jnp.float32)
    broken = {**params, "head": params["head"] * jnp.nan}
    fisher = fj.group_fisher(apply_fn, estimator=estimator, groups="tensor", example=batch)

    @jax.jit
    def update(state):
        return fisher.update(state, params, batch, taps=fj.capture(mean_loss)(broken, batch)[1])

    with pytest.raises(RejectedBatchError, match="NaN"):
        fj.check(update(fisher.init(params)))

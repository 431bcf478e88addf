"""Every step computes the same numbers under the checks that JAX offers, and moves nothing from the host by itself.

Strict dtype promotion, rank promotion "raise" and ``debug_nans`` are asked while a step is traced and run; a transfer
guard while a compiled step runs on arguments that lie on the device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_jax as fj

CASES = {}


def case(make):
    CASES[make.__name__] = make
    return make


def apply_fn(params, inputs):
    """A small language model whose positions mix: a running mean stands for attention."""
    x = params["embed"][inputs]
    number = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
    x = x + jnp.cumsum(jnp.tanh(x @ params["mix"]["kernel"]), 1) / number
    return (x @ params["head"].T + params["bias"][None, None]).astype(jnp.float32)


@functools.cache
def decoder(dtype):
    """The model, its parameters, and a batch with padding and a prompt."""
    shapes = {"embed": (11, 8), "mix": {"kernel": (8, 8)}, "head": (11, 8), "bias": (11,)}
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.5 * rng.standard_normal(s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    mask = np.ones((4, 6), int)
    mask[0, 4:] = 0
    loss_mask = mask.copy()
    loss_mask[1, :3] = 0
    units = jnp.array([0, 0, 1, 2], jnp.int32)
    batch = fj.next_token_batch(jnp.asarray(rng.integers(0, 11, (4, 6)), jnp.int32), mask, loss_mask, units=units)
    return apply_fn, params, batch


def estimator_step(dtype, **options):
    apply_fn, params, batch = decoder(dtype)
    fisher = fj.group_fisher(apply_fn, example=batch, **options)
    key = jax.random.key(1)
    state = fisher.init(params)
    return lambda state, params, batch, key: fisher.update(state, params, batch, key), (state, params, batch, key)


def estimators():
    group = fj.groups
    for name, options in {
        "signs_entries": {},
        "signs_rows_by_sequence": {"groups": group.row, "unit": "sequence"},
        "signs_columns_by_document": {"groups": group.column, "unit": "document"},
        "exact_entries": {"estimator": "exact"},
        "exact_true_tensors": {"estimator": "exact", "kind": "true", "groups": group.tensor},
        "sequence_rows": {"estimator": "sequence", "groups": group.row},
        "sequence_columns_by_document": {"estimator": "sequence", "groups": group.column, "unit": "document"},
        "sampled_entries": {"estimator": "sampled", "num_samples": 2},
        "sampled_tempered": {"estimator": "sampled", "temperature": 0.7, "groups": group.tensor},
        "head_rows": {"estimator": "head", "groups": group.row},
        "head_entries": {"estimator": "head", "kind": "true"},
    }.items():
        CASES[name] = functools.partial(estimator_step, **options)


estimators()


@case
def average_of_signs(dtype):
    apply_fn, params, batch = decoder(dtype)
    average = fj.ema(fj.group_fisher(apply_fn, estimator="signs"), 0.9)
    key = jax.random.key(1)
    return average.update, (average.init(params), params, batch, key)


@case
def tracked_inside_a_chain(dtype):
    apply_fn, params, batch = decoder(dtype)
    tx = fj.track_fisher(fj.group_fisher(apply_fn, estimator="signs"))

    def update(grads, state, params, batch, key):
        return tx.update(grads, state, params, batch=batch, key=key)

    return update, (params, tx.init(params), params, batch, jax.random.key(1))


@case
def taps_of_the_training_step(dtype):
    apply_fn, params, batch = decoder(dtype)
    fisher = fj.group_fisher(apply_fn, example=batch, groups=fj.groups.row, estimator="sequence")

    def step(params, batch):
        def loss(params, batch):
            scores = fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets)
            return -jnp.sum(scores * batch.weights.astype(scores.dtype))

        _, grads, taps = fj.value_grad_and_taps(loss)(params, batch)
        return grads, fisher.observe(params, batch, taps=taps)

    return step, (params, batch)


def head_step(dtype, **options):
    rng = np.random.default_rng(3)
    hidden, head = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((3, 4, 8), (11, 8)))
    targets = jnp.asarray(rng.integers(0, 11, (3, 4)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, (3, 4)), jnp.float32)

    def step(state, hidden, head, targets, weights):
        return fj.welford.add(state, fj.lm_head.moments(hidden, head, targets, weights, chunk_size=4, **options))

    moments = jax.eval_shape(
        lambda *x: fj.lm_head.moments(*x, chunk_size=4, **options), hidden, head, targets, weights
    )
    return step, (fj.welford.init(moments), hidden, head, targets, weights)


for groups in ("row", "column", "tensor", "param"):
    for kind in ("empirical", "true"):
        CASES[f"lm_head_{groups}_{kind}"] = functools.partial(head_step, groups=groups, kind=kind)
CASES["lm_head_soft_cap_and_temperature"] = functools.partial(
    head_step, kind="true", soft_cap=5.0, temperature=0.8, unit="sequence"
)


def product_step(dtype, operator):
    apply_fn, params, batch = decoder(dtype)

    def step(params, batch, vector):
        return operator(apply_fn, fj.categorical, params, batch)(vector)

    return step, (params, batch, jax.tree.map(lambda x: jnp.cos(x), params))


for operator in (fj.operators.ggn, fj.operators.fisher, fj.operators.empirical_fisher, fj.operators.hessian):
    CASES[f"product_{operator.__name__}"] = functools.partial(product_step, operator=operator)


@case
def blocks(dtype):
    apply_fn, params, batch = decoder(dtype)
    stream = fj.spectra.block_spectra(apply_fn, fj.categorical, example=batch)
    return stream.update, (stream.init(params), params, batch)


def kfac_step(dtype, make, **options):
    apply_fn, params, batch = decoder(dtype)
    tx = make(apply_fn, example=batch, **options)
    grads = jax.tree.map(lambda x: 0.1 * jnp.sin(x), params)

    def update(grads, state, params, batch, key):
        return tx.update(grads, state, params, batch=batch, key=key)

    return update, (grads, tx.init(params), params, batch, jax.random.key(2))


for name, options in {
    "kfac_directions": {},
    "kfac_directions_of_sampled_labels": {"curvature": fj.Curvature(estimator="sampled")},
    "kfac_directions_of_the_exact_head": {"curvature": fj.Curvature(estimator="exact_head")},
    "kfac_directions_corrected": {"curvature": fj.Curvature(eigenvalue_correction=True, policy="all")},
    "kfac_directions_corrected_in_eigenbases": {
        "curvature": fj.Curvature(eigenvalue_correction=True, policy="never")
    },
    "kfac_directions_reduced": {"curvature": fj.Curvature(shared="reduce")},
    "kfac_directions_averaged": {"refresh": fj.Refresh(factor_decay=0.9, statistics_period=2)},
}.items():
    CASES[name] = functools.partial(kfac_step, make=fj.scale_by_kfac, **options)
CASES["kfac_at_a_fixed_rate"] = functools.partial(kfac_step, make=fj.kfac, learning_rate=0.1)
CASES["kfac_adaptive"] = functools.partial(kfac_step, make=fj.kfac)


@case
def kfac_factors_and_inverse(dtype):
    apply_fn, params, batch = decoder(dtype)

    def step(params, batch, grads, key):
        factors = fj.kfac_factors(apply_fn, fj.categorical, params, batch, damping=0.1, key=key)
        return fj.precondition(factors, grads)

    return step, (params, batch, jax.tree.map(jnp.sin, params), jax.random.key(2))


@case
def kfac_as_a_matrix(dtype):
    apply_fn, params, batch = decoder(dtype)

    def step(params, batch, key):
        found = {}
        for policy in ("never", "all"):
            factors = fj.kfac_factors(
                apply_fn, fj.categorical, params, batch, damping=0.1, key=key, curvature=fj.Curvature(policy=policy)
            )
            found[policy] = fj.operators.kfac(factors)(jax.tree.map(jnp.cos, params))
        exact = fj.kfac_factors(
            apply_fn,
            fj.categorical,
            params,
            batch,
            damping=0.1,
            key=key,
            curvature=fj.Curvature(estimator="exact_head"),
        )
        return found, fj.operators.kfac(exact)(jax.tree.map(jnp.cos, params))

    return step, (params, batch, jax.random.key(2))


def layered(params, inputs):
    """Layers in a rematerialised scan."""

    @jax.checkpoint
    def layer(x, kernel):
        return x + jnp.tanh(x @ kernel), None

    return (jax.lax.scan(layer, params["embed"][inputs], params["layers"])[0] @ params["head"]).astype(jnp.float32)


@case
def layers_in_a_scan(dtype):
    _, params, batch = decoder(dtype)
    kernel = params["mix"]["kernel"]
    params = {"embed": params["embed"], "layers": jnp.stack([kernel, -kernel]), "head": params["head"].T}
    fisher = fj.group_fisher(layered, example=batch, groups=fj.groups.row, estimator="sequence")

    def step(params, batch, key):
        factors = fj.kfac_factors(layered, fj.categorical, params, batch, damping=0.1, key=key)
        loss = lambda params: jnp.sum(layered(params, batch.inputs) ** 2)  # noqa: E731
        return fisher.observe(params, batch, None), fj.precondition(factors, params), fj.capture(loss)(params)

    return step, (params, batch, jax.random.key(2))


@case
def steps_that_spare_what_matters(dtype):
    _, params, _ = decoder(dtype)
    fisher = jax.tree.map(lambda x: jnp.square(x.astype(jnp.float32)), params)
    tx = optax.chain(fj.continual.scale_by_fisher(fisher, damping=1e-2), fj.continual.protect_important(fisher, 0.1))

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return updates, state, fj.ewc_penalty(params, grads, fisher, strength=2.0)

    return step, (jax.tree.map(jnp.sin, params), tx.init(params), params)


@case
def reading_a_state(dtype):
    _, params, _ = decoder(dtype)
    rng = np.random.default_rng(5)
    rows = jax.tree.map(lambda x: jnp.asarray(rng.gamma(1.0, 1.0, (4, *x.shape)), jnp.float32), params)
    moments = fj.welford.observe(rows)
    state = fj.welford.add(fj.welford.init(moments), moments)

    def step(one, two):
        both = fj.welford.merge(one, two)
        both = fj.welford.add(both, fj.welford.observe(rows))
        by_row = fj.welford.observe(rows, unit="sequence")
        weights = fj.stats.shrunk_mean(by_row), fj.merge_params([params, params], [fj.welford.mean(one)] * 2)
        plain = fj.welford.merge(fj.welford.plain(one), fj.welford.plain(two))
        return (
            weights,
            fj.welford.variance(plain),
            fj.welford.mean(both),
            fj.welford.variance(both, weighting="frequency"),
            fj.welford.standard_error(both),
        )

    return step, (state, state)


@case
def masks_and_saliency(dtype):
    _, params, _ = decoder(dtype)
    fisher = jax.tree.map(lambda x: jnp.square(x.astype(jnp.float32)), params)
    return lambda params, fisher: fj.prune_mask(fj.saliency(params, fisher), 0.5), (params, fisher)


def numbers(tree):
    """Leaves as NumPy arrays; keys as their data."""
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [np.asarray(x, float) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x) for x in leaves]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_needs_no_leniency(name, dtype):
    step, arguments = CASES[name](dtype)
    wanted = jax.make_jaxpr(step)(*arguments)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = jax.make_jaxpr(lambda *x: step(*x))(*arguments)
    assert [(x.shape, x.dtype) for x in found.out_avals] == [(x.shape, x.dtype) for x in wanted.out_avals]


@pytest.mark.parametrize("name", CASES)
def test_a_step_keeps_nothing_of_its_trace(name):
    step, arguments = CASES[name]("float32")
    with jax.checking_leaks():
        jax.make_jaxpr(lambda *x: step(*x))(*arguments)


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_step_takes_nothing_from_the_host_and_gives_no_nan(name):
    step, arguments = CASES[name]("float32")
    compiled = jax.jit(step)
    arguments = jax.device_put(arguments, jax.devices()[0])
    wanted = numbers(compiled(*arguments))
    with jax.transfer_guard("disallow"):
        found = compiled(*arguments)
    for x, y in zip(numbers(found), wanted, strict=True):
        assert not np.isnan(x).any()  # or debug_nans would stop a run
        np.testing.assert_array_equal(x, y)

"""What a batch says of its tokens means the same to all that reads it: one table of cases, all consumers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.batch.tokens import has_weight

B, S, D, K = 3, 4, 2, 5
KEY = jax.random.key(0)
PADDING, PROMPT, SILENT = (0, 3), (1, 0), 2  # a position that is not real; a real one without loss; a row of padding


def model(params, inputs):
    """A shift that no parameter meets makes outputs NaN without any other number being so."""
    return jnp.tanh(inputs["x"] @ params["kernel"]) @ params["head"] + inputs["shift"]


def headed(params, inputs):
    """The head's product is what comes last, as the estimator ``head`` wants it."""
    return (jnp.tanh(inputs["x"] @ params["kernel"]) + inputs["shift"]) @ params["head"]


def draw(likelihood=fj.categorical):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(D, D)), "head": rng.normal(size=(D, K))}
    x, shift = rng.normal(size=(B, S, D)), rng.normal(size=(B, S, 1))
    targets = rng.integers(0, K, (B, S)) if likelihood is fj.categorical else rng.uniform(size=(B, S, K))
    weights, real = rng.uniform(0.5, 1, (B, S)), np.ones((B, S), bool)
    weights[PADDING], weights[PROMPT], weights[SILENT] = 0, 0, 0
    real[PADDING], real[SILENT] = False, False
    x[~real] = 0
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return params, {"x": x, "shift": shift, "targets": targets, "weights": weights, "real": real}


def batch_of(given):
    def numbers(x):
        return jnp.asarray(x, jnp.float32 if np.issubdtype(np.asarray(x).dtype, np.floating) else None)

    inputs = {name: numbers(given[name]) for name in ("x", "shift")}
    return fj.Batch(inputs, *(numbers(given[name]) for name in ("targets", "weights", "real")))


# A consumer is a function of (likelihood, params, batch) to arrays; it raises what is wrong with the batch.


def estimator(name, function=model, **options):
    @functools.cache
    def compiled(likelihood):
        example = batch_of(draw(likelihood)[1])
        fisher = fj.group_fisher(function, likelihood, estimator=name, example=example, **options)
        return fisher.init, jax.jit(lambda state, params, batch: fisher.update(state, params, batch, KEY))

    def consume(likelihood, params, batch):
        init, update = compiled(likelihood)
        state = update(init(params), params, batch)
        fj.check(state)
        return state.mean, state.m2, state.weight

    return consume


def lm_head(likelihood, params, batch):
    hidden = jnp.tanh(batch.inputs["x"] @ params["kernel"]) + batch.inputs["shift"]
    found = fj.lm_head.moments(hidden, params["head"].T, batch.targets, batch.weights)
    fj.check(found)
    return found.mean, found.m2, found.weight


def kfac_factors(estimator):
    def consume(likelihood, params, batch):
        curvature = fj.Curvature(estimator=estimator)
        factors = fj.kfac_factors(headed, likelihood, params, batch, key=KEY, curvature=curvature)
        return fj.precondition(factors, params)

    return consume


def optimizer(make):
    @functools.cache
    def compiled(likelihood):
        tx = make(model, likelihood, example=batch_of(draw(likelihood)[1]))
        return tx.init, jax.jit(lambda state, params, batch: tx.update(params, state, params, batch=batch, key=KEY))

    def consume(likelihood, params, batch):
        init, update = compiled(likelihood)
        updates, state = update(init(params), params, batch)
        fj.check(state)
        return updates

    return consume


def operator(name, **options):
    def consume(likelihood, params, batch):
        return getattr(fj.operators, name)(model, likelihood, params, batch, **options)(params)

    return consume


def block_spectrum(unit, kind):
    def consume(likelihood, params, batch):
        found = fj.spectra.block_spectrum(model, likelihood, params, batch, unit=unit, kind=kind, key=KEY)
        return {name: one.eigenvalues for name, one in found.items()}

    return consume


LABELLED = {
    "exact": estimator("exact"),
    "signs": estimator("signs"),
    "sequence": estimator("sequence"),
    "kfac_factors": kfac_factors("empirical"),
    "scale_by_kfac": optimizer(fj.scale_by_kfac),
    "kfac, adaptive": optimizer(functools.partial(fj.kfac, curvature=fj.Curvature(estimator="ggn"))),
    "block_spectrum by token": block_spectrum("token", "empirical"),
    "block_spectrum by sequence": block_spectrum("sequence", "empirical"),
    "empirical_fisher": operator("empirical_fisher"),
    "hessian": operator("hessian"),
    "hessian, microbatches": operator("hessian", microbatch_size=1),
}
HEADS = {"head": estimator("head", headed, groups="row"), "lm_head": lm_head}
UNLABELLED = {
    "exact, true": estimator("exact", kind="true"),
    "sampled": estimator("sampled"),
    "sequence, true": estimator("sequence", kind="true"),
    "kfac_factors, sampled": kfac_factors("sampled"),
    "kfac_factors, ggn": kfac_factors("ggn"),
    "block_spectrum, true": block_spectrum("sequence", "true"),
    "ggn": operator("ggn"),
    "ggn, kept": operator("ggn", keep_linearization=True),
}
EXACT_HEAD = {"kfac_factors, exact_head": kfac_factors("exact_head")}
ALL = LABELLED | HEADS | UNLABELLED | EXACT_HEAD
OPERATORS = ("empirical_fisher", "hessian", "hessian, microbatches", "ggn", "ggn, kept")


def spoiled(given, name, place, value):
    given = given | {name: np.array(given[name])}
    given[name][place] = value
    return given


def outputs_not_a_number(given):
    return spoiled(spoiled(given, "shift", PADDING, np.nan), "shift", PROMPT, np.nan)


def targets_out_of_range(given):
    value = K if given["targets"].ndim == 2 else np.nan
    return spoiled(spoiled(given, "targets", PADDING, value), "targets", PROMPT, -value)


def padding_not_a_number(given):
    return spoiled(spoiled(given, "x", PADDING, np.nan), "x", SILENT, np.inf)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
        assert np.isfinite(x).all()


@functools.cache
def clean(consumer, likelihood):
    params, given = draw(likelihood)
    return ALL[consumer](likelihood, params, batch_of(given))


@pytest.mark.parametrize("spoil", [outputs_not_a_number, targets_out_of_range, padding_not_a_number])
@pytest.mark.parametrize("consumer", ALL)
def test_what_does_not_count_is_not_read(consumer, spoil):
    for likelihood in [fj.categorical] if consumer in HEADS | EXACT_HEAD else [fj.categorical, fj.gaussian]:
        params, given = draw(likelihood)
        same(clean(consumer, likelihood), ALL[consumer](likelihood, params, batch_of(spoil(given))))


NOT_A_WEIGHT = "a weight that is negative, NaN or infinite"
BAD = {
    "negative weight": ("weights", -1.0, NOT_A_WEIGHT),
    "NaN weight": ("weights", np.nan, NOT_A_WEIGHT),
    "infinite weight": ("weights", np.inf, NOT_A_WEIGHT),
    "label too large": ("targets", K, "a target outside"),
    "label negative": ("targets", -1, "a target outside"),
    "outputs NaN": ("shift", np.nan, "a NaN or infinite value"),
    "half real": ("real", 0.5, "neither 0 nor 1"),
    "real is NaN": ("real", np.nan, "neither 0 nor 1"),
    "weight of padding": ("real", 0.0, "not 0 where Batch.real is 0"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("consumer", ALL)
def test_an_unusable_batch_is_rejected_with_its_reason(consumer, bad):
    name, value, reason = BAD[bad]
    if name == "shift" and consumer in OPERATORS:
        return  # a product of NaN is NaN
    if name == "real" and consumer == "lm_head":
        return  # hidden states are given, no batch
    params, given = draw()
    given["real"] = given["real"].astype(np.float32)
    batch = batch_of(spoiled(given, name, (1, 1), value))
    if name == "targets" and consumer not in LABELLED | HEADS:
        same(clean(consumer, fj.categorical), ALL[consumer](fj.categorical, params, batch))
        return
    with pytest.raises(fj.RejectedBatchError, match=reason) as raised:
        ALL[consumer](fj.categorical, params, batch)
    assert sum(other in str(raised.value) for other in {reason for _, _, reason in BAD.values()}) == 1


@pytest.mark.parametrize("consumer", ALL)
def test_shapes_and_dtypes_that_do_not_fit_raise_a_sentence(consumer):
    params, given = draw()
    batch = batch_of(given)

    def refused(error, sentence, **change):
        with pytest.raises(error, match=sentence):
            ALL[consumer](fj.categorical, params, dataclasses.replace(batch, **change))

    wanted = r"weights have one value per token, shape \[3, 4\], found \[3\]"
    refused(ValueError, wanted, weights=jnp.ones(B))
    if consumer in LABELLED | HEADS:
        wanted = r"targets of shape \[3\] do not fit categorical outputs of shape \[3, 4, 5\]"
        refused(ValueError, wanted, targets=jnp.zeros(B, int))
        refused(TypeError, "targets are integer labels, found dtype float32", targets=jnp.zeros((B, S)))
        refused(ValueError, "needs? targets", targets=None)


@pytest.mark.parametrize("given_by", ["weights", "real"])
@pytest.mark.parametrize("consumer", ALL)
def test_an_empty_batch_changes_nothing_or_is_refused(consumer, given_by):
    params, given = draw()
    empty = batch_of(given | {"weights": np.zeros((B, S))})
    if given_by == "real":
        if consumer == "lm_head":
            return  # hidden states are given, no batch
        empty = dataclasses.replace(empty, weights=None, real=jnp.zeros((B, S), bool))
    if consumer in OPERATORS or consumer.startswith(("kfac_factors", "block_spectrum")):
        with pytest.raises(fj.RejectedBatchError, match="the batch is empty"):
            ALL[consumer](fj.categorical, params, empty)
    else:
        for x in jax.tree.leaves(ALL[consumer](fj.categorical, params, empty)):
            np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize(
    ("units", "error", "sentence"),
    [
        (None, ValueError, "unit='document' needs units"),
        (np.zeros(2, int), ValueError, r"one id per row, \[3\], found shape \[2\]"),
        (np.zeros(3), TypeError, "units are integer ids, one per row, found dtype float32"),
    ],
)
def test_ids_of_documents_are_integers_one_per_row(units, error, sentence):
    params, given = draw()
    batch = dataclasses.replace(batch_of(given), units=None if units is None else jnp.asarray(units))
    for name, function in (("exact", model), ("sequence", model), ("head", headed)):
        with pytest.raises(error, match=sentence):
            fj.group_fisher(function, estimator=name, unit="document", example=batch).observe(params, batch)
    with pytest.raises(error, match=sentence):
        fj.lm_head.moments(batch.inputs["x"], params["head"].T, batch.targets, unit="document", units=batch.units)
    with pytest.raises(error, match=sentence):
        fj.welford.observe(jnp.ones((B, 2)), unit="document", units=batch.units)


def test_outputs_are_one_floating_array():
    params, given = draw()
    batch = batch_of(given)
    for outputs in (lambda p, x: (x["x"], p), lambda p, x: x["x"] > 0, lambda p, x: 1.0):
        for run in (
            lambda f: fj.group_fisher(f, estimator="exact").observe(params, batch),
            lambda f: fj.kfac_factors(f, fj.categorical, params, batch),
            lambda f: fj.operators.ggn(f, fj.categorical, params, batch),
            lambda f: fj.spectra.block_spectrum(f, fj.categorical, params, batch),
        ):
            with pytest.raises(ValueError, match=r"apply_fn returns one floating array \[..., K\]"):
                run(outputs)


@pytest.mark.parametrize("likelihood", [fj.gaussian, fj.bernoulli])
def test_every_output_has_a_target_of_its_own(likelihood):
    """A last axis of 1 would be spread over all outputs."""
    params, given = draw(likelihood)
    batch = batch_of(given)
    run = fj.group_fisher(model, likelihood, estimator="exact").observe
    for targets in (batch.targets[..., :1], batch.targets[..., 0], batch.targets[..., :2]):
        wrong = dataclasses.replace(batch, targets=targets)
        for refused in (
            lambda wrong=wrong: run(params, wrong),
            lambda wrong=wrong: fj.operators.hessian(model, likelihood, params, wrong),
            lambda wrong=wrong: fj.kfac_factors(headed, likelihood, params, wrong),
        ):
            with pytest.raises(ValueError, match=r"a number for every output, shape \[3, 4, 5\]"):
                refused()
    with pytest.raises(TypeError, match="real numbers"):
        run(params, dataclasses.replace(batch, targets=batch.targets + 1j))
    whole = jnp.round(batch.targets)
    want = run(params, dataclasses.replace(batch, targets=whole)).mean
    for dtype in (jnp.int32, jnp.uint8, bool):
        same(run(params, dataclasses.replace(batch, targets=whole.astype(dtype))).mean, want)


def test_one_hot_labels_are_refused_with_the_way_out():
    params, given = draw()
    batch = batch_of(given)
    for targets, error in (
        (jnp.eye(K)[given["targets"]], TypeError),
        (jnp.eye(K, dtype=int)[given["targets"]], ValueError),
    ):
        with pytest.raises(error, match=r"integer labels|do not fit"):
            fj.group_fisher(model, estimator="exact").observe(params, dataclasses.replace(batch, targets=targets))


def test_without_weights_what_is_real_counts():
    params, given = draw()
    given["weights"] = given["real"].astype(np.float32)
    with_weights = batch_of(given)
    without = dataclasses.replace(with_weights, weights=None)
    for consumer in ("exact", "sequence", "head", "kfac_factors", "ggn", "block_spectrum by token"):
        same(ALL[consumer](fj.categorical, params, without), ALL[consumer](fj.categorical, params, with_weights))
    assert not has_weight(dataclasses.replace(without, real=jnp.zeros((B, S))))


def test_real_has_the_shape_of_the_tokens():
    params, given = draw()
    batch = dataclasses.replace(batch_of(given), real=jnp.ones((B, S + 1), bool))
    with pytest.raises(ValueError, match=r"real has one value per row, or per position of a row, shape \[3, 4\]"):
        fj.operators.ggn(model, fj.categorical, params, batch)

"""Spectra of blocks against dense eigenvalues of float64 matrices, at once and streamed, exact and sketched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax._support.errors import RejectedBatchError
from tests import oracle_curvature

D, K, VOCABULARY = 3, 4, 5
LEAVES = ("bias", "conv", "dense", "embed", "head", "scale")
SHAPES = {
    "bias": (D,), "conv": (2, D, D), "dense": (D, D), "embed": (VOCABULARY, D), "head": (D, K), "scale": (D,),
}  # fmt: skip


def apply_fn(params, tokens):
    """An embedding, a convolution that mixes positions, a scale, a dense layer with a bias, a head."""
    x = params["embed"][tokens]
    kernel = params["conv"].astype(x.dtype)
    x = jnp.tanh(jax.lax.conv_general_dilated(x, kernel, (1,), [(1, 0)], dimension_numbers=("NWC", "WIO", "NWC")))
    x = jnp.sin(x * params["scale"] @ params["dense"] + params["bias"])
    return x @ params["head"]


def draw_params(dtype="float32"):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


@functools.cache
def problem(rows, length):
    """Tokens, targets and weights, some of them zero (a whole row too) and some fractional."""
    rng = np.random.default_rng(rows)
    weights = rng.integers(0, 3, (rows, length)) * 0.5
    weights[0, 0], weights[1] = 1, 0
    return rng.integers(0, VOCABULARY, (rows, length)), rng.integers(0, K, (rows, length)), weights


def batch_of(rows, length, take=slice(None)):
    return fj.Batch(*(jnp.asarray(x[take]) for x in problem(rows, length)))


@functools.cache
def scores(rows, length, unit="token"):
    """Weighted scores ``{leaf: [N, P]}`` with ``F = X^T X / W``, and ``W``."""
    tokens, targets, weights = problem(rows, length)
    with jax.enable_x64(True):
        found = oracle_curvature.scores(apply_fn, "categorical", draw_params("float64"), tokens, jnp.asarray(targets))
    if unit == "token":
        x = np.sqrt(weights.ravel())[:, None] * found
    else:
        x = np.einsum("bs,bsp->bp", weights, found.reshape(rows, length, -1))
    x = x[np.abs(x).sum(1) > 0]
    edges = np.cumsum([0, *(int(np.prod(SHAPES[name])) for name in LEAVES)])
    return {name: x[:, a:b] for name, a, b in zip(LEAVES, edges[:-1], edges[1:], strict=True)}, weights.sum()


def dense_eigenvalues(rows, length, unit="token", names=None):
    """``{leaf: [P]}``, descending."""
    x, total = scores(rows, length, unit)
    joined = x if names is None else {"all": np.concatenate([x[name] for name in names], 1)}
    return {name: np.linalg.eigvalsh(s.T @ s / total)[::-1] for name, s in joined.items()}


def path(name):
    return f"['{name}']"


def assert_spectrum(found, wanted, tolerance=2e-6):
    """All eigenvalues, those that are zero included, relative to the largest."""
    values = np.pad(found.eigenvalues, (0, len(wanted) - len(found.eigenvalues)))
    np.testing.assert_allclose(values, wanted, rtol=0, atol=tolerance * wanted[0])


REGIMES = {  # few scores against every kind of leaf, and more scores than any leaf has parameters
    ("token", 3, 3): dict.fromkeys(LEAVES, "gram") | {"bias": "covariance", "scale": "covariance"},
    ("token", 12, 4): dict.fromkeys(LEAVES, "covariance"),
    ("sequence", 4, 2): dict.fromkeys(LEAVES, "gram")
    | {"bias": "covariance", "scale": "covariance", "embed": "taps"},
    ("sequence", 24, 2): dict.fromkeys(LEAVES, "covariance") | {"embed": "taps"},
}


def spectrum_of(params, batch, **options):
    """Always in chunks of 3, so that most tests share what is compiled."""
    return fj.block_spectrum(apply_fn, fj.categorical, params, batch, chunk_size=3, **options)


@pytest.mark.parametrize(("unit", "rows", "length"), REGIMES)
def test_every_block_has_its_dense_eigenvalues(unit, rows, length):
    found = spectrum_of(draw_params(), batch_of(rows, length), unit=unit)
    wanted = dense_eigenvalues(rows, length, unit)
    number = len(scores(rows, length, unit)[0]["bias"])
    assert list(found) == [path(name) for name in LEAVES]
    assert {name: found[path(name)].method for name in LEAVES} == REGIMES[unit, rows, length]
    for name in LEAVES:
        block = found[path(name)]
        assert_spectrum(block, wanted[name])
        assert block.num_scores == number
        assert block.num_parameters == len(wanted[name])
        assert block.error_bound == 0
        assert len(block.eigenvalues) == min(number, len(wanted[name]))


def test_float64_where_it_is_enabled():
    with jax.enable_x64(True):
        found = spectrum_of(draw_params("float64"), batch_of(3, 3))
    for name, wanted in dense_eigenvalues(3, 3).items():
        assert_spectrum(found[path(name)], wanted, 1e-13)


def mlp(params, x):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]


def test_one_token_per_row_needs_no_gradients():
    """Wide layers, few examples: the Gram matrix comes from taps; labels drawn are those of the other routes too."""
    rng = np.random.default_rng(3)
    params = {"a": rng.standard_normal((9, 12)) / 3, "b": rng.standard_normal(12), "c": rng.standard_normal((12, K))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    batch = fj.Batch(jnp.asarray(rng.standard_normal((5, 9)), jnp.float32), jnp.array([0, 1, 2, 3, 1]))
    batch = fj.Batch(batch.inputs, batch.targets, jnp.array([1.0, 0.5, 0.0, 2.0, 1.0]))
    for options in ({}, {"kind": "true", "key": jax.random.key(1), "num_samples": 2}):
        found = fj.block_spectrum(mlp, fj.categorical, params, batch, **options)
        assert [found[path(name)].method for name in "abc"] == ["taps", "gram", "taps"]
        stream = fj.spectra.block_spectra(
            mlp, fj.categorical, max_scores=10, **{k: v for k, v in options.items() if k != "key"}
        )
        state = stream.update(stream.init(params), params, batch, options.get("key"))
        for name, block in stream.finalize(state).items():
            assert block.method == "gram"
            assert block.num_scores == 4 * options.get("num_samples", 1)
            np.testing.assert_allclose(found[name].eigenvalues, block.eigenvalues, atol=2e-6 * block.eigenvalues[0])
            assert found[name].num_scores == block.num_scores


def test_sequences_of_a_language_model_come_from_taps():
    """A wide embedding and head, and few short sequences with repeated tokens."""
    rng = np.random.default_rng(4)
    params = {"embed": rng.standard_normal((50, 8)) * 0.3, "head": rng.standard_normal((8, 50))}
    tokens = jnp.asarray(rng.integers(0, 4, (3, 4)))
    batch = fj.Batch(tokens, jnp.roll(tokens, -1, 1), jnp.asarray(rng.integers(0, 3, (3, 4)) * 0.5))

    def model(p, x):
        h = p["embed"][x]
        return jnp.tanh(h + jnp.cumsum(h, 1)) @ p["head"]

    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    found = fj.block_spectrum(model, fj.categorical, narrow, batch, unit="sequence")
    with jax.enable_x64(True):
        wide = jax.tree.map(jnp.asarray, params)
        s = oracle_curvature.scores(model, "categorical", wide, tokens, batch.targets).reshape(3, 4, -1)
    w = np.asarray(batch.weights, np.float64)
    x = np.einsum("bs,bsp->bp", w, s)
    for name, part in (("embed", x[:, :400]), ("head", x[:, 400:])):
        assert found[path(name)].method == "taps"
        assert_spectrum(found[path(name)], np.linalg.eigvalsh(part @ part.T / w.sum())[::-1])


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_the_trace_is_the_sum_of_the_group_fisher_of_the_same_unit(unit):
    """Rows of unequal weight."""
    params, batch = jax.tree.map(jnp.asarray, draw_params("float32")), batch_of(4, 5)
    estimator = "exact" if unit == "token" else "sequence"
    fisher = fj.group_fisher(apply_fn, estimator=estimator, unit="sequence", groups="tensor", example=batch)
    sums = fj.welford.mean(jax.jit(fisher.observe)(params, batch))
    found = fj.block_spectrum(apply_fn, fj.categorical, params, batch, unit=unit)
    for name in LEAVES:
        np.testing.assert_allclose(found[path(name)].capacity.trace, sums[name], rtol=1e-5)


def layered(params, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w["kernel"] + w["bias"]), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_scanned_layers_are_blocks_of_their_own(unit):
    rng = np.random.default_rng(5)
    shapes = {"layers": {"kernel": (3, D, D), "bias": (3, D)}, "head": (D, K)}
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    x, y = jnp.asarray(rng.standard_normal((3, 2, D)), jnp.float32), jnp.asarray(rng.integers(0, K, (3, 2)))
    batch = fj.Batch(x, y)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        s = oracle_curvature.scores(layered, "categorical", wide, x.astype(jnp.float64), y)
    s = s if unit == "token" else s.reshape(3, 2, -1).sum(1)
    head, bias, kernel = s[:, :12], s[:, 12:21].reshape(-1, 3, 3), s[:, 21:].reshape(-1, 3, 9)
    found = fj.block_spectrum(layered, fj.categorical, params, batch, unit=unit, stacked=True)
    named = fj.block_spectrum(
        layered, fj.categorical, params, batch, unit=unit, stacked="layers",
        blocks=lambda path: path if "head" in path else "layer",
    )  # fmt: skip
    assert list(named) == ["['head']", "layer[0]", "layer[1]", "layer[2]"]
    for i in range(3):
        wanted = {
            f"['layers']['kernel'][{i}]": kernel[:, i], f"['layers']['bias'][{i}]": bias[:, i], "['head']": head,
        }  # fmt: skip
        for name, part in wanted.items():
            assert_spectrum(found[name], np.linalg.eigvalsh(part.T @ part / 6)[::-1])
        both = np.concatenate([bias[:, i], kernel[:, i]], 1)
        assert_spectrum(named[f"layer[{i}]"], np.linalg.eigvalsh(both.T @ both / 6)[::-1])


def test_blocks_are_grouped_and_left_out_by_choice():
    params, batch = draw_params(), batch_of(12, 4)
    first = {name: params[name] for name in ("conv", "embed")}
    nested = {"first": first, "rest": {name: x for name, x in params.items() if name not in first}}

    def model(p, x):
        return apply_fn({**p["first"], **p["rest"]}, x)

    found = fj.block_spectrum(model, fj.categorical, nested, batch, blocks="module", parameters="first")
    assert list(found) == ["['first']"]
    assert_spectrum(found["['first']"], dense_eigenvalues(12, 4, names=("conv", "embed"))["all"])
    found = spectrum_of(
        params, batch, top_k=4,
        blocks=lambda path: "outer" if "embed" in path or "head" in path else path if "bias" in path else None,
    )  # fmt: skip
    assert list(found) == [path("bias"), "outer"]
    assert found[path("bias")].eigenvalues.shape == (3,)
    np.testing.assert_allclose(
        found["outer"].eigenvalues, dense_eigenvalues(12, 4, names=("embed", "head"))["all"][:4], rtol=1e-5
    )


def test_a_stream_of_batches_is_one_batch():
    params = draw_params()
    stream = fj.spectra.block_spectra(apply_fn, max_scores=40, chunk_size=5)
    update = jax.jit(stream.update, donate_argnums=0)
    state = stream.init(params)
    types = jax.tree.map(jnp.shape, state)
    for start in range(0, 12, 4):
        state = update(state, params, batch_of(12, 4, slice(start, start + 4)))
    assert jax.tree.map(jnp.shape, state) == types
    fj.check(state)
    found = stream.finalize(state)
    for name, wanted in dense_eigenvalues(12, 4).items():
        assert_spectrum(found[path(name)], wanted)
        assert found[path(name)].num_scores == len(scores(12, 4)[0]["bias"])
    assert {block.method for block in found.values()} == {"covariance"}


@pytest.mark.parametrize(("unit", "step"), [("token", 2), ("sequence", 4)])
def test_a_stream_keeps_scores_that_just_fit(unit, step):
    """Small blocks by covariance, large ones by their scores; a row without weight takes no place."""
    params = draw_params()
    number = len(scores(4, 2, unit)[0]["bias"])
    stream = fj.spectra.block_spectra(apply_fn, max_scores=number, chunk_size=3, unit=unit)
    state = stream.init(params)
    for start in range(0, 4, step):
        state = stream.update(state, params, batch_of(4, 2, slice(start, start + step)))
    found = stream.finalize(state)
    assert {block.method for block in found.values()} == {"covariance", "gram"}
    for name, wanted in dense_eigenvalues(4, 2, unit).items():
        assert_spectrum(found[path(name)], wanted)


@pytest.mark.parametrize("max_scores", [4, 8])
def test_a_sketch_stays_within_its_bound(max_scores):
    params = draw_params()
    stream = fj.spectra.block_spectra(apply_fn, max_scores=max_scores, chunk_size=3)
    state = stream.init(params)
    for start in range(0, 24, 6):
        state = jax.jit(stream.update)(state, params, batch_of(24, 2, slice(start, start + 6)))
    found, checked = stream.finalize(state), 0
    m = (max_scores + 3) // 2
    for name, wanted in dense_eigenvalues(24, 2).items():
        block = found[path(name)]
        if len(wanted) <= max_scores:
            assert_spectrum(block, wanted)
            continue
        checked += 1
        assert block.method == "sketch"
        values = np.pad(block.eigenvalues, (0, len(wanted) - len(block.eigenvalues)))
        rounding = 1e-5 * wanted[0]
        assert (values <= wanted + rounding).all()
        assert (wanted <= values + block.error_bound + rounding).all()
        apriori = min((wanted[k:].sum()) / (m + 1 - k) for k in range(m + 1))
        assert 0 < block.error_bound <= apriori + rounding
        np.testing.assert_allclose(block.capacity.trace, wanted.sum(), rtol=1e-5)
    assert checked >= 4


def test_labels_drawn_from_the_model_give_the_true_fisher():
    """The mean over many labels, by token and by row, against the dense Fisher matrix of the same block."""
    tokens, targets, weights = problem(3, 3)

    def alone(params, token):
        return apply_fn(params, token[:, None])[:, 0]

    flat = tuple(jnp.asarray(x.ravel()) for x in (tokens, targets, weights))
    for model, data in ((apply_fn, (tokens, targets, weights)), (alone, flat)):
        with jax.enable_x64(True):
            true = oracle_curvature.dense("fisher", model, "categorical", draw_params("float64"), *data)
        wanted = np.linalg.eigvalsh(true[:3, :3])[::-1]
        found = fj.block_spectrum(
            model, fj.categorical, draw_params(), fj.Batch(*map(jnp.asarray, data)), kind="true", num_samples=2000,
            key=jax.random.key(0), chunk_size=9, parameters="bias",
        )  # fmt: skip
        np.testing.assert_allclose(found[path("bias")].eigenvalues, wanted, atol=0.06 * wanted[0])
        assert found[path("bias")].num_scores == 2000 * int((weights > 0).sum())


@pytest.mark.parametrize(("rows", "length"), [(3, 3), (12, 4)])
def test_capacity_is_what_it_says(rows, length):
    damping = 0.01
    found = spectrum_of(draw_params(), batch_of(rows, length), top_k=2, damping=damping)
    for name, values in dense_eigenvalues(rows, length).items():
        block, capacity = found[path(name)], found[path(name)].capacity
        np.testing.assert_allclose(block.eigenvalues, values[:2], rtol=1e-5)
        x = np.maximum(values, 0)
        p = x[x > 1e-12 * x[0]] / x.sum()
        rank = np.linalg.matrix_rank(scores(rows, length)[0][name], rtol=1e-3)
        assert capacity.rank == rank
        assert capacity.damping == damping
        wanted = {
            "trace": x.sum(), "log_determinant": np.log(x + damping).sum(),
            "participation_ratio": x.sum() ** 2 / (x**2).sum(), "entropy_rank": np.exp(-(p * np.log(p)).sum()),
            "condition_number": x[0] / x[rank - 1], "damped_condition_number": (x[0] + damping) / (x[-1] + damping),
        }  # fmt: skip
        for measure, value in wanted.items():
            np.testing.assert_allclose(getattr(capacity, measure), value, rtol=2e-3, err_msg=f"{name} {measure}")


def test_a_block_without_scores_has_no_capacity():
    batch = batch_of(3, 3)
    params = draw_params() | {"unused": jnp.ones(2)}
    capacity = fj.block_spectrum(apply_fn, fj.categorical, params, batch, parameters="unused")[
        path("unused")
    ].capacity
    assert capacity.trace == capacity.participation_ratio == capacity.entropy_rank == capacity.rank == 0
    assert np.isnan(capacity.condition_number)
    assert capacity.damped_condition_number == 1


def test_padding_changes_nothing():
    """Out-of-range labels without weight, and rows of padding."""
    batch = batch_of(3, 3)
    inputs, targets = np.asarray(batch.inputs), np.where(batch.weights > 0, batch.targets, 99)
    padded = fj.Batch(
        *(jnp.asarray(np.concatenate([x, np.full((3, 3), v, x.dtype)])) for x, v in ((inputs, 0), (targets, -1))),
        jnp.concatenate([batch.weights, jnp.zeros((3, 3))]),
    )
    one, two = (spectrum_of(draw_params(), b) for b in (batch, padded))
    for name in one:
        np.testing.assert_allclose(two[name].eigenvalues, one[name].eigenvalues, atol=1e-6 * one[name].eigenvalues[0])
        assert two[name].num_scores == one[name].num_scores


@functools.cache
def small_stream():
    stream = fj.spectra.block_spectra(apply_fn, max_scores=8)
    return stream, jax.jit(stream.update)


BAD = {
    "every weight is 0": {"weights": jnp.zeros((3, 3))},
    "negative": {"weights": -jnp.ones((3, 3))},
    "outside": {"targets": jnp.full((3, 3), K)},
    "NaN": {},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_batches_raise_and_leave_a_stream_alone(reason):
    good, params = batch_of(3, 3), draw_params()
    batch = fj.Batch(good.inputs, BAD[reason].get("targets", good.targets), BAD[reason].get("weights", good.weights))
    spoilt = params if reason != "NaN" else params | {"head": params["head"].at[0, 0].set(jnp.nan)}
    with pytest.raises(RejectedBatchError, match=reason):
        spectrum_of(spoilt, batch)
    stream, update = small_stream()
    before = update(stream.init(params), params, good)
    after = update(before, spoilt, batch)
    jax.tree.map(np.testing.assert_array_equal, (before.kept, before.weight), (after.kept, after.weight))
    if reason == "every weight is 0":
        fj.check(after)
        with pytest.raises(RejectedBatchError, match="empty"):
            stream.finalize(stream.init(params))
    else:
        with pytest.raises(RejectedBatchError, match=reason):
            stream.finalize(after)


def test_what_cannot_be_is_said():
    run = functools.partial(fj.block_spectrum, apply_fn, fj.categorical, draw_params(), batch_of(3, 3))
    for top_k in (0, 19):
        with pytest.raises(ValueError, match=f"top_k is between 1 and .*, 18; found {top_k}"):
            run(top_k=top_k)
    with pytest.raises(ValueError, match="unit is 'token' or 'sequence', found 'row'"):
        run(unit="row")
    with pytest.raises(ValueError, match="kind is"):
        run(kind="some")
    with pytest.raises(ValueError, match="pass key="):
        run(kind="true")
    with pytest.raises(ValueError, match="needs kind='true'"):
        run(num_samples=2)
    with pytest.raises(ValueError, match="chunk_size is at least 1, found 0"):
        run(chunk_size=0)
    with pytest.raises(ValueError, match="damping is positive"):
        run(damping=0.0)
    with pytest.raises(ValueError, match="'parameter', 'module' or a function"):
        run(blocks="layer")
    with pytest.raises(ValueError, match="leaves out every parameter"):
        run(blocks=lambda path: None)
    with pytest.raises(ValueError, match=r"different numbers of layers: .*'conv'.* of shape"):
        run(blocks=lambda path: "all", stacked="conv")
    with pytest.raises(ValueError, match="pass example="):
        fj.spectra.block_spectra(apply_fn, stacked=True).init(draw_params())
    with pytest.raises(ValueError, match=r"\['bias'\] has dtype complex64"):
        fj.block_spectrum(
            apply_fn, fj.categorical, draw_params() | {"bias": jnp.ones(D, jnp.complex64)}, batch_of(3, 3)
        )
    batch = fj.Batch((batch_of(3, 3).inputs, jnp.ones(7)), batch_of(3, 3).targets)
    with pytest.raises(ValueError, match=r"first axis should be 3"):
        fj.block_spectrum(lambda p, x: apply_fn(p, x[0]), fj.categorical, draw_params(), batch)

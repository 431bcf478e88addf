"""Streaming moments against definitions in float64, for every unit, split, order and merge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.welford.moments import UNITS
from tests import oracles

ROWS, WIDTH = 40, 8  # rows of the stream, rows of one padded batch
SHAPES = {"matrix": (3, 2), "scalar": (), "nothing": (0,)}


def stream(seed, weights="fractional"):
    """Rows of a tree, their weights and document ids; some rows have no weight, one id comes back later."""
    rng = np.random.default_rng(seed)
    values = {name: rng.lognormal(0, 1, (ROWS, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    w = rng.integers(0, 9, ROWS) * 0.25 if weights == "fractional" else rng.integers(0, 2, ROWS).astype(bool)
    ids = np.repeat([5, 0, 5, 11, 2, 8, -3], [1, 4, 2, 17, 3, 1, 12])
    return values, w, ids


@functools.partial(jax.jit, static_argnames="unit", donate_argnums=0)
def step(state, values, weights, ids, unit):
    return fj.welford.add(state, fj.welford.observe(values, weights, unit=unit, units=ids))


def empty(unit, dtype=jnp.float32):
    row = {name: jax.ShapeDtypeStruct((WIDTH, *shape), jnp.float32) for name, shape in SHAPES.items()}
    weights, ids = jax.ShapeDtypeStruct((WIDTH,), dtype), jax.ShapeDtypeStruct((WIDTH,), jnp.int32)
    like = jax.eval_shape(lambda v, w, i: fj.welford.observe(v, w, unit=unit, units=i), row, weights, ids)
    return fj.welford.init(like)


def feed(unit, values, weights, ids, rng, state=None):
    """Cut the rows into batches at random and pad each with void rows anywhere; their values and ids are junk."""
    state = empty(unit, bool if weights.dtype == bool else jnp.float32) if state is None else state
    begin = 0
    while begin < len(weights):
        size = min(rng.integers(0, WIDTH + 1), len(weights) - begin)
        place = np.sort(rng.choice(WIDTH, size, replace=False))
        rows = {name: np.full((WIDTH, *x.shape[1:]), np.nan, np.float32) for name, x in values.items()}
        w, unit_ids = np.zeros(WIDTH, weights.dtype), rng.integers(-3, 12, WIDTH)
        for name, x in values.items():
            rows[name][place] = x[begin : begin + size]
        w[place], unit_ids[place] = weights[begin : begin + size], ids[begin : begin + size]
        w = w if w.dtype == bool else w.astype(np.float32)
        state = step(state, rows, w, unit_ids.astype(np.int32), unit)
        begin += size
    fj.check(state)
    return state


def own_ids(unit, ids):
    """Ids under which rows form the observations of a unit (batches are handled where they are made)."""
    return ids if unit == "document" else np.arange(ROWS)


def assert_same(a, b, rtol=1e-6):
    """Two states hold the same statistics; their counts and weights are equal exactly."""
    assert (fj.welford.count(a), fj.welford.weight(a)) == (fj.welford.count(b), fj.welford.weight(b))
    for read in (fj.welford.mean, fj.welford.variance, fj.welford.standard_error):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), read(a), read(b))


def assert_bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_matches(state, values, weights, ids, rtol=3e-6):
    for name, x in values.items():
        f, w = oracles.observations(x, weights, ids)
        if x.size == 0:
            f = f.reshape(len(w), 0)
        mean, error, n, total = oracles.moments(f, w, np.arange(len(w)))
        assert (fj.welford.count(state), fj.welford.weight(state)) == (n, total)
        np.testing.assert_allclose(fj.welford.mean(state)[name], mean, rtol=rtol)
        np.testing.assert_allclose(fj.welford.standard_error(state)[name], error, rtol=rtol)
        np.testing.assert_allclose(float(fj.welford.total_weight(state)), total, rtol=1e-7)
        reliability = fj.welford.variance(state, "reliability")[name]
        np.testing.assert_allclose(reliability, oracles.variance(f, w, "reliability"), rtol=rtol)
        if state.unit == "token":
            np.testing.assert_allclose(
                fj.welford.variance(state)[name], oracles.variance(f, w, "frequency"), rtol=rtol
            )
        else:
            np.testing.assert_array_equal(fj.welford.variance(state)[name], reliability)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unit", ["token", "sequence", "document"])
def test_any_split_and_any_padding_give_the_definitions(unit, seed):
    rng = np.random.default_rng(seed)
    values, weights, ids = stream(seed)
    for _ in range(3):
        assert_matches(feed(unit, values, weights, ids, rng), values, weights, own_ids(unit, ids))


def test_bool_weights_keep_half_of_the_state_and_give_the_definitions():
    values, weights, ids = stream(1, "bool")
    state = feed("token", values, weights, ids, np.random.default_rng(0))
    assert state.square_mean is None
    assert state.square_m2 is None
    assert_matches(state, values, weights, np.arange(ROWS))
    # The same weights as floats are the same statistics.
    assert_same(state, feed("token", values, weights.astype(np.float32), ids, np.random.default_rng(1)))


def test_a_batch_is_one_observation():
    values, weights, _ = stream(2)
    state = empty("batch")
    for begin in range(0, ROWS, WIDTH):
        piece = slice(begin, begin + WIDTH)
        rows = {name: x[piece] for name, x in values.items()}
        state = step(state, rows, weights[piece].astype(np.float32), np.zeros(WIDTH, np.int32), "batch")
    assert fj.welford.count(state) == ROWS // WIDTH
    assert_matches(state, values, weights, np.repeat(np.arange(ROWS // WIDTH), WIDTH))


@pytest.mark.parametrize("layout", ["one document", "one per row", "one per batch", "cut by voids", "back again"])
def test_documents_of_every_layout(layout):
    rng = np.random.default_rng(3)
    values, weights, _ = stream(3)
    ids = {
        "one document": np.zeros(ROWS, int),
        "one per row": np.arange(ROWS),
        "one per batch": np.repeat(np.arange(ROWS // WIDTH), WIDTH),
        "cut by voids": np.repeat([4, 6], ROWS // 2),
        "back again": np.arange(ROWS) // 3 % 2,
    }[layout]
    if layout == "cut by voids":
        # Void rows of another id inside a document, whole batches of them too, do not end it.
        weights = np.where(np.arange(ROWS) % 20 < 2, 1.25, 0) + np.where(np.arange(ROWS) % 20 > 17, 0.5, 0)
        ids = np.where(weights > 0, ids, 99)
    state = feed("document", values, weights, ids, rng)
    runs = 1 + np.count_nonzero(np.diff(ids[weights > 0]))
    assert fj.welford.count(state) == runs
    if layout == "one document":
        f, w = oracles.observations(values["matrix"], weights, ids)
        np.testing.assert_allclose(fj.welford.mean(state)["matrix"], f[0], rtol=3e-6)
        assert fj.welford.weight(state) == w[0]
        assert np.isnan(fj.welford.standard_error(state)["matrix"]).all()
        assert np.isnan(fj.welford.variance(state)["matrix"]).all()
    else:
        assert_matches(state, values, weights, ids)


def test_an_unfinished_document_is_carried_and_counts_in_what_is_read():
    values, ids = jnp.array([1.0, 3.0, 5.0]), jnp.array([7, 7, 8])
    moments = fj.welford.observe(values, jnp.array([1.0, 3.0, 2.0]), unit="document", units=ids)
    state = fj.welford.add(fj.welford.init(moments), moments)
    assert float(state.weight.sum()) == 4.0
    assert (float(state.open.weight.sum()), float(state.open.mean[0]), int(state.open.unit_id)) == (2.0, 5.0, 8)
    for seen in (state, moments):
        assert (fj.welford.count(seen), fj.welford.weight(seen)) == (2, 6.0)
        assert float(fj.welford.mean(seen)) == pytest.approx((1 + 9 + 10) / 6, rel=1e-7)
    assert_same(state, moments)


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_order_does_not_matter_and_a_doubled_corpus_has_the_same_mean(unit):
    rng = np.random.default_rng(4)
    values, weights, ids = stream(4)
    state = feed(unit, values, weights, ids, rng)
    mean = jax.tree.map(np.asarray, fj.welford.mean(state))
    for _ in range(3):
        order = rng.permutation(ROWS)
        shuffled = {name: x[order] for name, x in values.items()}
        assert_same(state, feed(unit, shuffled, weights[order], ids[order], rng))
    doubled = feed(unit, values, weights, ids, rng, state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), fj.welford.mean(doubled), mean)
    assert fj.welford.weight(doubled) == 2 * weights.sum()
    assert_matches(
        doubled, {n: np.concatenate([x, x]) for n, x in values.items()}, np.tile(weights, 2), np.arange(2 * ROWS)
    )


def test_a_doubled_corpus_of_documents_has_the_same_mean():
    rng = np.random.default_rng(5)
    values, weights, ids = stream(5)
    once = feed("document", values, weights, ids, rng)
    mean, count = jax.tree.map(np.asarray, fj.welford.mean(once)), fj.welford.count(once)
    twice = feed("document", values, weights, ids + 100, rng, once)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), fj.welford.mean(twice), mean)
    assert fj.welford.count(twice) == 2 * count


def pieces(unit, seed, cuts):
    """States of consecutive parts of one stream, cut where a document ends."""
    values, weights, ids = stream(seed)
    states = []
    for begin, end in zip([0, *cuts], [*cuts, ROWS], strict=True):
        part = {name: x[begin:end] for name, x in values.items()}
        states.append(feed(unit, part, weights[begin:end], ids[begin:end], np.random.default_rng(begin)))
    return states, feed(unit, values, weights, ids, np.random.default_rng(9))


merge = jax.jit(fj.welford.merge)


@pytest.mark.parametrize("unit", UNITS)
def test_merge_is_associative_and_equals_one_stream(unit):
    (a, b, c), whole = pieces(unit, 6, (7, 27))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert_same(left, right)
    if unit != "batch":
        assert_same(left, whole)
    if unit == "document":
        # What is open at the end stays open, and goes on.
        assert int(left.open.unit_id) == int(right.open.unit_id) == -3
        assert float(left.open.weight.sum()) == float(whole.open.weight.sum()) > 0
    else:
        assert_same(merge(a, b), merge(b, a))


@pytest.mark.parametrize("unit", UNITS)
def test_an_empty_state_is_neutral_to_the_last_bit(unit):
    (state, _), _ = pieces(unit, 7, (24,))
    assert_bitwise(merge(state, empty(unit)), state)
    assert_bitwise(merge(empty(unit), state), state)
    assert_bitwise(merge(empty(unit), empty(unit)), empty(unit))


def document(values, ids, weights=None):
    moments = fj.welford.observe(jnp.asarray(values), weights, unit="document", units=jnp.asarray(ids))
    return fj.welford.add(fj.welford.init(moments), moments)


def test_merge_of_open_documents():
    # The second state is one unfinished document with the id of the first one's: they are one observation.
    joined = fj.welford.merge(document([1.0, 2.0], [3, 4]), document([6.0], [4]))
    assert (fj.welford.count(joined), float(fj.welford.mean(joined))) == (2, 3.0)
    assert float(fj.welford.standard_error(joined)) == pytest.approx(np.sqrt(2 * (4 + 4)) / 3)
    # Another id, or a first document that was finished elsewhere: two observations.
    apart = fj.welford.merge(document([1.0, 2.0], [3, 4]), document([6.0], [5]))
    assert (fj.welford.count(apart), int(apart.open.unit_id)) == (3, 5)
    finished = fj.welford.merge(document([1.0, 2.0], [3, 4]), document([6.0, 1.0], [4, 5]))
    assert (fj.welford.count(finished), float(finished.weight.sum())) == (4, 3.0)
    # The document of the second state's end is not that of the first one's end: something else came before it.
    again = fj.welford.merge(document([1.0, 2.0], [3, 4]), document([6.0, 1.0], [5, 4]))
    assert (fj.welford.count(again), float(again.weight.sum()), float(again.open.mean[0])) == (4, 3.0, 1.0)
    # A second state that has nothing open leaves the first one's document open.
    assert int(fj.welford.merge(joined, fj.welford.init(jnp.zeros(()), unit="document")).open.unit_id) == 4


def test_moments_without_squares_join_a_state_with_squares_and_not_the_other_way_round():
    values = jnp.array([1.0, 2.0, 6.0])
    binary = fj.welford.observe(values, jnp.array([True, False, True]))
    weighted = fj.welford.observe(values, jnp.array([0.5, 2.0, 1.0]))
    state = fj.welford.add(fj.welford.add(fj.welford.init(weighted), weighted), binary)
    f, w = np.array([1.0, 2.0, 6.0, 1.0, 6.0]), np.array([0.5, 2.0, 1.0, 1.0, 1.0])
    mean, error, n, _ = oracles.moments(f, w, np.arange(5))
    assert (float(fj.welford.mean(state)), fj.welford.count(state)) == (pytest.approx(mean), n)
    assert float(fj.welford.standard_error(state)) == pytest.approx(error, rel=1e-6)
    with pytest.raises(ValueError, match=r"the moments carry fractional weights .* pass bool weights"):
        fj.welford.add(fj.welford.init(binary), weighted)
    with pytest.raises(ValueError, match="carry fractional weights"):
        fj.welford.merge(fj.welford.init(weighted), fj.welford.init(binary))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"unit": "sequence"}, "unit of observation: 'token' and 'sequence'"),
        ({"scale": 16}, "scale of the statistic: 0 and 16"),
        ({"values": {"a": jnp.zeros((2, 3))}}, "different trees"),
        ({"values": jnp.zeros((2, 4))}, r"different shapes: \[\(3,\)\] and \[\(4,\)\]"),
    ],
)
def test_what_does_not_fit_is_refused(other, words):
    values = other.pop("values", jnp.zeros((2, 3)))
    moments = fj.welford.observe(values, jnp.ones(2), **other)
    state = fj.welford.init(fj.welford.observe(jnp.zeros((2, 3)), jnp.ones(2)))
    with pytest.raises(ValueError, match=words):
        fj.welford.add(state, moments)
    with pytest.raises(ValueError, match=words):
        fj.welford.merge(state, fj.welford.init(moments))


def test_impossible_arguments_are_refused():
    values = jnp.zeros((2, 3))
    moments = fj.welford.observe(values, unit="sequence")
    for call, error, words in [
        (lambda: fj.welford.observe(values, unit="page"), ValueError, "unit is one of token, sequence"),
        (lambda: fj.welford.init(values, unit="page"), ValueError, "unit is one of token, sequence"),
        (lambda: fj.welford.observe(values, unit="document"), ValueError, "needs units"),
        (lambda: fj.welford.observe({"a": values, "b": jnp.zeros(3)}), ValueError, "one common leading axis"),
        (lambda: fj.welford.observe(jnp.zeros(())), ValueError, "one common leading axis"),
        (lambda: fj.welford.observe(values, jnp.ones(3)), ValueError, r"shape \[2\], found \[3\]"),
        (lambda: fj.welford.variance(moments, "frequency"), ValueError, "use weighting='reliability'"),
        (lambda: fj.welford.variance(moments, "population"), ValueError, "found 'population'"),
        (lambda: fj.welford.mean(values), TypeError, "expected a Welford state"),
    ]:
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("unit", UNITS)
def test_types_do_not_change_under_jit_scan_and_donation(unit):
    values, weights, ids = stream(8)
    rows = {name: x.reshape(ROWS // WIDTH, WIDTH, *x.shape[1:]) for name, x in values.items()}
    xs = (rows, weights.astype(np.float32).reshape(-1, WIDTH), ids.astype(np.int32).reshape(-1, WIDTH))
    state = empty(unit)
    types = jax.tree.map(jax.typeof, state)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, xs):
        return jax.lax.scan(lambda s, x: (step(s, *x, unit), None), state, xs)[0]

    assert jax.tree.map(jax.typeof, jax.eval_shape(run, state, xs)) == types
    looped = run(state, xs)
    assert jax.tree.map(jax.typeof, looped) == types
    assert all(x.is_deleted() for x in jax.tree.leaves(state) if x.size), "the buffers were not given away"
    state = empty(unit)
    for i in range(ROWS // WIDTH):
        state = step(state, *jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), xs), unit)
    assert jax.tree.map(jax.typeof, state) == types
    assert_same(state, looped)
    if unit != "batch":
        assert_matches(looped, values, weights, own_ids(unit, ids))


def test_scaled_values_read_back_without_the_scale():
    tiny = np.array([3.0, 5.0, 1.0]) * 1e-17
    scaled = jnp.asarray(tiny * 2.0**40, jnp.float32)
    moments = fj.welford.observe(scaled, jnp.array([1.0, 2.0, 0.5]), scale=40)
    state = fj.welford.add(fj.welford.init(moments), moments)
    mean, error, *_ = oracles.moments(tiny, [1.0, 2.0, 0.5], np.arange(3))
    for seen in (moments, state):
        np.testing.assert_allclose(fj.welford.mean(seen), mean, rtol=1e-6)
        np.testing.assert_allclose(fj.welford.standard_error(seen), error, rtol=1e-6)
        for kind in ("frequency", "reliability"):
            variance = oracles.variance(tiny, [1.0, 2.0, 0.5], kind)
            np.testing.assert_allclose(fj.welford.variance(seen, kind), variance, rtol=1e-6)
    assert state.scale == 40


def test_statistics_are_float32_at_least_and_float64_if_the_values_are():
    half = fj.welford.observe({"a": jnp.array([1.0, 2.0], jnp.bfloat16)}, jnp.array([1.0, 0.5], jnp.bfloat16))
    state = fj.welford.add(fj.welford.init(half), half)
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
    assert fj.welford.mean(state)["a"].dtype == jnp.float32
    assert fj.welford.init(jnp.zeros(3, jnp.float16)).mean.dtype == jnp.float32
    values, weights, ids = stream(10)
    with jax.enable_x64(True):
        values = {name: jnp.asarray(x, jnp.float64) for name, x in values.items()}
        for unit in UNITS:
            moments = fj.welford.observe(values, jnp.asarray(weights), unit=unit, units=jnp.asarray(ids))
            state = fj.welford.add(fj.welford.init(moments), moments)
            assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float64", "int32"}
            if unit != "batch":
                assert_matches(state, jax.tree.map(np.asarray, values), weights, own_ids(unit, ids), rtol=1e-13)


def test_spread_is_mean_and_standard_deviations():
    values, weights, ids = stream(11)
    state = feed("sequence", values, weights, ids, np.random.default_rng(0))
    f, w = oracles.observations(values["matrix"], weights, np.arange(ROWS))
    mean, std = np.tensordot(w, f, 1) / w.sum(), np.sqrt(oracles.variance(f, w, "reliability"))
    lower, upper = fj.welford.spread(state)
    np.testing.assert_allclose(lower["matrix"], mean - 1.96 * std, rtol=1e-5)
    np.testing.assert_allclose(upper["matrix"], mean + 1.96 * std, rtol=1e-5)


def test_a_constant_stream_has_no_variance_and_zero_stays_zero():
    values = {"zero": jnp.zeros((6, 2)), "third": jnp.full((6, 2), 1 / 3)}
    for unit in ("token", "sequence"):
        moments = fj.welford.observe(values, jnp.array([1.0, 2.0, 0.5, 1.0, 3.0, 0.0]), unit=unit)
        state = fj.welford.init(moments)
        for _ in range(3):
            state = fj.welford.add(state, moments)
        assert (np.asarray(fj.welford.mean(state)["zero"]) == 0).all()
        assert (np.asarray(fj.welford.variance(state)["zero"]) == 0).all()
        assert (np.asarray(fj.welford.standard_error(state)["zero"]) == 0).all()
        np.testing.assert_allclose(fj.welford.mean(state)["third"], 1 / 3, rtol=1e-7)
        assert (np.asarray(fj.welford.variance(state)["third"]) < 1e-14).all()

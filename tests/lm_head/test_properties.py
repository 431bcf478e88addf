"""What must not matter does not: batches, padding, order; and what must be refused is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax._support.errors import RejectedBatchError

S, V, H = 6, 19, 5
LENGTHS = [6, 3, 6, 6, 2, 1, 6, 4]  # tokens of each row; rows of one document are consecutive
DOCUMENTS = [7, 7, 3, 3, 3, 9, 5, 5]


def corpus():
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((len(LENGTHS), S, H)).astype(np.float32)
    targets = rng.integers(0, V, (len(LENGTHS), S))
    weights = np.arange(S) < np.array(LENGTHS)[:, None]
    return hidden, targets, weights, np.array(DOCUMENTS)


HEAD = np.random.default_rng(2).standard_normal((V, H)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("unit", "groups"))
def observe(hidden, targets, weights, units, unit, groups="row"):
    return fj.lm_head.moments(
        hidden, jnp.asarray(HEAD), targets, weights, kind=("empirical", "true"), unit=unit, units=units, groups=groups
    )


add = jax.jit(fj.welford.add)


def stream(rows, batch_size, unit, groups="row", row_length=S, corpus_of=corpus):
    """The states after the given rows, in batches padded with rows of weight 0."""
    hidden, targets, weights, units = (x[np.asarray(rows)] for x in corpus_of())
    if row_length > S:  # padding on the right, with values that must not matter
        more = ((0, 0), (0, row_length - S))
        hidden = np.pad(hidden, (*more, (0, 0)), constant_values=np.nan)
        targets, weights = np.pad(targets, more, constant_values=-100), np.pad(weights, more)
    states = None
    for first in range(0, len(rows), batch_size):
        batch = [x[first : first + batch_size] for x in (hidden, targets, weights, units)]
        missing = batch_size - len(batch[0])
        batch = [np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in batch]
        found = observe(*batch, unit=unit, groups=groups)
        states = states or [fj.welford.init(m) for m in found]
        states = [add(s, m) for s, m in zip(states, found, strict=True)]
    return states


def assert_equal_states(a, b):
    for x, y in zip(a, b, strict=True):
        fj.check([x, y])
        assert fj.welford.count(x) == fj.welford.count(y)
        assert fj.welford.weight(x) == fj.welford.weight(y)
        np.testing.assert_allclose(fj.welford.mean(x), fj.welford.mean(y), rtol=1e-6)
        np.testing.assert_allclose(
            fj.welford.standard_error(x),
            fj.welford.standard_error(y),
            rtol=1e-5,
            atol=1e-6 * float(jnp.max(x.mean[0])),
        )


@pytest.mark.parametrize("unit", ["token", "sequence", "document"])
def test_batches_and_padding_do_not_matter(unit):
    rows = list(range(len(LENGTHS)))
    whole = stream(rows, 8, unit)
    assert fj.welford.count(whole[0]) == {"token": sum(LENGTHS), "sequence": 8, "document": 4}[unit]
    assert_equal_states(whole, stream(rows, 1, unit))
    assert_equal_states(whole, stream(rows, 3, unit))
    assert_equal_states(whole, stream(rows, 5, unit, row_length=9))


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_order_does_not_matter(unit):
    rows = list(range(len(LENGTHS)))
    assert_equal_states(stream(rows, 3, unit), stream([5, 2, 7, 0, 1, 6, 4, 3], 3, unit))


@pytest.mark.parametrize("unit", ["token", "document"])
def test_a_corpus_twice_has_the_same_mean(unit):
    rows = list(range(len(LENGTHS)))
    once, twice = stream(rows, 4, unit), stream(rows * 2, 4, unit)
    for a, b in zip(once, twice, strict=True):
        np.testing.assert_allclose(fj.welford.mean(a), fj.welford.mean(b), rtol=1e-6)
        assert fj.welford.count(b) == 2 * fj.welford.count(a)


@pytest.mark.parametrize("unit", ["token", "document"])
def test_group_sums_of_entries_are_the_means_of_the_groups(unit):
    rows = list(range(len(LENGTHS)))
    entries = [np.asarray(fj.welford.mean(s)) for s in stream(rows, 8, unit, "param")]
    for group, axes in (("row", 1), ("column", 0), ("tensor", None)):
        for whole, state in zip(entries, stream(rows, 8, unit, group), strict=True):
            np.testing.assert_allclose(fj.welford.mean(state), whole.sum(axes), rtol=2e-6)


BAD = {
    "nan": (lambda h, y, w: (h.at[0, 1, 2].set(jnp.nan), y, w), "NaN or infinite"),
    "infinite": (lambda h, y, w: (h.at[0, 1, 2].set(jnp.inf), y, w), "NaN or infinite"),
    "label too large": (lambda h, y, w: (h, y.at[1, 0].set(V), w), "target outside"),
    "label negative": (lambda h, y, w: (h, y.at[1, 0].set(-1), w), "target outside"),
    "negative weight": (lambda h, y, w: (h, y, w.at[2, 0].set(-1.0)), "negative"),
    "NaN weight": (lambda h, y, w: (h, y, w.at[2, 0].set(jnp.nan)), "negative"),
}


@pytest.mark.parametrize("groups", ["row", "param"])
def test_a_bad_batch_is_counted_and_changes_nothing(groups):
    hidden, targets, weights, units = corpus()
    good = (jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(weights, jnp.float32))
    state = fj.welford.init(observe(*good, units, unit="sequence", groups=groups)[0])
    state = add(state, observe(*good, units, unit="sequence", groups=groups)[0])
    for spoil, reason in BAD.values():
        after = add(state, observe(*spoil(*good), units, unit="sequence", groups=groups)[0])
        for name in ("mean", "m2", "square_mean", "square_m2", "weight", "weight_sq", "count"):
            np.testing.assert_array_equal(getattr(after, name), getattr(state, name))
        assert int(after.rejected) == 1
        with pytest.raises(RejectedBatchError, match=reason):
            fj.check(after)
        again = add(after, observe(*good, units, unit="sequence", groups=groups)[0])
        assert (int(again.rejected), fj.welford.count(again)) == (1, 16)


def test_where_the_weight_is_zero_values_do_not_matter():
    hidden, targets, weights, units = corpus()
    spoiled, labels = hidden.copy(), targets.copy()
    spoiled[~weights], labels[~weights] = np.nan, 10**6
    for a, b in zip(
        observe(hidden, targets, weights, units, unit="document"),
        observe(spoiled, labels, weights, units, unit="document"),
        strict=True,
    ):
        assert int(b.rejected) == 0
        np.testing.assert_array_equal(fj.welford.mean(a), fj.welford.mean(b))


def test_an_empty_batch_changes_no_bit():
    hidden, targets, weights, units = corpus()
    for unit in ("token", "document"):
        found = observe(hidden, targets, weights, units, unit=unit)[0]
        state = add(fj.welford.init(found), found)
        after = add(state, observe(hidden, targets, np.zeros_like(weights), units, unit=unit)[0])
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"head": jnp.zeros((H, V))}, ValueError, r"found \[8, 6, 5\] and \[5, 19\]; transpose the head"),
        ({"targets": jnp.zeros((8, S))}, TypeError, "integer labels, found dtype float32"),
        ({"targets": jnp.zeros((8, S + 1), int)}, ValueError, r"targets of shape"),
        ({"targets": None}, ValueError, "empirical Fisher needs targets"),
        ({"weights": jnp.ones(8)}, ValueError, r"weights have one value per token, shape \[8, 6\], found \[8\]"),
        ({"groups": "rows"}, ValueError, "groups is one of param, row, column, tensor, found 'rows'"),
        ({"kind": "sampled"}, ValueError, "kind is 'empirical', 'true'"),
        ({"unit": "word"}, ValueError, "unit is one of token, sequence, document, batch, found 'word'"),
        ({"unit": "document"}, ValueError, "needs units"),
        ({"unit": "document", "units": jnp.zeros(3, int)}, ValueError, r"one id per row, \[8\], found shape \[3\]"),
        ({"temperature": 0.5}, ValueError, "it needs kind='true'"),
        ({"temperature": 0.0, "kind": "true"}, ValueError, "temperature is positive"),
        ({"soft_cap": -1.0}, ValueError, "soft_cap is positive"),
        ({"bias": jnp.zeros(3)}, ValueError, r"one value per vocabulary row, \[19\], found \[3\]"),
        ({"chunk_size": 0}, ValueError, "chunk_size is at least 1"),
        ({"log_sum_exp": jnp.zeros(8)}, ValueError, "log_sum_exp has the leading shape"),
        ({"hidden": jnp.zeros((8, 0, H)), "targets": jnp.zeros((8, 0), int)}, ValueError, "at least one token"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_sentence(change, error, sentence):
    hidden, targets, _, _ = corpus()
    arguments = {"hidden": jnp.asarray(hidden), "head": jnp.asarray(HEAD), "targets": jnp.asarray(targets)} | change
    with pytest.raises(error, match=sentence):
        fj.lm_head.moments(**arguments)


def test_states_of_other_units_or_groups_are_not_joined():
    hidden, targets, weights, units = corpus()
    row = observe(hidden, targets, weights, units, unit="sequence")[0]
    with pytest.raises(ValueError, match="unit of observation: 'sequence' and 'document'"):
        fj.welford.add(fj.welford.init(row), observe(hidden, targets, weights, units, unit="document")[0])
    with pytest.raises(ValueError, match="shapes"):
        fj.welford.add(
            fj.welford.init(row), observe(hidden, targets, weights, units, unit="sequence", groups="param")[0]
        )


def test_the_estimator_is_the_head_of_a_model():
    rng = np.random.default_rng(3)
    params = {"embed": jnp.asarray(rng.standard_normal((V, H)), jnp.float32), "head": jnp.asarray(HEAD)}
    fisher = fj.lm_head.estimator(lambda p, x: p["embed"][x], lambda p: p["head"], unit="sequence")
    batch = fj.next_token_batch(jnp.asarray(rng.integers(0, V, (4, S))))
    state = jax.jit(fisher.update)(fisher.init(params), params, batch)
    expected = fj.lm_head.moments(
        params["embed"][batch.inputs], params["head"], batch.targets, batch.weights, unit="sequence"
    )
    np.testing.assert_allclose(fj.welford.mean(state), fj.welford.mean(expected), rtol=1e-6)
    recent = fj.ema(fisher, 0.5)
    averaged = recent.update(recent.init(params), params, batch)
    np.testing.assert_allclose(fj.moving_average.mean(averaged), fj.welford.mean(expected), rtol=1e-6)

"""Laws that hold whatever the numbers are: hypothesis looks for those that break them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import fisher_jax as fj
from fisher_jax.text.corpora import Document
from fisher_jax.text.packing import pack
from tests import oracles

TOKENS, PARTS = 8, 3
few = settings(max_examples=25, deadline=None, derandomize=True)
values = st.floats(0, 100, width=32)
weights = st.sampled_from([0.0, 0.5, 1.0, 3.0])


@jax.jit
def of_parts(squares, weights, part, order):
    """Moments of each part of the tokens, merged in an order."""
    states = []
    for number in range(PARTS):
        inside = jnp.where(part == number, weights, 0)
        moments = fj.welford.observe(squares, inside)
        states.append(fj.welford.add(fj.welford.init(moments), moments))
    stacked = jax.tree.map(lambda *x: jnp.stack(x)[order], *states)
    first, *others = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(PARTS))
    for other in others:
        first = fj.welford.merge(first, other)
    return first


@few
@given(
    arrays.arrays(np.float32, TOKENS, elements=values),
    arrays.arrays(np.float32, TOKENS, elements=weights).filter(np.any),
    arrays.arrays(np.int32, TOKENS, elements=st.integers(0, PARTS - 1)),
    st.permutations(range(PARTS)),
)
def test_splits_merged_in_any_order_are_the_definitions(squares, weights, part, order):
    state = of_parts(squares, weights, part, jnp.array(order))
    mean, error, weight = fj.mean(state), fj.standard_error(state), fj.welford.weight(state)
    wanted, wanted_error, _, total = oracles.moments(squares, weights, np.arange(TOKENS))
    np.testing.assert_allclose(mean, wanted, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(error, wanted_error, rtol=1e-3, atol=1e-5 * float(squares.max()))
    assert weight == total


ROWS, LENGTH = 2, 3
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32),
    "v": jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32),
}
X = np.random.default_rng(2).normal(size=(ROWS * LENGTH, 2)).astype(np.float32)
Y = np.random.default_rng(3).integers(0, 4, ROWS * LENGTH)


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def measured(batch):
    """Exact squares and K-FAC's step, operation by operation: shapes differ from one example to the next."""
    with jax.disable_jit():
        fisher = fj.welford.mean(fj.group_fisher(model, estimator="exact").observe(PARAMS, batch))
        factors = fj.kfac_factors(model, fj.categorical, PARAMS, batch, damping=0.1)
        return jax.tree.leaves((fisher, fj.precondition(factors, PARAMS)))


@settings(few, max_examples=6)
@given(arrays.arrays(bool, (ROWS, LENGTH)).filter(np.any), st.sampled_from([0.0, np.nan, 1e30]))
def test_masked_tokens_are_as_if_they_were_not_there(real, garbage):
    kept = real.ravel()
    x = np.where(real[..., None], X.reshape(ROWS, LENGTH, 2), np.float32(garbage))
    y = np.where(real, Y.reshape(ROWS, LENGTH), -7)
    masked = fj.Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray(real, jnp.float32), jnp.asarray(real))
    for found, wanted in zip(
        measured(masked), measured(fj.Batch(jnp.asarray(X[kept]), jnp.asarray(Y[kept]))), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * float(jnp.abs(wanted).max()))


@settings(few, max_examples=4)
@given(st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_a_kernel_may_lie_either_way(inputs, outputs, looped):
    """A kernel ``[in, out]`` and its transpose have the same rows and columns, and the same step."""
    rng = np.random.default_rng(10 * inputs + outputs)
    kernel = jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)
    batch = fj.Batch(
        jnp.asarray(rng.normal(size=(4, inputs)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, outputs)), jnp.float32),
    )

    def there(params, x):
        return jax.lax.map(lambda row: row @ params, x) if looped else x @ params

    def transposed(params, x):
        return jax.lax.map(lambda row: params @ row, x) if looped else jnp.einsum("oi,bi->bo", params, x)

    for groups in (fj.groups.row, fj.groups.column):
        found = [
            fj.welford.mean(
                fj.group_fisher(apply, fj.gaussian, example=batch, groups=groups, estimator="exact").observe(p, batch)
            )
            for apply, p in ((there, kernel), (transposed, kernel.T))
        ]
        np.testing.assert_allclose(*found, rtol=1e-5)
    steps = [
        fj.precondition(fj.kfac_factors(apply, fj.gaussian, p, batch, damping=0.1), p)
        for apply, p in ((there, kernel), (transposed, kernel.T))
    ]
    np.testing.assert_allclose(steps[0], steps[1].T, rtol=1e-4, atol=1e-5)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0:."), min_size=1, max_size=6)
leaves = st.one_of(
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, max_side=3), elements=values),
    arrays.arrays(np.float16, arrays.array_shapes(max_dims=2, max_side=3), elements=st.floats(0, 100, width=16)),
)
trees = st.recursive(leaves, lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=6)


@settings(few, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, trees, min_size=1, max_size=3))
def test_an_exchanged_tree_has_the_same_bits(tmp_path, tree):
    path = tmp_path / "f.safetensors"
    fj.exchange.save(path, jax.tree.map(jnp.asarray, tree))
    found = fj.exchange.load(path)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert (x.dtype, x.shape, np.asarray(x).tobytes()) == (y.dtype, y.shape, y.tobytes())


@few
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=12).filter(
        lambda lengths: sum(n for n in lengths if n > 1) >= 40
    ),
    st.integers(3, 8),
    st.integers(1, 200),
    st.integers(1, 4),
)
def test_packed_targets_are_scored_at_most_once_and_in_order(lengths, seq_len, budget, rows):
    starts = np.cumsum([0, *lengths])
    documents = [
        Document(f"d{i}", " ".join(map(str, range(first, last))))
        for i, (first, last) in enumerate(itertools.pairwise(starts))
    ]
    packed = pack(
        documents, lambda text: [int(word) for word in text.split()], seq_len=seq_len, max_targets=budget,
        held_out_targets=10**6, vocab_size=10**6,
    )  # fmt: skip
    seen = []
    for part in (packed.stream, packed.held_out):
        pairs = []
        for tokens, mask, _ in part.batches(rows):
            for row, real in zip(tokens, mask, strict=True):
                kept = row[: real.sum()].tolist()
                pairs += itertools.pairwise(kept)
        assert len(pairs) == part.num_targets
        assert pairs == sorted(pairs)
        seen += pairs
    assert packed.stream.num_targets <= budget
    assert len(set(seen)) == len(seen)
    inside = {(t, t + 1) for first, last in itertools.pairwise(starts) for t in range(first, last - 1)}
    assert set(seen) <= inside
    if budget == 200:
        assert set(seen) == inside

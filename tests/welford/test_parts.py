"""Moments of parts that were folded side by side are those of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.welford.parts import of_parts

ROWS, PARTS = 16, 8
# Which rows have which document: alone, through several parts, ending where a part ends.
DOCUMENTS = (
    [0] * 16,
    list(range(16)),
    [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 4, 5, 5, 5],
    [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2],
    [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3],
    [7, 7, 7, 7, 7, 8, 8, 7, 7, 7, 9, 9, 9, 9, 9, 9],
)


@functools.cache
def whole_and_parts(unit):
    @jax.jit
    def run(values, weights, ids):
        observe = functools.partial(fj.welford.observe, unit=unit)
        whole = observe(values, weights, units=ids)
        split = jax.tree.map(lambda x: x.reshape(PARTS, -1, *x.shape[1:]), (values, weights, ids))
        parts = of_parts(jax.vmap(lambda v, w, i: observe(v, w, units=i))(*split))
        empty = fj.welford.init(whole)
        add = fj.welford.add
        return [(x, add(add(empty, x), x)) for x in (whole, parts)]

    return run


def weights_of(rng, zeros):
    weights = rng.integers(1, 4, ROWS) * 0.5
    weights[rng.permutation(ROWS)[: int(zeros * ROWS)]] = 0
    return weights.astype(np.float32)


@pytest.mark.parametrize("zeros", [0, 0.3, 0.8, 1])
@pytest.mark.parametrize("unit", ["sequence", "document", "batch"])
def test_parts_are_the_whole(unit, zeros):
    rng = np.random.default_rng(0)
    for ids in DOCUMENTS if unit == "document" else DOCUMENTS[:1]:
        values = {"a": rng.lognormal(0, 1, (ROWS, 3)).astype(np.float32), "b": rng.lognormal(9, 0.1, ROWS)}
        (whole, state), (parts, other) = whole_and_parts(unit)(values, weights_of(rng, zeros), jnp.asarray(ids))
        # Twice, so that open documents meet the next batch.
        for one, two in ((whole, parts), (state, other)):
            np.testing.assert_array_equal(fj.welford.count(one), fj.welford.count(two))
            np.testing.assert_array_equal(fj.welford.total_weight(one), fj.welford.total_weight(two))
            for read in (fj.welford.mean, fj.welford.standard_error):
                jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), read(one), read(two))


def test_parts_that_cannot_be_used_reject_the_whole():
    values = jnp.ones(ROWS).at[5].set(jnp.nan)
    _, (parts, _) = whole_and_parts("sequence")(
        {"a": values, "b": values}, jnp.ones(ROWS), jnp.zeros(ROWS, jnp.int32)
    )
    with pytest.raises(fj.RejectedBatchError, match="NaN or infinite"):
        fj.check(parts)

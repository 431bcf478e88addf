"""Overlap is 1 with itself and 0 apart; its test is hypergeometric under independence, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fisher_jax as fj


def test_a_fisher_overlaps_wholly_with_itself_and_not_with_a_disjoint_one():
    f = np.random.default_rng(0).lognormal(0, 3, 200)
    found = fj.overlap({"a": jnp.float32(f)}, {"a": jnp.float32(7 * f)}, 0.1)
    assert (round(found.fisher_overlap, 6), round(found.cosine, 6), found.jaccard, found.shared) == (1, 1, 1, 20)
    itself = fj.overlap(f, f)
    assert (itself.fisher_overlap, itself.cosine, itself.jaccard) == (1, 1, 1)
    left, right = np.where(np.arange(200) < 100, f, 0), np.where(np.arange(200) < 100, 0, f)
    apart = fj.overlap(left, right)
    assert (apart.fisher_overlap, apart.cosine, apart.jaccard, apart.shared, apart.p) == (0, 0, 0, 0, 1)


def test_the_numbers_are_their_definitions():
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(0, 1, (2, 300))
    found = fj.overlap(
        {"x": a[:100], "y": a[100:].reshape(20, 10)}, {"x": b[:100], "y": b[100:].reshape(20, 10)}, 0.2
    )
    np.testing.assert_allclose(found.fisher_overlap, np.sqrt(a / a.sum() * b / b.sum()).sum(), rtol=1e-12)
    distance = 0.5 * ((np.sqrt(a / a.sum()) - np.sqrt(b / b.sum())) ** 2).sum()
    np.testing.assert_allclose(1 - found.fisher_overlap, distance, rtol=1e-12)
    np.testing.assert_allclose(found.cosine, a @ b / np.sqrt(a @ a * b @ b), rtol=1e-12)
    tops = [set(np.argsort(-x)[:60]) for x in (a, b)]
    assert found.shared == len(tops[0] & tops[1])
    assert found.jaccard == len(tops[0] & tops[1]) / len(tops[0] | tops[1])
    assert (found.expected, found.sizes) == (12, (60, 60, 300))
    wanted = sum(scipy.stats.hypergeom.pmf(k, 300, 60, 60) for k in range(found.shared, 61))
    np.testing.assert_allclose(found.p, wanted, rtol=1e-10)


@pytest.mark.parametrize("ties", [False, True])
def test_independent_tasks_share_as_many_as_the_null_says(ties):
    """With many zeros and ties too, where sets taken by order would share far too many."""
    rng = np.random.default_rng(2)
    values = np.r_[np.zeros(60), rng.integers(1, 6, 40)].astype(float) if ties else rng.lognormal(0, 3, 100)
    found = [fj.overlap(rng.permutation(values), rng.permutation(values), 0.3) for _ in range(3000)]
    one, two, number = found[0].sizes
    counts = np.bincount([x.shared for x in found], minlength=one + 1)
    wanted = scipy.stats.hypergeom.pmf(np.arange(one + 1), number, one, two)
    some = wanted > 2e-3
    rest = np.r_[counts[some], counts[~some].sum()], 3000 * np.r_[wanted[some], wanted[~some].sum()]
    assert scipy.stats.chisquare(*rest).pvalue > 0.001
    p = np.array([x.p for x in found])
    for level in (0.2, 0.05, 0.01):
        assert np.mean(p <= level) <= level + 3 * np.sqrt(level / 3000)
    # Not only conservative: between the values that it can take, it is exact.
    np.testing.assert_allclose(np.mean(p <= np.median(p)), np.median(p), atol=0.03)


def test_ties_at_the_edge_belong_to_no_top_set():
    assert fj.overlap(np.array([5.0, 2, 2, 2]), np.array([5.0, 4, 3, 2]), 0.5).sizes == (1, 2, 4)
    flat = fj.overlap(np.ones(4), np.ones(4), 0.5)
    assert flat.sizes == (0, 0, 4)
    assert np.isnan(flat.jaccard)
    assert (flat.fisher_overlap, flat.cosine, flat.p) == (1, 1, 1)
    empty = fj.overlap(np.zeros(4), np.ones(4), 1.0)
    assert np.isnan(empty.cosine)
    assert (empty.shared, empty.sizes) == (0, (0, 4, 4))


def test_conflict_is_a_weighted_cosine():
    rng = np.random.default_rng(3)
    x, y, f, g = ({"w": rng.standard_normal((4, 3)), "b": rng.standard_normal(3)} for _ in range(4))
    f, g = (jax.tree.map(np.exp, t) for t in (f, g))
    weights = {"none": ((), 1.0), "one": ((f,), f), "pair": ((f, g), jax.tree.map(lambda a, b: np.sqrt(a * b), f, g))}
    flat = [np.concatenate([t["b"], t["w"].ravel()]) for t in (x, y)]
    for given, w in weights.values():
        w = np.ones(15) if isinstance(w, float) else np.concatenate([w["b"], w["w"].ravel()])
        found = jax.jit(lambda x, y, given=given: fj.shift.conflict(x, y, *given))(x, y)
        cosine = (w * flat[0] * flat[1]).sum() / np.sqrt((w * flat[0] ** 2).sum() * (w * flat[1] ** 2).sum())
        products = w * flat[0] * flat[1]
        np.testing.assert_allclose(found.cosine, cosine, rtol=1e-5)
        np.testing.assert_allclose(found.opposed, -products[products < 0].sum() / np.abs(products).sum(), rtol=1e-5)
    same, against = fj.shift.conflict(x, x, f), fj.shift.conflict(x, jax.tree.map(np.negative, x), f)
    np.testing.assert_allclose([same.cosine, against.cosine], [1, -1], rtol=1e-6)
    assert (float(same.opposed), float(against.opposed)) == (0, 1)
    rows = {"w": np.array([3.0, 6.0, 9.0]), "b": np.ones(3)}
    spread = {"w": np.broadcast_to(rows["w"] / 4, (4, 3)), "b": np.ones(3)}
    np.testing.assert_allclose(
        fj.shift.conflict(x, y, rows).cosine, fj.shift.conflict(x, y, spread).cosine, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fj.overlap(np.ones(3), np.ones(4)), r"array has shape \[3\] in the first Fisher and \[4\] in the"),
        (lambda: fj.overlap(np.ones(3), -np.ones(3)), "array of the second Fisher has the entry -1"),
        (lambda: fj.overlap(np.ones(3), np.ones(3), 0), r"top_fraction is a share in \(0, 1\], found 0"),
        (
            lambda: fj.shift.conflict(np.ones(3), {"a": np.ones(3)}),
            "the first direction and the second direction have diff",
        ),
        (lambda: fj.shift.conflict(np.ones(3), np.ones(3), -np.ones(3)), "array of the Fisher has the entry -1"),
        (
            lambda: fj.shift.conflict(np.ones(3), np.ones(3), None, np.ones(3)),
            "other= is the Fisher of",
        ),
    ],
)
def test_bad_input_is_one_sentence_that_names_it(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()

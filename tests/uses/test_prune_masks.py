"""Masks keep exactly the units that a sort by hand keeps; saliency is the growth of a quadratic loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj


def kept_by_hand(scores, sparsity):
    """Indices that stay: sorted by score, the earlier first where equal."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return set(order[: len(scores) - round(sparsity * len(scores))])


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.25, 0.5, 1 - 3 / 37, 1])
@pytest.mark.parametrize("integers", [False, True])
def test_a_row_vector_keeps_an_exact_number_whatever_the_ties(sparsity, integers):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, 37) if integers else rng.standard_normal(37)
    for given in (scores.astype(np.float32), jnp.asarray(scores, jnp.float32)):
        mask = fj.prune_mask(given, sparsity)
        assert mask.dtype == bool
        assert set(np.flatnonzero(mask)) == kept_by_hand(scores.astype(np.float32), sparsity)
        np.testing.assert_array_equal(fj.prune_mask(given, sparsity, structured=False), mask)


def test_every_number_of_kept_rows_can_be_asked_for():
    scores = np.zeros(49, np.float32)
    assert [int(fj.prune_mask(scores, 1 - keep / 49).sum()) for keep in range(50)] == list(range(50))


def tree():
    rng = np.random.default_rng(1)
    return {"a": rng.random((5, 3)).astype(np.float32), "b": rng.random(4).astype(np.float32), "c": np.float32(0.7)}


@pytest.mark.parametrize("axis", [0, -1])
def test_whole_units_of_a_tree_are_compared_by_their_sums(axis):
    scores = tree()
    sums = [*scores["a"].sum(1 if axis == 0 else 0), *scores["b"], scores["c"]]
    kept = kept_by_hand(sums, 0.4)
    mask = fj.prune_mask(jax.tree.map(jnp.asarray, scores), 0.4, axis=axis)
    assert jax.tree.map(np.shape, mask) == jax.tree.map(np.shape, scores)
    rows = np.asarray(mask["a"]) if axis == 0 else np.asarray(mask["a"]).T
    assert (rows == rows[:, :1]).all()
    found = [*rows[:, 0], *np.asarray(mask["b"]), mask["c"]]
    assert set(np.flatnonzero(found)) == kept


def test_entries_of_a_tree_globally_and_tensor_by_tensor():
    scores = tree()
    flat = np.concatenate([x.ravel() for x in scores.values()])
    found = fj.prune_mask(scores, 0.3, structured=False)
    assert set(np.flatnonzero(np.concatenate([x.ravel() for x in found.values()]))) == kept_by_hand(flat, 0.3)
    found = fj.prune_mask(scores, 0.4, structured=False, scope="tensor")
    for name, x in scores.items():
        assert set(np.flatnonzero(found[name])) == kept_by_hand(x.ravel(), 0.4)


def test_masks_are_the_same_inside_jit():
    scores = jax.tree.map(jnp.asarray, tree())
    inside = jax.jit(lambda s: fj.prune_mask(s, 0.4))(scores)
    jax.tree.map(np.testing.assert_array_equal, inside, fj.prune_mask(scores, 0.4))


def test_float64_scores_on_the_host_are_not_rounded_into_ties():
    scores = np.array([1.0, 1.0 + 1e-12, 1.0 - 1e-12])
    assert fj.prune_mask(scores, 1 / 3).tolist() == [True, True, False]
    assert fj.prune_mask(scores, 2 / 3).tolist() == [False, True, False]


def test_saliency_is_the_growth_of_a_quadratic_loss():
    rng = np.random.default_rng(2)
    p, f = rng.standard_normal((2, 4, 3)), rng.random((4, 3))
    with jax.enable_x64(True):
        found = fj.saliency({"w": jnp.asarray(p)}, {"w": jnp.asarray(np.stack([f, f]))})["w"]
        rows = fj.saliency({"w": jnp.asarray(p)}, {"w": jnp.asarray(f.sum(1)[None, :, None])})["w"]
    for k in np.ndindex(p.shape):
        zeroed = p.copy()
        zeroed[k] = 0
        growth = 0.5 * np.sum(f * (zeroed - p) ** 2)
        np.testing.assert_allclose(found[k], growth, rtol=1e-14)
    # A sum over rows is spread evenly over the 2 * 3 parameters of its group.
    wanted = [0.5 * f[i].sum() / 6 * np.sum(p[:, i] ** 2) for i in range(4)]
    np.testing.assert_allclose(np.asarray(rows).ravel(), wanted, rtol=1e-14)


def test_saliency_reads_states_and_keeps_the_shape_of_groups():
    values = jnp.asarray(np.random.default_rng(3).random((6, 5)), jnp.float32)
    moments = fj.welford.observe({"w": values})
    state = fj.welford.add(fj.welford.init(moments), moments)
    params = {"w": jnp.ones((5, 3), jnp.bfloat16)}
    for x in (moments, state, {"w": values.mean(0)}):
        found = fj.saliency(params, x)["w"]
        assert (found.shape, found.dtype) == ((5,), jnp.float32)
        np.testing.assert_allclose(found, values.mean(0) / 2, rtol=1e-6)
    np.testing.assert_allclose(fj.per_parameter(state, params)["w"], values.mean(0)[:, None] / 3, rtol=1e-6)


def test_a_mask_applied_leaves_the_bits_of_what_stays():
    params = {"w": jnp.asarray(np.random.default_rng(4).standard_normal((4, 3)), jnp.bfloat16), "b": jnp.ones(3)}
    mask = {"w": jnp.array([True, False, True, True]), "b": jnp.array(False)}
    found = fj.stats.apply_mask(params, mask)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["w"], np.where([[1], [0], [1], [1]], params["w"], 0))
    assert found["b"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fj.prune_mask(jnp.ones(3), 1.5), r"sparsity is the share to prune, in \[0, 1\], found 1.5"),
        (lambda: fj.prune_mask(jnp.ones(3), float("nan")), "sparsity is the share"),
        (lambda: fj.prune_mask(jnp.ones(3), 0.5, scope="layer"), "scope is 'global' or 'tensor'"),
        (lambda: fj.prune_mask({"a": jnp.ones(3)}, 0.5, axis=1), r"\['a'\] of the scores has 1 axes and no axis 1"),
        (lambda: fj.prune_mask({"a": jnp.array([1, jnp.nan])}, 0.5), r"\['a'\] of the scores has a NaN"),
        (
            lambda: fj.saliency({"a": jnp.ones(2)}, {"b": jnp.ones(2)}),
            r"only in the parameters: \['a'\]; only in the",
        ),
        (lambda: fj.saliency({"a": jnp.ones(2)}, {"a": jnp.ones(3)}), r"\['a'\] has shape \[3\] in the Fisher"),
        (lambda: fj.saliency({"a": jnp.ones(2)}, {"a": -jnp.ones(2)}), r"\['a'\] of the Fisher has the entry -1"),
        (lambda: fj.saliency({"a": jnp.ones((2, 2))}, {"a": jnp.ones(2)}), r"reshape it to \[1, 2\] or \[2, 1\]"),
        (
            lambda: fj.stats.apply_mask(jnp.ones(2), jnp.ones(2)),
            "array of the mask has dtype float32; a mask is boolean",
        ),
    ],
)
def test_bad_input_is_one_sentence_that_names_it(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()

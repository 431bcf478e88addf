"""The one place that shifts: outputs at ``t`` are scored against the token at ``t + 1``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

TOKENS = np.arange(10, 22).reshape(2, 6)


def test_position_t_is_scored_against_token_t_plus_1():
    batch = fj.next_token_batch(jnp.asarray(TOKENS))
    for t in range(5):
        np.testing.assert_array_equal(batch.inputs[:, t], TOKENS[:, t])
        np.testing.assert_array_equal(batch.targets[:, t], TOKENS[:, t + 1])
    np.testing.assert_array_equal(batch.weights, np.ones((2, 5)))
    assert batch.weights.dtype == jnp.float32
    assert batch.real is None  # without a mask nothing is padding
    assert batch.units is None


@pytest.mark.parametrize("mask", ["left", "right", "hole"])
def test_a_token_is_scored_only_if_it_and_its_predecessor_are_real(mask):
    mask = {"left": [0, 0, 1, 1, 1, 1], "right": [1, 1, 1, 1, 0, 0], "hole": [1, 1, 0, 1, 1, 1]}[mask]
    batch = fj.next_token_batch(jnp.asarray(TOKENS), mask=jnp.asarray([mask, [1] * 6]))
    expected = [float(mask[t] and mask[t + 1]) for t in range(5)]
    np.testing.assert_array_equal(batch.weights, [expected, [1.0] * 5])
    np.testing.assert_array_equal(batch.real, [[bool(m) for m in mask[:-1]], [True] * 5])


def test_loss_mask_weighs_the_token_that_is_predicted_and_leaves_real_alone():
    loss_mask = np.array([[9.0, 0.0, 0.0, 0.5, 1.0, 0.25]] * 2)
    mask = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    batch = fj.next_token_batch(jnp.asarray(TOKENS), jnp.asarray(mask), jnp.asarray(loss_mask))
    np.testing.assert_array_equal(batch.weights, [[0, 0, 0.5, 1, 0], [0, 0, 0.5, 1, 0.25]])
    # The prompt has no loss and is real all the same.
    np.testing.assert_array_equal(batch.real, mask[:, :-1].astype(bool))


def test_masks_of_any_dtype_mean_the_same():
    mask = np.array([[0, 1, 1, 1, 1, 0]] * 2)
    found = [
        fj.next_token_batch(jnp.asarray(TOKENS), jnp.asarray(mask, d), jnp.asarray(mask, d))
        for d in (bool, jnp.int8, jnp.float32)
    ]
    for batch in found:
        np.testing.assert_array_equal(batch.weights, [[0, 1, 1, 1, 0]] * 2)
        assert batch.weights.dtype == jnp.float32
        assert batch.real.dtype == bool


def test_a_mask_that_is_neither_real_nor_not_makes_no_batch():
    mask = jnp.ones((2, 6)).at[0, 5].set(jnp.array([jnp.nan])[0])
    for odd in (mask, jnp.where(jnp.isnan(mask), 0.5, mask)):
        assert np.isnan(jax.jit(fj.next_token_batch)(jnp.asarray(TOKENS), odd).weights).all()


def test_units_are_kept_per_row_and_a_batch_is_a_pytree():
    batch = fj.next_token_batch(jnp.asarray(TOKENS), units=jnp.array([7, 9]))
    doubled = jax.jit(lambda b: jax.tree.map(lambda x: x * 2, b))(batch)
    assert isinstance(doubled, fj.Batch)
    np.testing.assert_array_equal(doubled.units, [14, 18])
    np.testing.assert_array_equal(doubled.targets, 2 * TOKENS[:, 1:])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"tokens": np.ones((2, 3), np.float32)}, TypeError, "tokens are integer ids"),
        ({"tokens": np.ones(3, int)}, ValueError, r"\[3\]"),
        ({"tokens": np.ones((2, 1), int)}, ValueError, "length >= 2"),
        ({"tokens": TOKENS, "mask": np.ones((2, 5))}, ValueError, "mask has the shape of tokens"),
        ({"tokens": TOKENS, "loss_mask": np.ones((6, 2))}, ValueError, "loss_mask has the shape of tokens"),
        ({"tokens": TOKENS, "units": np.ones(2, np.float32)}, TypeError, "units are integer ids"),
        ({"tokens": TOKENS, "units": np.ones(3, int)}, ValueError, r"\[2\], found shape \[3\]"),
    ],
)
def test_impossible_batches_are_refused_in_words(arguments, error, words):
    with pytest.raises(error, match=words):
        fj.next_token_batch(**arguments)

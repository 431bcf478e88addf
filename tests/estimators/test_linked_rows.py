"""Rows that depend on each other: what runs a row alone refuses them, and what takes the batch as it is does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from tests.estimators.linked_rows import LINKED, OPEN, B, inputs, params, routed

LABELS = np.array([0, 3, 1, 4])


def batch():
    return fj.Batch(inputs(), jnp.asarray(LABELS))


def summed_loss(apply_fn):
    return lambda p, x: jnp.sum(fj.categorical.log_prob(apply_fn(p, x), jnp.asarray(LABELS)))


def by_taps(apply_fn, **options):
    _, _, taps = fj.value_grad_and_taps(summed_loss(apply_fn))(params(), inputs())
    fisher = fj.group_fisher(apply_fn, estimator="sequence", **options)
    return fj.mean(fisher.update(fisher.init(params()), params(), batch(), taps=taps))


def scores(apply_fn, x=None):
    """The score of every row in the batch as it is, in float64: a loop of ``jax.grad``."""
    with jax.enable_x64(True):
        p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params())
        x = jnp.asarray(inputs(), jnp.float64) if x is None else x

        def log_prob(p, row):
            return jax.nn.log_softmax(apply_fn(p, x))[row, LABELS[row]]

        found = [jax.tree.map(np.asarray, jax.grad(log_prob)(p, row)) for row in range(B)]
    return jax.tree.map(lambda *rows: np.stack(rows), *found)


def assert_close(found, wanted, rtol=2e-4):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        scale = max(np.abs(y).max(), 1e-3)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))


def squares(apply_fn):
    return jax.tree.map(lambda s: (s**2).mean(0), scores(apply_fn))


def by_row(apply_fn, **options):
    options = {"estimator": "sequence", "example": batch(), **options}
    fisher = fj.group_fisher(apply_fn, **options)
    state = fisher.init(params())
    return fj.mean(jax.jit(fisher.update)(state, params(), batch(), jax.random.key(0)))


@pytest.mark.parametrize("name", LINKED)
def test_rows_that_depend_on_each_other_are_refused_by_row(name):
    apply_fn, operation = LINKED[name]
    with pytest.raises(ValueError, match=operation) as error:
        by_row(apply_fn)
    assert "linked_rows.py:" in str(error.value) or "rows 3" in operation, str(error.value)


@pytest.mark.parametrize("name", OPEN)
def test_rows_that_stand_alone_are_open(name):
    assert_close(by_row(OPEN[name]), squares(OPEN[name]))


NORM = LINKED["batch norm by hand"][0]
DROPOUT = LINKED["dropout of the batch's shape"][0]


@pytest.mark.parametrize(
    "call",
    [
        lambda f: by_row(f, estimator="signs", unit="sequence", example=None),
        lambda f: by_row(f, estimator="sampled", unit="sequence"),
        lambda f: by_row(f, unit="batch"),
        by_taps,
        lambda f: fj.block_spectrum(f, fj.categorical, params(), batch()),
        lambda f: fj.block_spectrum(f, fj.categorical, params(), batch(), unit="sequence"),
        lambda f: fj.spectra.block_spectra(f, example=batch()).init(params()),
        lambda f: jax.jit(lambda s: fj.spectra.block_spectra(f).update(s, params(), batch()))(
            fj.spectra.block_spectra(lambda p, x: x @ p["w"] @ p["head"]).init(params())),
        lambda f: fj.operators.ggn(f, fj.categorical, params(), batch(), microbatch_size=2),
        lambda f: fj.operators.hessian(f, fj.categorical, params(), batch(), microbatch_size=1),
    ],
)  # fmt: skip
def test_whatever_takes_rows_apart_refuses_a_batch_norm(call):
    with pytest.raises(ValueError, match=r"reduce_sum at linked_rows.py:\d+ goes over rows.*running statistics"):
        call(NORM)


@pytest.mark.parametrize("model", [NORM, DROPOUT, LINKED["experts with room for few"][0]])
def test_exact_and_head_take_the_batch_as_it_is(model):
    wanted = squares(model)
    for options in ({"estimator": "exact"}, {"estimator": "exact", "unit": "sequence"}):
        fisher = fj.group_fisher(model, **options)
        assert_close(fj.mean(fisher.update(fisher.init(params()), params(), batch())), wanted)
    fisher = fj.group_fisher(model, estimator="head", example=batch())
    state = fisher.update(fisher.init(params()), params(), batch())
    assert_close(fj.mean(state)["head"], wanted["head"])


def test_signs_of_the_batch_are_unbiased_where_rows_depend_on_each_other():
    """Over all signs of four tokens the estimate is exact; many draws come near."""
    fisher = fj.group_fisher(NORM, num_samples=4000)
    found = fj.mean(fisher.observe(params(), batch(), jax.random.key(0)))
    for path, wanted in jax.tree_util.tree_leaves_with_path(squares(NORM)):
        error = np.abs(found[path[0].key] - wanted).max()
        assert error < 0.1 * np.abs(wanted).max() + 1e-6, path


def test_an_empirical_fisher_is_that_of_the_batch():
    every = jnp.asarray(scores(NORM)["w"].reshape(B, -1), jnp.float32)
    v = jax.tree.map(jnp.zeros_like, params()) | {"w": jnp.arange(9.0).reshape(3, 3) - 4}
    found = fj.operators.empirical_fisher(NORM, fj.categorical, params(), batch())(v)["w"]
    np.testing.assert_allclose(found.ravel(), every.T @ (every @ v["w"].ravel()) / B, rtol=1e-3, atol=1e-6)


def test_taps_of_a_dropout_are_those_of_the_batch():
    assert_close(by_taps(DROPOUT), squares(DROPOUT))
    assert_close(by_taps(LINKED["a constant table by place"][0]), squares(LINKED["a constant table by place"][0]))


def test_taps_of_permuted_rows_are_refused():
    for name in ("rows reversed", "rows rolled"):
        with pytest.raises(ValueError, match="undo the order at the outputs"):
            by_taps(LINKED[name][0])


def test_values_decide_where_the_program_does_not_say():
    """With room for all tokens an expert's dispatch links no rows."""
    roomy, narrow = routed(B), routed(1)
    assert_close(by_row(roomy), squares(roomy))
    with pytest.raises(ValueError, match="cannot be cut into rows"):
        by_taps(roomy)
    with pytest.raises(ValueError, match=r"row \d alone has other outputs than in its batch; for an expert"):
        by_row(narrow)
    with pytest.raises(ValueError, match=r"row \d among other rows has other outputs"):
        by_taps(narrow)
    with pytest.raises(ValueError, match="a block spectrum runs every row"):
        fj.block_spectrum(narrow, fj.categorical, params(), batch())


def shapes():
    return jax.eval_shape(batch)


def test_under_jit_alone_it_is_the_users_word():
    roomy = routed(B)
    with pytest.raises(ValueError, match=r"does not say .* cumsum at linked_rows\.py"):
        by_row(roomy, example=shapes())
    assert_close(by_row(roomy, example=shapes(), rows_independent=True), squares(roomy))
    fisher = fj.group_fisher(roomy, estimator="sequence")
    state = fisher.update(fisher.init(params()), params(), batch())  # values have shown it
    assert_close(fj.mean(jax.jit(fisher.update)(state, params(), batch())), squares(roomy))


def test_equal_rows_and_shut_gates_show_nothing():
    """A zero before the head hides what links the rows from the outputs, and equal rows from everything."""
    narrow = routed(1)
    fisher = fj.group_fisher(narrow, estimator="sequence", example=batch())
    with pytest.raises(ValueError, match="than in its batch"):
        fisher.init(jax.tree.map(jnp.zeros_like, params()))
    same = fj.Batch(jnp.ones_like(inputs()), jnp.asarray(LABELS))
    with pytest.raises(ValueError, match="rows that differ"):
        fj.group_fisher(routed(B), estimator="sequence", example=same).init(params())


def test_keys_for_each_row_are_inputs():
    def model(p, given):
        def one(x, key):
            h = x @ p["w"]
            return jnp.where(jax.random.uniform(key, h.shape, jnp.float32) < 0.6, h, 0) @ p["head"]

        return jax.vmap(one)(given["x"], given["key"])

    for key in (jax.random.split(jax.random.key(0), B), jax.random.split(jax.random.PRNGKey(0), B)):
        given = fj.Batch({"x": inputs(), "key": key}, jnp.asarray(LABELS))
        fisher = fj.group_fisher(model, estimator="sequence", example=given)
        found = fj.mean(jax.jit(fisher.update)(fisher.init(params()), params(), given))
        assert_close(found, squares(lambda p, x, key=key, model=model: model(p, {"x": x, "key": key})))


def test_a_mask_as_large_as_the_batch_is_not_taken_for_one_of_rows():
    """``[S, S]`` for all rows, of which there are as many: row by row it would be cut in pieces."""
    causal = jnp.tril(jnp.ones((B, B)))

    def model(p, given):
        x = jnp.stack([given["x"] @ p["w"] + i for i in range(B)], 1)
        scores = jnp.where(given["mask"], jnp.einsum("bqd,bkd->bqk", x, x), -1e9)
        return (jax.nn.softmax(scores) @ x).mean(1) @ p["head"]

    given = fj.Batch({"x": inputs(), "mask": causal > 0}, jnp.asarray(LABELS))
    fisher = fj.group_fisher(model, estimator="sequence", example=given)
    with pytest.raises(ValueError, match="rows_independent"):
        fisher.init(params())


def test_one_row_links_nothing():
    one = fj.Batch(inputs()[:1], jnp.asarray(LABELS[:1]))
    fisher = fj.group_fisher(LINKED["softmax over rows"][0], estimator="sequence")
    assert float(fj.mean(fisher.update(fisher.init(params()), params(), one))["head"].sum()) > 0


def test_rows_independent_is_none_or_true():
    with pytest.raises(ValueError, match="rows_independent"):
        fj.group_fisher(NORM, rows_independent=False)


def test_a_model_that_cannot_run_one_row_says_so():
    with pytest.raises(ValueError, match="cannot run one row: take the number of rows from the inputs"):
        by_row(lambda p, x: (x.reshape(2, 2, 3) @ p["w"] @ p["head"]).reshape(B, -1))

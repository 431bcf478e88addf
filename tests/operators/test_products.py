"""Products of every operator against dense float64 matrices, and what must not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisher_jax as fj
from fisher_jax._support.errors import RejectedBatchError
from tests import oracle_curvature

B, S, D, K = 4, 3, 3, 4
KINDS = ("ggn", "fisher", "empirical_fisher", "hessian")
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


def apply_fn(params, inputs):
    """A model whose positions mix: a running mean stands for attention."""
    x = params["embed"][inputs]
    x = x + jnp.cumsum(jnp.tanh(x @ params["mix"]["kernel"]), 1) / 3
    return x @ params["head"] + params["bias"]


@functools.cache
def problem(name="categorical"):
    """Parameters, inputs, targets and weights (some zero, some fractional) in float64."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (5, D), "mix": {"kernel": (D, D)}, "head": (D, K), "bias": (K,)}
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda s: jnp.asarray(rng.standard_normal(s)), shapes, is_leaf=lambda s: isinstance(s, tuple)
        )
    targets = {
        "categorical": rng.integers(0, K, (B, S)), "bernoulli": rng.random((B, S, K)),
        "gaussian": rng.standard_normal((B, S, K)),
    }[name]  # fmt: skip
    weights = rng.integers(0, 3, (B, S)) * 0.5
    weights[1] = 0
    return params, rng.integers(0, 5, (B, S)), targets, weights


def batch_of(name="categorical", spoil=False):
    """With ``spoil`` whatever has no weight is given a target that cannot be."""
    _, inputs, targets, weights = problem(name)
    if spoil:
        keep = (weights > 0).reshape(weights.shape + (1,) * (targets.ndim - 2))
        targets = np.where(keep, targets, 99 if name == "categorical" else np.nan)
    return fj.Batch(jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(weights))


@functools.cache
def reference(kind, name):
    with jax.enable_x64(True):
        return oracle_curvature.dense(kind, apply_fn, name, *problem(name))


def make(kind, params=None, batch=None, name="categorical", **options):
    params = problem(name)[0] if params is None else params
    batch = batch_of(name) if batch is None else batch
    return getattr(fj.operators, kind)(apply_fn, getattr(fj, name), params, batch, **options)


def matrix(matvec, like):
    """All columns of an operator on trees like ``like``."""
    flat, unravel = ravel_pytree(like)
    columns = jax.jit(lambda mv, basis: jax.lax.map(lambda e: ravel_pytree(mv(unravel(e)))[0], basis))
    return np.asarray(columns(matvec, jnp.eye(flat.size, dtype=flat.dtype))).T


def assert_matrix(found, wanted, tolerance=1e-10):
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_dense_matrix_and_symmetric(kind, name):
    with jax.enable_x64(True):
        found = matrix(make(kind, batch=batch_of(name, spoil=True), name=name), problem(name)[0])
    assert_matrix(found, reference(kind, name))
    assert np.abs(found - found.T).max() < 1e-14 * np.abs(found).max()
    smallest = np.linalg.eigvalsh(found).min() / np.abs(found).max()
    assert smallest < -1e-3 if kind == "hessian" else smallest > -1e-13


def test_without_weights_every_token_counts_once():
    params, inputs, targets, _ = problem()
    with jax.enable_x64(True):
        wanted = oracle_curvature.dense("hessian", apply_fn, "categorical", params, inputs, targets, np.ones((B, S)))
        batch = fj.Batch(jnp.asarray(inputs), jnp.asarray(targets))
        assert_matrix(matrix(make("hessian", batch=batch), params), wanted)


OPTIONS = {
    "micro-batches of one row": {"microbatch_size": 1},
    "rematerialised by a policy": {"remat": jax.checkpoint_policies.dots_saveable},
    "linearised once": {"keep_linearization": True},
    "micro-batches, rematerialised": {"microbatch_size": 2, "remat": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_options_change_costs_not_products(kind, option):
    with jax.enable_x64(True):
        v = jax.tree.map(jnp.cos, problem()[0])
        found = ravel_pytree(make(kind, batch=batch_of(spoil=True), **OPTIONS[option])(v))[0]
        wanted = reference(kind, "categorical") @ ravel_pytree(v)[0]
        assert_matrix(found, wanted)


def test_an_operator_over_many_batches_is_that_of_all_tokens():
    """Batches of different weight, one of them empty."""
    whole = batch_of()
    rows = [slice(0, 1), slice(1, 2), slice(2, 4)]
    batches = [fj.Batch(whole.inputs[r], whole.targets[r], whole.weights[r]) for r in rows]
    assert float(batches[1].weights.sum()) == 0
    with jax.enable_x64(True):
        params = problem()[0]
        v = jax.tree.map(jnp.cos, params)
        for kind, options in (("ggn", {}), ("empirical_fisher", {"keep_linearization": True})):
            matvec = fj.operators.over_batches(lambda b, k=kind, o=options: make(k, batch=b, **o), batches)
            assert_matrix(ravel_pytree(matvec(v))[0], reference(kind, "categorical") @ ravel_pytree(v)[0])
    with pytest.raises(TypeError, match="iterator"):
        fj.operators.over_batches(lambda b: make("ggn", batch=b), iter(batches))
    with pytest.raises(RejectedBatchError, match="empty"):
        fj.operators.over_batches(lambda b: make("ggn", batch=b), batches[1:2])(v)
    with pytest.raises(TypeError, match=r"fj\.operators"):
        fj.operators.total_weight(jax.tree_util.Partial(jnp.sin))


CHOICES = {
    "a pattern": r"mix|head",
    "a predicate": lambda path, leaf: leaf.ndim == 2 and "embed" not in path,
    "booleans": {"embed": False, "mix": True, "head": True, "bias": False},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kept", [False, True])
def test_a_restricted_operator_is_a_block_of_the_whole(choice, kept):
    with jax.enable_x64(True):
        params = problem()[0]
        like = fj.operators.restrict(params, CHOICES[choice])
        assert like["embed"] is None
        assert like["bias"] is None
        found = matrix(make("hessian", parameters=CHOICES[choice], keep_linearization=kept), like)
    marks = {"embed": 0.0, "mix": 1.0, "head": 1.0, "bias": 0.0}
    marks = jax.tree.map(lambda m, p: jnp.full(p.shape, m), jax.tree.broadcast(marks, params), params)
    inside = np.flatnonzero(ravel_pytree(marks)[0])
    assert_matrix(found, reference("hessian", "categorical")[np.ix_(inside, inside)])


def test_new_numbers_do_not_recompile():
    traces = []

    def counted(params, inputs):
        traces.append(None)
        return apply_fn(params, inputs)

    params = jax.tree.map(lambda x: x.astype(jnp.float32), problem()[0])
    run = jax.jit(lambda matvec, v: matvec(v))
    for options in ({}, {"keep_linearization": True}, {"parameters": "mix", "microbatch_size": 2}):
        v = fj.operators.restrict(params, options.get("parameters"))
        before = None
        for scale in (1.0, 2.0, 3.0):
            new = jax.tree.map(lambda x, s=scale: s * x, params)
            matvec = fj.operators.hessian(counted, fj.categorical, new, batch_of(), **options)
            outside = len(traces)
            found = run(matvec, v)
            assert jax.tree.structure(found) == jax.tree.structure(v)
            if scale > 1:
                # Making an operator looks at the shapes of the outputs once, with micro-batches also at the program
                # of one row, and at which of two inputs has positions of its own; a product traces nothing any more.
                assert len(traces) == outside <= before + (5 if "microbatch_size" in options else 1)
            before = len(traces)


def test_an_operator_may_be_made_and_used_inside_jit_and_vmap():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), problem()[0])
    many = jax.tree.map(lambda x: jnp.stack([jnp.cos(x), jnp.sin(x)]), params)

    def run(params, batch, v):
        return make("ggn", params, batch)(v)

    found = jax.jit(jax.vmap(run, (None, None, 0)))(params, batch_of(), many)
    for i in range(2):
        v = jax.tree.map(lambda x, i=i: x[i], many)
        wanted = reference("ggn", "categorical") @ ravel_pytree(v)[0]
        assert_matrix(ravel_pytree(jax.tree.map(lambda x, i=i: x[i], found))[0], wanted, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_parameters_have_float32_products(kind):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem()[0])
    v = jax.tree.map(lambda x: jnp.cos(x.astype(jnp.float32)), params)
    found = make(kind, params)(v)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    assert_matrix(ravel_pytree(found)[0], reference(kind, "categorical") @ ravel_pytree(v)[0], 0.05)


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def test_padding_is_never_read():
    """NaN in inputs of rows without weight and at padded positions, out-of-range labels there: nothing shows."""
    rng = np.random.default_rng(1)
    params = {"a": rng.standard_normal((D, D)), "b": rng.standard_normal((D, K))}
    x, y = rng.standard_normal((3, S, D)), rng.integers(0, K, (3, S))
    weights, real = np.ones((3, S)), np.ones((3, S))
    weights[0], weights[1, 2], real[1, 2], weights[2, 0] = 0, 0, 0, 0
    bad_x, bad_y = x.copy(), y.copy()
    bad_x[0], bad_x[1, 2], bad_y[0], bad_y[1, 2] = np.nan, np.inf, -1, 99
    with jax.enable_x64(True):
        v = jax.tree.map(np.cos, params)
        for kind in ("empirical_fisher", "hessian"):
            for size in (1,) if kind == "hessian" else (None,):
                one, two = (
                    getattr(fj.operators, kind)(
                        mlp, fj.categorical, params, fj.Batch(a, b, weights, real), microbatch_size=size
                    )(v)
                    for a, b in ((x, y), (bad_x, bad_y))
                )
                np.testing.assert_array_equal(ravel_pytree(one)[0], ravel_pytree(two)[0])
        bad_x[2, 0] = np.nan  # a prompt: no weight, but read
        found = fj.operators.ggn(mlp, fj.categorical, params, fj.Batch(bad_x, bad_y, weights, real))(v)
        assert bool(jnp.isnan(ravel_pytree(found)[0]).any())


def test_outputs_without_weight_are_never_read():
    """A model whose outputs are not finite at a token that does not count."""
    params = {"w": jnp.ones((D, K)) * jnp.arange(K)}

    def model(p, inputs):
        x, counts = inputs
        return x @ p["w"] + jnp.log(counts)[..., None]

    x, weights = jnp.cos(jnp.arange(3.0 * D)).reshape(3, D), jnp.array([1.0, 0.0, 1.0])
    for kind in KINDS:
        one, two = (
            getattr(fj.operators, kind)(
                model, fj.categorical, params, fj.Batch((x, jnp.array(counts)), jnp.array([0, 1, 2]), weights)
            )({"w": jnp.sin(params["w"])})
            for counts in ([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
        )
        np.testing.assert_array_equal(one["w"], two["w"])


BAD = {
    "empty": {"weights": np.zeros((B, S))},
    "negative": {"weights": -np.ones((B, S))},
    "outside": {"targets": np.full((B, S), K)},
}


UNDER_JIT = ({}, {"microbatch_size": 2}, {"keep_linearization": True})


@functools.cache
def product_under_jit(index):
    """An operator made and used inside ``jit``, compiled once for all bad batches."""
    return jax.jit(lambda params, batch: make("hessian", params, batch, **UNDER_JIT[index])(params))


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_batch_raises_and_is_nan_under_jit(bad):
    good = batch_of()
    batch = fj.Batch(good.inputs, BAD[bad].get("targets", good.targets), BAD[bad].get("weights", good.weights))
    batch = jax.tree.map(jnp.asarray, batch)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), problem()[0])
    with pytest.raises(RejectedBatchError, match=bad):
        make("hessian", params, batch)
    for index, options in enumerate(UNDER_JIT):
        assert all(np.isnan(x).all() for x in jax.tree.leaves(product_under_jit(index)(params, batch))), options


def test_what_cannot_be_is_said():
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), problem()[0]), batch_of()
    wrong = params | {"bias": params["bias"].astype(jnp.complex64)}
    with pytest.raises(ValueError, match=r"\['bias'\] has dtype complex64"):
        make("ggn", wrong)
    with pytest.raises(ValueError, match=r"\['bias'\] is of type str"):
        make("ggn", params | {"bias": "zero"})
    with pytest.raises(ValueError, match=r"selects no floating parameter; there are: .*'bias'"):
        make("ggn", params, parameters="nothing")
    with pytest.raises(ValueError, match="tree of booleans"):
        make("ggn", params, parameters={"embed": True})
    with pytest.raises(ValueError, match=r"found int for .*'bias'"):
        make("ggn", params, parameters={"embed": True, "mix": True, "head": True, "bias": 3})
    with pytest.raises(ValueError, match=r"number of rows, 4; found 3"):
        make("ggn", params, microbatch_size=3)
    with pytest.raises(ValueError, match="no microbatch_size"):
        make("ggn", params, microbatch_size=2, keep_linearization=True)
    with pytest.raises(ValueError, match=r"weights .* \[4, 3\], found \[4\]"):
        make("ggn", params, fj.Batch(batch.inputs, batch.targets, jnp.ones(4)))
    with pytest.raises(ValueError, match=r"targets of shape \[4\] do not fit categorical outputs"):
        make("hessian", params, fj.Batch(batch.inputs, batch.targets[:, 0]))
    with pytest.raises(ValueError, match=r"one floating array \[..., K\], found tuple"):
        fj.operators.ggn(lambda p, x: (apply_fn(p, x),), fj.categorical, params, batch)
    with pytest.raises(ValueError, match="has the structure of the moving parameters"):
        make("ggn", params, parameters="mix")(params)
    with pytest.raises(
        ValueError, match=r"\['bias'\] is a floating array of shape \[4\], found float32 of shape \[1\]"
    ):
        make("ggn", params)(params | {"bias": jnp.ones(1)})


def test_integer_leaves_are_frozen_and_cannot_be_named():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), problem()[0]) | {"step": jnp.array(3)}
    like = fj.operators.restrict(params)
    assert like["step"] is None
    found = make("ggn", params)(like)
    assert found["step"] is None
    floats = {k: v for k, v in params.items() if k != "step"}
    np.testing.assert_array_equal(ravel_pytree(found)[0], ravel_pytree(make("ggn", floats)(floats))[0])
    with pytest.raises(ValueError, match=r"\['step'\] has dtype int32 and cannot be differentiated"):
        make("ggn", params, parameters="step|bias")

"""The closed forms against automatic differentiation, token by token, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from tests import oracles

B, S, V, H = 5, 7, 23, 4
IDS = {
    "token": np.arange(B * S),
    "sequence": np.repeat(np.arange(B), S),
    "document": np.repeat([4, 4, 9, 9, 1], S),
    "batch": np.zeros(B * S, int),
}
KINDS = ("empirical", "true")
OPTIONS = {
    "empirical": {"kind": ("empirical",)},
    "true": {"kind": ("true",)},
    "plain": {"kind": KINDS},
    "tempered": {"kind": ("true",), "temperature": 0.7},
    "capped": {"kind": KINDS, "soft_cap": 3.0},
}
C = 30  # the constant of the docstring: c eps (1 + max |z|)


@functools.cache
def problem(scale: float):
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((B, S, H)), rng.standard_normal((V, H)) * scale
    # Numbers that float32 holds exactly, so that both precisions see one problem.
    hidden, head, bias = (x.astype(np.float32).astype(np.float64) for x in (hidden, head, rng.standard_normal(V)))
    weights = rng.integers(0, 4, (B, S)) * 0.5
    weights[2] = 0
    return hidden, head, rng.integers(0, V, (B, S)), weights, bias


@functools.cache
def reference(scale: float, options: str, kind: str):
    hidden, head, targets, _, bias = problem(scale)
    more = OPTIONS[options] | {"kind": kind}
    return oracles.head_squared_scores(hidden.reshape(-1, H), head, targets.ravel(), bias=bias, **more)


def largest_logit(scale, soft_cap=None, **_):
    hidden, head, _, _, bias = problem(scale)
    z = hidden @ head.T + bias
    return np.abs(z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)).max()


@functools.partial(jax.jit, static_argnames=("options", "group", "unit", "chunk_size"))
def measure(hidden, head, bias, targets, weights, *, options, group, unit, **more):
    units = jnp.asarray(IDS["document"][::S]) if unit == "document" else None
    found, log_likelihood = fj.lm_head.moments(
        hidden, head, targets, weights, groups=group, unit=unit, units=units, bias=bias, with_log_likelihood=True,
        **OPTIONS[options], **more,
    )  # fmt: skip
    if unit == "document":  # a document may go on in the next batch
        found = [fj.welford.add(fj.welford.init(x), x) for x in found]
    return [(fj.welford.mean(x), fj.welford.standard_error(x), x) for x in found], log_likelihood


def check(scale, dtype, options, group, unit, weights, **more):
    """Every kind of the options, from one program."""
    hidden, head, targets, _, bias = problem(scale)
    arrays = (jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(bias, dtype), targets, weights)
    found, log_likelihood = measure(*arrays, options=options, group=group, unit=unit, **more)
    eps = 1e-12 / C if dtype == jnp.float64 else jnp.finfo(jnp.float32).eps
    bound = C * eps * (1 + (0 if dtype == jnp.float64 else largest_logit(scale, **OPTIONS[options])))
    for kind, (mean, error, seen) in zip(OPTIONS[options]["kind"], found, strict=True):
        values = oracles.over_group(reference(scale, options, kind), group)
        true_mean, true_error, n, total = oracles.moments(values, np.asarray(weights, float).ravel(), IDS[unit])
        np.testing.assert_allclose(mean, true_mean, rtol=bound, err_msg=kind)
        assert (fj.welford.count(seen), fj.welford.weight(seen), int(seen.rejected)) == (n, total, 0)
        if n > 1:
            # The error of a spread is relative to the values it is a spread of.
            atol = 20 * bound * np.abs(true_mean).max()
            np.testing.assert_allclose(error, true_error, rtol=20 * bound, atol=atol, err_msg=kind)
    soft_cap = OPTIONS[options].get("soft_cap")
    z = np.asarray(oracles.head_logits(head, hidden.reshape(-1, H).T, bias[:, None], soft_cap))
    true_ll = z[targets.ravel(), np.arange(B * S)] - np.log(np.exp(z).sum(0))
    active = np.asarray(weights, float).ravel() != 0
    np.testing.assert_allclose(np.ravel(log_likelihood), np.where(active, true_ll, 0), atol=2 * bound * (1 + scale))


GROUPS, UNITS = ("param", "row", "column", "tensor"), ("token", "sequence", "document", "batch")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("group", GROUPS)
def test_float64_is_exact(group, unit):
    """Every group with every unit, the kinds alternating over both; other tests take both kinds at once."""
    kind = KINDS[(GROUPS.index(group) + UNITS.index(unit)) % 2]
    with jax.enable_x64(True):
        check(2.0, jnp.float64, kind, group, unit, jnp.asarray(problem(2.0)[3]))


@pytest.mark.parametrize(("group", "unit"), [("param", "document"), ("row", "token")])
@pytest.mark.parametrize("options", ["tempered", "capped"])
def test_float64_is_exact_with_temperature_and_soft_cap(options, group, unit):
    with jax.enable_x64(True):
        check(2.0, jnp.float64, options, group, unit, jnp.asarray(problem(2.0)[3]), chunk_size=5)


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize(
    ("group", "unit"), [("param", "token"), ("param", "sequence"), ("row", "token"), ("row", "document")]
)
def test_float32_error_grows_with_the_logits_only(group, unit, scale):
    weights = problem(scale)[3]
    check(scale, jnp.float32, "plain", group, unit, jnp.asarray(weights > 0))


@pytest.mark.parametrize(
    ("group", "unit", "chunk_size"),
    [("param", "token", 4), ("param", "document", 11), ("row", "token", 11), ("row", "sequence", 4)],
)
def test_chunks_that_do_not_divide_are_masked(group, unit, chunk_size):
    with jax.enable_x64(True):
        check(2.0, jnp.float64, "true", group, unit, jnp.asarray(problem(2.0)[3]), chunk_size=chunk_size)


@pytest.mark.parametrize("options", ["plain", "capped"])
def test_given_log_sum_exp_gives_the_same(options):
    hidden, head, _, weights, bias = problem(2.0)
    with jax.enable_x64(True):
        z = oracles.head_logits(head, hidden.reshape(-1, H).T, bias[:, None], OPTIONS[options].get("soft_cap"))
        lse = jnp.asarray(np.log(np.exp(z).sum(0)).reshape(B, S))
        check(2.0, jnp.float64, options, "param", "token", jnp.asarray(weights), log_sum_exp=lse)


def test_both_kinds_at_once_equal_each_alone():
    hidden, head, targets, weights, _ = problem(1.0)
    args = (jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), targets, jnp.asarray(weights > 0))
    observe = jax.jit(fj.lm_head.moments, static_argnames=("kind", "unit"))
    both = observe(*args, kind=KINDS, unit="sequence")
    for kind, found in zip(KINDS, both, strict=True):
        alone = observe(*args, kind=kind, unit="sequence")
        np.testing.assert_array_equal(fj.welford.mean(found), fj.welford.mean(alone))
    assert not np.array_equal(fj.welford.mean(both[0]), fj.welford.mean(both[1]))


def test_true_fisher_needs_no_targets():
    hidden, head, targets, _, _ = problem(1.0)
    hidden, head = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    observe = jax.jit(lambda targets: fj.welford.mean(fj.lm_head.moments(hidden, head, targets, kind="true")))
    np.testing.assert_allclose(observe(None), observe(targets), rtol=1e-5)


@pytest.mark.parametrize("group", ["row", "param"])
def test_confident_predictions_do_not_cancel(group):
    """Where a probability rounds to 1 in float32, ``1 - p`` is still right to rounding."""
    head, hidden = np.array([[20.0], [3.0], [-4.0]]), np.array([[1.0]])
    observe = jax.jit(functools.partial(fj.lm_head.moments, groups=group, kind=KINDS))
    for target in (0, 1):  # the confident prediction is the label, or it is not
        targets = np.array([target])
        both = observe(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), targets)
        for kind, found in zip(KINDS, both, strict=True):
            f = oracles.over_group(oracles.head_squared_scores(hidden, head, targets, kind), group)[0]
            np.testing.assert_allclose(fj.welford.mean(found), f, rtol=1e-4)


@pytest.mark.parametrize(("group", "unit"), [("row", "token"), ("param", "token"), ("param", "sequence")])
def test_every_product_asks_for_full_precision(group, unit):
    """A CPU multiplies in float32 anyway; a GPU or TPU does not unless it is told."""

    def products(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield eqn.params["precision"]
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)

    hidden, head, targets, _, _ = problem(1.0)
    traced = jax.make_jaxpr(lambda h: fj.lm_head.moments(h, jnp.asarray(head), targets, groups=group, unit=unit).mean)
    found = list(products(traced(jnp.asarray(hidden)).jaxpr))
    assert len(found) >= 2
    assert all(p is not None and set(p) == {jax.lax.Precision.HIGHEST} for p in found)


def test_fourth_powers_of_small_probabilities_survive():
    """Without the power-of-two scale the second moment of a token of probability 1e-11 is flushed to zero."""
    head = np.zeros((3, 1))
    head[2] = -25.0
    hidden = np.array([[1.0], [1.1], [0.9]])
    observe = jax.jit(fj.lm_head.moments)
    found = observe(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), np.zeros(3, int))
    f = oracles.over_group(oracles.head_squared_scores(hidden, head, np.zeros(3, int), "empirical"), "row")
    _, error, _, _ = oracles.moments(f, np.ones(3), np.arange(3))
    assert 0 < error[2] < 1e-19
    np.testing.assert_allclose(fj.welford.standard_error(found), error, rtol=1e-4)


def test_bfloat16_head_is_read_in_float32():
    hidden, head, targets, _, _ = problem(1.0)
    low = jnp.asarray(head, jnp.bfloat16)
    observe = jax.jit(fj.lm_head.moments)
    found = observe(jnp.asarray(hidden, jnp.float32), low, targets)
    same = observe(jnp.asarray(hidden, jnp.float32), low.astype(jnp.float32), targets)
    assert fj.welford.mean(found).dtype == jnp.float32
    np.testing.assert_array_equal(fj.welford.mean(found), fj.welford.mean(same))

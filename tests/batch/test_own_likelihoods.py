"""A likelihood of the user's own is held to the shapes that it must have; nothing is broadcast to fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

B, S, D, K = 3, 3, 2, 4
RNG = np.random.default_rng(0)
PARAMS = jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)
BATCH = fj.Batch(*(jnp.asarray(RNG.normal(size=(B, S, n)), jnp.float32) for n in (D, K)))


def apply_fn(p, x):
    return x @ p


def likelihood(**wrong):
    """Gaussian, but for what is wrong."""
    own = {name: getattr(fj.gaussian, name) for name in ("log_prob", "sample", "fisher_product", "fisher_factor")}
    return fj.Likelihood("own", **own | wrong)


def log_prob(axes, keepdims=False):
    return lambda outputs, targets: -0.5 * ((targets - outputs) ** 2).sum(axes, keepdims=keepdims)


CONSUMERS = {
    "exact": lambda own: fj.group_fisher(apply_fn, own, estimator="exact").observe(PARAMS, BATCH),
    "sequence": lambda own: fj.group_fisher(apply_fn, own, estimator="sequence").observe(PARAMS, BATCH),
    "signs": lambda own: fj.group_fisher(apply_fn, own).observe(PARAMS, BATCH, jax.random.key(0)),
    "empirical_fisher": lambda own: fj.operators.empirical_fisher(apply_fn, own, PARAMS, BATCH)(PARAMS),
    "hessian": lambda own: fj.operators.hessian(apply_fn, own, PARAMS, BATCH)(PARAMS),
    "kfac_factors": lambda own: fj.kfac_factors(apply_fn, own, PARAMS, BATCH),
    "block_spectrum": lambda own: fj.block_spectrum(apply_fn, own, PARAMS, BATCH),
}


@pytest.mark.parametrize("axes", [(), (-1, -2), (0, 1, 2), "kept"])
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_one_log_probability_for_each_token(consumer, axes):
    own = likelihood(log_prob=log_prob(-1, True) if axes == "kept" else log_prob(axes))
    with pytest.raises(ValueError, match=r"log_prob of the likelihood 'own' gives one number for each token"):
        CONSUMERS[consumer](own)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("fisher_product", lambda own: fj.operators.ggn(apply_fn, own, PARAMS, BATCH)(PARAMS)),
        ("fisher_factor", lambda own: fj.group_fisher(apply_fn, own, estimator="exact", kind="true").observe(
            PARAMS, BATCH)),
        ("fisher_factor", lambda own: fj.kfac_factors(
            apply_fn, own, PARAMS, BATCH, curvature=fj.Curvature(estimator="ggn"), key=jax.random.key(0))),
    ],
)  # fmt: skip
def test_the_output_space_fisher_is_like_the_outputs(name, use):
    with pytest.raises(
        ValueError, match=rf"{name} of the likelihood 'own' gives an array like the outputs, .*\[3, 3, 4\]"
    ):
        use(likelihood(**{name: lambda *given: jnp.ones(K)}))


@pytest.mark.parametrize("consumer", ["exact", "empirical_fisher", "kfac_factors"])
def test_outputs_without_an_axis_are_not_taken_for_one_token(consumer):
    """``x @ p`` of a vector ``p`` gives ``[rows]``."""
    batch = fj.Batch(jnp.ones((B, D)), jnp.zeros(B))
    use = {
        "exact": lambda: fj.group_fisher(apply_fn, fj.gaussian, estimator="exact").observe(PARAMS[:, 0], batch),
        "empirical_fisher": lambda: fj.operators.empirical_fisher(apply_fn, fj.gaussian, PARAMS[:, 0], batch)(
            PARAMS[:, 0]
        ),
        "kfac_factors": lambda: fj.kfac_factors(apply_fn, fj.gaussian, PARAMS[:, 0], batch),
    }[consumer]
    with pytest.raises(ValueError, match=r"outputs\[:, None\]"):
        use()


def test_moments_of_a_batch_that_cannot_be_used_are_no_numbers():
    """A label of -100 stands for padding elsewhere."""
    batch = fj.Batch(BATCH.inputs, jnp.full((B, S), -100))
    for estimator in ("exact", "sequence"):
        moments = fj.group_fisher(apply_fn, estimator=estimator).observe(PARAMS, batch)
        assert np.isnan(fj.mean(moments)).all()
        assert np.isnan(fj.standard_error(moments)).all()
        assert np.isnan(fj.welford.variance(moments)).all()
        with pytest.raises(fj.RejectedBatchError, match="target"):
            fj.check(moments)
    hidden = fj.lm_head.moments(BATCH.inputs, PARAMS.T, batch.targets)
    assert np.isnan(fj.mean(hidden)).all()
    good = fj.lm_head.moments(BATCH.inputs, PARAMS.T, jnp.zeros((B, S), int))
    state = fj.welford.add(fj.welford.add(fj.welford.init(good), good), hidden)
    np.testing.assert_allclose(fj.mean(state), fj.mean(good), rtol=1e-6)

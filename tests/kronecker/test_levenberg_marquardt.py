"""The rule that moves the damping of `fj.kfac`, at ratios chosen on both sides of its thresholds."""

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj

DAMPING = 0.1


def test_damping_follows_the_ratio_of_the_fall_to_the_predicted_one():
    # The loss (theta - 1)**2 / 2 at 0: slope -1, curvature 1. For a slope g' handed in, the model's best step is
    # -g' / (1 + damping), the predicted change -g'**2 / (2 (1 + damping)), and the ratio -2 / g' - 1 / (1 + damping).
    ratios = np.array([1.1, 0.96, 0.9, 0.8, 0.76, 0.74, 0.5, 0.26, 0.24, 0.1])
    slopes = -2 / (ratios + 1 / (1 + DAMPING))
    batch = fj.Batch(jnp.ones((1, 1)), jnp.ones((1, 1)))
    apply_fn = lambda params, x: x @ params["w"]  # noqa: E731
    tx = fj.kfac(
        apply_fn,
        fj.gaussian,
        example=batch,
        damping=DAMPING,
        curvature=fj.Curvature(estimator="ggn"),
        step=fj.Adaptive(adapt_period=1),
    )
    params = {"w": jnp.zeros((1, 1))}

    @jax.jit
    @jax.vmap
    def run(slope):
        _, state = tx.update({"w": slope[None, None]}, tx.init(params), params, batch=batch)
        return state.ratio, state.damping

    found, damping = run(jnp.asarray(slopes, jnp.float32))
    np.testing.assert_allclose(found, ratios, rtol=1e-4)
    factor = np.where(ratios > 0.75, 0.9, np.where(ratios < 0.25, 1 / 0.9, 1))
    np.testing.assert_allclose(damping, DAMPING * factor, rtol=1e-5)

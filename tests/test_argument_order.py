"""One order of arguments, apply_fn, likelihood, params, batch; another one is refused with the argument's name."""

import jax
import jax.numpy as jnp
import pytest

import fisher_jax as fj


def apply_fn(params, x):
    return x @ params["w"]


PARAMS = {"w": jnp.zeros((2, 3))}
BATCH = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
STATE = jax.eval_shape(fj.scale_by_kfac(apply_fn, example=BATCH).init, PARAMS)

WHOLE = {
    "kfac_factors": fj.kfac_factors,
    "kfac_coverage": fj.kfac_tools.kfac_coverage,
    "kfac_factors_from_state": lambda *given: fj.kfac_tools.kfac_factors_from_state(STATE, *given),
    "block_spectrum": fj.block_spectrum,
    "ggn": fj.operators.ggn,
    "fisher": fj.operators.fisher,
    "empirical_fisher": fj.operators.empirical_fisher,
    "hessian": fj.operators.hessian,
}
OF_A_MODEL = {
    "kfac": fj.kfac,
    "scale_by_kfac": fj.scale_by_kfac,
    "group_fisher": fj.group_fisher,
    "block_spectra": fj.spectra.block_spectra,
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    ("given", "wrong", "found"),
    [
        ((PARAMS, apply_fn, fj.categorical, BATCH), "apply_fn", "dict"),
        ((apply_fn, PARAMS, BATCH, fj.categorical), "likelihood", "dict"),
        ((apply_fn, fj.categorical, BATCH, PARAMS), "batch", "dict"),
        ((apply_fn, "categorical", PARAMS, BATCH), "likelihood", "str"),
    ],
)
def test_the_argument_in_the_place_of_another_is_named(name, given, wrong, found):
    with pytest.raises(TypeError, match=f"^{wrong} is .*found {found}; the order is apply_fn, likelihood"):
        WHOLE[name](*given)


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_the_same_of_functions_that_are_given_an_example(name):
    for given, example, wrong in (
        ((0.1, apply_fn), BATCH, "apply_fn"),
        ((apply_fn, BATCH), BATCH, "likelihood"),
        ((apply_fn, fj.categorical), PARAMS, "example"),
    ):
        with pytest.raises(TypeError, match=f"^{wrong} is "):
            OF_A_MODEL[name](*given, example=example)


@pytest.mark.parametrize("estimator", ["signs", "exact", "sequence", "head"])
def test_an_estimator_names_a_batch_in_the_place_of_parameters(estimator):
    fisher = fj.group_fisher(apply_fn, estimator=estimator, example=BATCH)
    with pytest.raises(TypeError, match=r"^batch is a fj\.Batch, found dict"):
        fisher.observe(BATCH, PARAMS, jax.random.key(0))


def test_updates_name_what_is_no_batch():
    tx = fj.scale_by_kfac(apply_fn, example=BATCH)
    with pytest.raises(TypeError, match=r"^batch is a fj\.Batch, found ArrayImpl"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=BATCH.inputs)
    stream = fj.spectra.block_spectra(apply_fn)
    with pytest.raises(TypeError, match=r"^batch is a fj\.Batch, found dict"):
        stream.update(stream.init(PARAMS), BATCH, PARAMS)

"""K-FAC on eight devices gives what one gives (see ``sharded_kfac``), and why columns are gathered."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fisher_jax as fj
from fisher_jax.kronecker.factors import forms as factors
from fisher_jax.kronecker.factors import tikhonov
from tests import oracle_kronecker as oracle
from tests.eight_devices import FLAGS


@pytest.fixture(scope="module")
def found():
    """The device count is fixed when JAX starts, so this needs a process of its own."""
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.kronecker.sharded_kfac"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


AUTO = ("auto vocabulary", "auto tokens", "auto both", "exact_head both")


@pytest.mark.parametrize("case", [*AUTO, "explicit both", "shard_map", "shard_map taps"])
def test_eight_devices_give_what_one_gives(found, case):
    """Averages over steps too (``auto both``, ``shard_map``), and corrected eigenvalues (``shard_map taps``)."""
    assert found[case]["error"] < 1e-5


@pytest.mark.parametrize("case", ["auto both", "explicit both"])
def test_places_of_updates_and_state_are_the_same_from_step_to_step(found, case):
    assert found[case]["stable"]


@pytest.mark.parametrize(
    ("case", "rows"), [("auto vocabulary", 2), ("auto both", 4), ("explicit both", 4), ("exact_head both", 4)]
)
def test_columns_stay_spread_over_the_vocabulary(found, case, rows):
    assert found[case]["rows_per_device"] == rows


@pytest.mark.parametrize("case", [*AUTO, "explicit both", "shard_map"])
def test_eigendecompositions_are_shared_out(found, case):
    # Gram matrices of the 24 tokens: three, of the embedding, the layer and the head; two beside the true head.
    assert found[case]["decomposed"]["24"] == 1


def test_a_state_is_saved_and_restored_onto_another_mesh(found):
    assert found["restored"]["same"], "numbers, types or places differ"
    assert found["restored"]["error"] < 1e-5
    assert found["restored"]["step"] == 4


def test_factors_outside_optax_are_those_of_the_whole_batch(found):
    assert found["shard_map taps"]["outside"] < 1e-5


def test_a_bad_label_on_one_device_rejects_the_batch_on_all(found):
    case = found["shard_map"]
    assert (case["rejected"], case["reasons"], case["kept"]) == ([0, 0, 1], 2, True)


def test_an_axis_name_needs_a_shard_map_without_types():
    batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
    tx = fj.scale_by_kfac(lambda params, x: x @ params, example=batch, axis_name="data")
    with pytest.raises(ValueError, match=r"axis_name='data' is no axis here.*init and update.*shard_map"):
        tx.init(jnp.ones((2, 3)))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"varying values are typed.*check_vma=False"):
        jax.eval_shape(mapped, jnp.ones((2, 3)))


def test_gram_matrices_summed_over_token_shards_would_be_wrong():
    rng = np.random.default_rng(0)
    U, a, M = rng.normal(size=(6, 8)) / 3, rng.normal(size=(8, 4)) / 3, rng.normal(size=(6, 4))
    wanted = oracle.damped_power(oracle.block(a.T @ a, U @ U.T), M, 0.1)

    @jax.jit
    def solved(gram):
        A, G = factors.eigen(jnp.asarray(a.T @ a)), factors.LowRank(jnp.asarray(U), *factors.eigen(gram))
        return tikhonov.exact(A, G, jnp.asarray(M), 0.1)

    def apply(gram):
        found = solved(gram)
        return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)

    over_vocabulary = sum(shard.T @ shard for shard in np.split(U, 2, axis=0))
    assert apply(over_vocabulary) < 1e-5
    over_tokens = np.zeros((8, 8))
    for part in (slice(0, 4), slice(4, 8)):
        over_tokens[part, part] = U[:, part].T @ U[:, part]  # the products between shards are missing
    assert apply(over_tokens) > 0.1

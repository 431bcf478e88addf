"""K-FAC on eight devices gives what one gives (see ``sharded_kfac``), and why columns are gathered."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fisher_jax.kronecker import factors, tikhonov
from tests import oracle_kronecker as oracle


@pytest.fixture(scope="module")
def found():
    """The device count is fixed when JAX starts, so this needs a process of its own."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.kronecker.sharded_kfac"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["auto vocabulary", "auto tokens", "auto both", "explicit both", "exact_head both"])
def test_eight_devices_give_what_one_gives(found, case):
    assert found[case]["error"] < 1e-5
    assert found[case]["stable"], "shardings of updates and state change from step to step"


@pytest.mark.parametrize(
    ("case", "rows"), [("auto vocabulary", 2), ("auto both", 4), ("explicit both", 4), ("exact_head both", 4)]
)
def test_columns_stay_spread_over_the_vocabulary(found, case, rows):
    assert found[case]["rows_per_device"] == rows


def test_a_state_is_saved_and_restored_onto_another_mesh(found):
    assert found["restored"]["same"], "numbers, types or places differ"
    assert found["restored"]["error"] < 1e-5
    assert found["restored"]["step"] == 4


def test_shard_map_gathers_columns(found):
    assert found["shard_map"]["error"] < 1e-5


def test_gram_matrices_summed_over_token_shards_would_be_wrong():
    rng = np.random.default_rng(0)
    U, a, M = rng.normal(size=(6, 8)) / 3, rng.normal(size=(8, 4)) / 3, rng.normal(size=(6, 4))
    wanted = oracle.damped_power(oracle.block(a.T @ a, U @ U.T), M, 0.1)
    A = factors.eigen(jnp.asarray(a.T @ a))

    def apply(gram):
        values, vectors = factors.eigen(jnp.asarray(gram))
        found = tikhonov.exact(A, factors.LowRank(jnp.asarray(U), values, vectors), M, 0.1)
        return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)

    over_vocabulary = sum(shard.T @ shard for shard in np.split(U, 2, axis=0))
    assert apply(over_vocabulary) < 1e-5
    over_tokens = np.zeros((8, 8))
    for part in (slice(0, 4), slice(4, 8)):
        over_tokens[part, part] = U[:, part].T @ U[:, part]  # the products between shards are missing
    assert apply(over_tokens) > 0.1

"""Eight devices give the spectrum of one, and the basis lies as the parameters do (see ``sharded_krylov``)."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.eight_devices import FLAGS


@pytest.fixture(scope="module")
def found():
    """The device count is fixed when JAX starts, so this needs a process of its own."""
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.spectra.krylov.sharded_krylov"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def of(found, mesh):
    assert "failed" not in found[mesh], found[mesh]["failed"]
    return found[mesh]


@pytest.mark.parametrize("mesh", ["auto", "explicit"])
def test_eight_devices_give_what_one_gives(found, mesh):
    sharded, one = of(found, mesh), found["one"]
    for name, wanted in one.items():
        if name != "bounds":
            np.testing.assert_allclose(
                sharded[name], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max(), err_msg=name
            )
    np.testing.assert_allclose(sharded["host"], one["plain"], rtol=1e-4)


@pytest.mark.parametrize("mesh", ["auto", "explicit"])
def test_bounds_hold_where_vectors_are_sharded(found, mesh):
    sharded, truth = of(found, mesh), np.array(found["truth"])
    distance = np.abs(np.array(sharded["plain"])[:, None] - truth).min(axis=1)
    assert np.all(distance <= sharded["bounds"])
    np.testing.assert_allclose(sharded["restarted"], truth[:-6:-1], rtol=1e-4)
    np.testing.assert_allclose(sharded["trace"], truth.sum(), rtol=0.05)
    assert found["restarts"] > 0


@pytest.mark.parametrize("mesh", ["auto", "explicit"])
def test_basis_and_eigenvectors_are_sharded_as_the_parameters(found, mesh):
    sharded = of(found, mesh)
    assert sharded["steps"] > 12
    assert sharded["basis_sharded"]
    assert sharded["vectors_sharded"]

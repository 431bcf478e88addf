"""Eight devices give what one gives, on meshes of Auto and of Explicit axes (see ``sharded_uses``)."""

import json
import os
import subprocess
import sys

import pytest

from tests.eight_devices import FLAGS
from tests.uses.sharded_uses import MESHES


@pytest.fixture(scope="session")
def found():
    """The device count is fixed when JAX starts, so this needs a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "tests.uses.sharded_uses"]
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_split_over_devices_give_the_same(found, mesh):
    assert found[mesh]["error"] < 1e-5
    assert found[mesh]["host"] < 1e-5


@pytest.mark.parametrize("mesh", MESHES)
def test_results_stay_where_the_parameters_are(found, mesh):
    assert {spec.split(",")[0] for spec in found[mesh]["stays"]} == {"P('d'"}

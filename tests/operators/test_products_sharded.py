"""Products with sharded parameters and rows are those of one device (see ``sharded_operators``)."""

import json
import os
import subprocess
import sys

import pytest

from tests.eight_devices import FLAGS
from tests.operators.sharded_operators import CASES, MESHES


@pytest.fixture(scope="module")
def found():
    """The device count is fixed when JAX starts, so this needs a process of its own."""
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.operators.sharded_operators"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("kind", "option"), CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_give_what_one_gives_in_its_place(found, mesh, kind, option):
    result = found[f"{mesh} {kind} {option}"]
    assert "failed" not in result, result["failed"]
    assert result["error"] < 1e-5
    assert result["placed"], "a product does not lie where the parameters do"

"""Spectra of sharded parameters and rows are those of one device (see ``sharded_blocks``)."""

import json
import os
import subprocess
import sys

import pytest

from tests.eight_devices import FLAGS
from tests.spectra.blocks.sharded_blocks import CASES


@pytest.fixture(scope="module")
def found():
    """The device count is fixed when JAX starts, so this needs a process of its own."""
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.spectra.blocks.sharded_blocks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("mesh", "unit"), CASES)
def test_eight_devices_give_what_one_gives(found, mesh, unit):
    result = found[f"{mesh} {unit}"]
    assert result["error"] < 1e-6
    assert result["methods"] == ["gram" if unit == "token" else "taps", "covariance", "gram"]


def test_a_model_that_names_places_on_the_mesh_is_told_what_to_leave_out(found):
    result = found["laid out"]
    assert result["error"] < 1e-6
    assert len(result["said"]) == 3
    assert all("every row runs alone" in x and "leave out_sharding= and reshard out" in x for x in result["said"])

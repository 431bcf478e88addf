"""Eight devices divide the work of a batch among them, and find what one finds (see ``divided_work``)."""

import json
import os
import subprocess
import sys

import pytest

from tests.eight_devices import FLAGS
from tests.estimators.divided_work import CASES, MESHES, MODELS

FOUND = [f"{mesh}: {case}" for case, where in CASES.items() for mesh in MESHES if where in (mesh, "both")]


@pytest.fixture(scope="module")
def found():
    """The device count is fixed when JAX starts, so this needs a process of its own."""
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.estimators.divided_work"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", FOUND)
def test_a_device_does_an_eighth(found, case):
    assert "failed" not in found[case], found[case]["failed"]
    assert found[case]["dots"] <= 0.15


@pytest.mark.parametrize("case", FOUND)
def test_devices_exchange_statistics_and_not_rows(found, case):
    assert found[case]["moved"] <= 2.2


@pytest.mark.parametrize("case", [*FOUND, *MODELS])
def test_the_numbers_are_those_of_one_device(found, case):
    assert "failed" not in found[case], found[case]["failed"]
    assert found[case]["distance"] < 1e-6
    assert found[case]["counts"]

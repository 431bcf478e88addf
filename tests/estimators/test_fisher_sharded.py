"""Estimators of sharded parameters and batches give what one device gives (see ``sharded_fisher``)."""

import json
import os
import subprocess
import sys

import pytest

from tests.eight_devices import FLAGS

CASES = [
    *(f"auto, {name}" for name in ("exact", "signs by row")),
    *(f"explicit, {name}" for name in ("exact", "signs", "signs by row", "sequence")),
    "restored",
    "shard_map",
    "training",
]


@pytest.fixture(scope="module")
def found():
    """The device count is fixed when JAX starts, so this needs a process of its own."""
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.estimators.sharded_fisher"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_give_what_one_gives(found, case):
    assert "failed" not in found[case], found[case]["failed"]
    assert found[case]["distance"] < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case != "shard_map"])
def test_states_keep_their_layout_and_types(found, case):
    """Means lie as the parameters do, and from the second update on nothing compiles anew."""
    assert found[case].get("kept", True)
    assert found[case].get("stable", True)

"""Taps of sharded parameters rebuild the gradient of one device (see ``sharded_capture``)."""

import json
import os
import subprocess
import sys

import pytest

from tests.eight_devices import FLAGS


@pytest.fixture(scope="module")
def found():
    """The device count is fixed when JAX starts, so this needs a process of its own."""
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.tracing.sharded_capture"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["auto", "explicit", "shard_map"])
def test_eight_devices_give_what_one_gives(found, way):
    assert "failed" not in found[way], found[way]["failed"]
    assert max(found[way].values()) < 1e-5, found[way]

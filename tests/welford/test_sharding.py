"""Eight devices give what one gives, on meshes of Auto and of Explicit axes (see ``sharded_script``)."""

import json
import os
import subprocess
import sys

import pytest

from tests.eight_devices import FLAGS
from tests.welford.sharded_script import MESHES, VOCABULARY, WAYS, WELFORD, WIDTH


@pytest.fixture(scope="session")
def found():
    """The device count is fixed when JAX starts, so this needs a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "tests.welford.sharded_script"]
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def finding(found, key):
    assert "failed" not in found[key], found[key]["failed"]
    return found[key]


VOCABULARY_CASES = [f"auto {way}" for way in WAYS] + ["explicit param"]


@pytest.mark.parametrize("case", VOCABULARY_CASES)
def test_a_head_split_over_the_vocabulary_is_one_head(found, case):
    result = finding(found, f"vocabulary {case}")
    assert result["error"] < 1e-5
    assert result["rows_stay"], "the result was moved from the devices whose rows it describes"


@pytest.mark.parametrize("case", VOCABULARY_CASES)
def test_the_head_is_never_gathered(found, case):
    def of_the_head(shapes):
        return [shape for shape in shapes if WIDTH in shape or VOCABULARY in shape]

    result = finding(found, f"vocabulary {case}")
    assert of_the_head(result["gathered"]) == []
    assert result["reduced"] + len(result["gathered"]) > 0, "devices that never talk cannot agree on a softmax"
    assert of_the_head(finding(found, "gathered on purpose")["gathered"]) == [[VOCABULARY, WIDTH]]


@pytest.mark.parametrize("unit", ["sequence", "document"])
@pytest.mark.parametrize("mesh", MESHES)
def test_rows_split_over_devices_are_one_batch(found, mesh, unit):
    assert finding(found, f"data {mesh} {unit}")["error"] < 1e-6


@pytest.mark.parametrize(("mesh", "unit"), WELFORD)
def test_states_keep_types_and_sharding_from_step_to_step(found, mesh, unit):
    result = finding(found, f"welford {mesh} {unit}")
    assert result["sharded"]
    assert result["stable"]
    assert result["average_stable"]
    assert result["traced_again"] == 0
    assert result["error"] < 1e-6

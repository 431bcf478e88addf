"""Two processes save and restore one state (see ``two_processes``)."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.checkpoint import sums
from tests.mutations_of_states import facts_of

VALUES = np.arange(32, dtype=np.float32).reshape(8, 4)


def run_two(module, folder, *arguments, seconds=120):
    """(exit code, output, errors) of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", module, address]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(folder), *arguments],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_two("tests.checkpoint.two_processes", folder)


def test_two_processes_save_and_restore(both):
    for code, output, errors in both[1]:
        assert code == 0, errors
        found = json.loads(output.splitlines()[-1])
        assert {name: found[name] for name in ("both", "rows", "all", "step", "host", "local")} == {
            "both": VALUES.tolist(), "rows": VALUES.tolist(), "all": VALUES[0].tolist(), "step": 3, "host": [0, 1, 2],
            "local": [1, 1],
        }  # fmt: skip


def test_an_error_on_one_process_is_an_error_on_both_and_changes_nothing(both):
    first, second = (json.loads(output.splitlines()[-1]) for _, output, _ in both[1])
    assert second["refused"].startswith("state['local'] is a function")
    assert first["refused"] == f"process 1: {second['refused']}"
    assert first["revision"] == second["revision"] == 3


def test_one_process_restores_what_two_saved(both):
    found = fj.checkpoint.restore(both[0] / "state", metadata={"model": "tiny"})
    np.testing.assert_array_equal(found["both"], VALUES)
    np.testing.assert_array_equal(found["rows"], VALUES)
    assert fj.checkpoint.describe(both[0] / "state")["processes"] == 2


def test_the_checksum_of_shards_on_two_processes_is_that_of_the_whole(both):
    facts = json.loads(facts_of(both[0] / "state").read_text())
    found = {key: node["sum"] for key, node in facts["tree"]["dict"] if "sum" in node}
    whole = {"both": VALUES, "rows": VALUES.astype(np.int32), "all": VALUES[0], "local": np.ones(2, np.float32)}
    assert {name: found[name] for name in whole} == {name: list(sums.of_host(x)) for name, x in whole.items()}

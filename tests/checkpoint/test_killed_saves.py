"""A saver killed at any moment inside a save leaves the last committed save, whole, and the next one clears up."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np

import fisher_jax as fj
from tests.checkpoint.killed_saver import state

KILLS = 2


def test_a_kill_at_any_moment_leaves_the_last_save(tmp_path):
    place, chance = tmp_path / "state", random.Random(0)
    for _ in range(KILLS):
        command = [sys.executable, "-m", "tests.checkpoint.killed_saver", str(place)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            done = int(process.stdout.readline())
            time.sleep(chance.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            done = max([done, *(int(line) for line in process.stdout.read().split() if line)])
        found = fj.checkpoint.restore(place)
        assert found["step"] in (done, done + 1)  # committed, and killed before it could say so
        for x, y in zip(found["rows"], state(found["step"])["rows"], strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(found["values"], state(found["step"])["values"])
    fj.checkpoint.save(place, {"step": 0})
    assert len(list(place.iterdir())) == 1

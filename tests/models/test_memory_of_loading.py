"""Loading takes the weights in the dtype that was asked for, and little beside them."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "loading_memory.py"
# What the bound allows beside the weights: 64 MiB, and a block of rows.
BESIDE, BLOCK = 64, 8


def test_beside_the_weights_loading_takes_little_memory(tmp_path):
    environment = os.environ | {"FISHER_JAX_CACHE": str(tmp_path / "cache")}
    for step in ("write", "load"):
        command = [sys.executable, str(SCRIPT), step, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr[-3_000:]
    whole, half, quantized, cached = json.loads(done.stdout)
    assert whole["weights"] > 128 > half["weights"] == quantized["weights"] == cached["weights"] > 64
    for found, error in ((whole, 0), (half, 2**-9), (quantized, 0.01), (cached, 0.01)):
        assert found["error"] <= error
        assert found["most"] < found["weights"] + BESIDE + BLOCK, found
        assert found["held"] < found["weights"] + 16, found
        assert found["left"] < 16 + BLOCK, found

"""A refusal needs neither memory nor time, whatever sizes a file claims."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "bombs.py"


def test_claims_of_great_sizes_are_refused_in_little_memory(tmp_path):
    for step in ("write", "load"):
        command = [sys.executable, str(SCRIPT), step, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr[-3_000:]
    assert done.stdout.count("refused") >= 16

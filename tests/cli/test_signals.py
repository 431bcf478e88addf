"""SIGINT and SIGTERM end every command: what was done is saved, exit code 130, nothing on stderr but a sentence."""

import os
import signal
import subprocess
import sys
import time

import pytest


def _started(arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "fisher_jax.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def _commands(tiny_model, texts, finished_report):
    model = ["--model", tiny_model]
    return {
        "compare": ["compare", str(finished_report), *model],
        "spectrum": ["spectrum", *model, "--text", *texts, "--k", "2", "--length", "32"],
        "train": ["train", "--text", *texts],
        "merge": ["merge", "--models", tiny_model, tiny_model, "--by", "uniform", "--text", *texts],
        "trim": ["trim", *model, "--by", "magnitude", "--keep", "270", "--text", *texts],
    }


@pytest.mark.parametrize("command", ["compare", "spectrum", "train", "merge", "trim"])
def test_a_termination_signal_ends_every_command(command, tmp_path, tiny_model, texts, finished_report):
    process = _started(_commands(tiny_model, texts, finished_report)[command], tmp_path)
    process.stdout.readline()  # starting up
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Exception" not in errors
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

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
        "spectrum": ["spectrum", *model, "--text", *texts, "--k", "2", "--row-length", "32"],
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


_BUSY = """
import os, signal, sys, time
from fisher_jax.cli.run import stopping

def deaf():
    "Compiled code that does not return: the handler of Python does not run."
    import hashlib
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)

class Deaf:
    "Swallows what is raised in it, as Python does in every finalizer."
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10):
            time.sleep(0.01)

with stopping.stop_signals() as signals:
    signals.started()
    print("ready", flush=True)
    if sys.argv[1] == "compiled":
        deaf()
    elif sys.argv[1] == "finalizer":
        Deaf()
    elif sys.argv[1] == "saving":
        with stopping.stop_requests() as requested:
            while not requested():
                time.sleep(0.01)
            time.sleep(60)
    time.sleep(60)
"""


def _busy(way):
    process = subprocess.Popen(
        [sys.executable, "-c", _BUSY, way], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    return process


@pytest.mark.parametrize("way", ["compiled", "finalizer"])
def test_a_signal_ends_a_run_that_does_not_hear_it(way):
    process = _busy(way)
    if way == "compiled":
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "fisher-jax: interrupted; what was saved before is kept\n"


@pytest.mark.parametrize("way", ["compiled", "saving"])
def test_a_second_signal_ends_a_run_at_once(way):
    process = _busy(way)
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - sent < 2.5
    assert errors == "fisher-jax: stopped at once; what was saved before is kept\n"

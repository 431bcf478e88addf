"""A run that was killed or stopped goes on and ends in the same bits; anything else is refused."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from running import after, interrupt, main, quick

import fisher_jax as fj

OFTEN = ["--task", "first", "--checkpoint-every", "0"]


def _start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "fisher_jax.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # It compiles the same program as the tests: a setting of XLA that a person gives stays, and so does this one.
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=-eltwise",
        },
    )


def _wait_for_state(process, out):
    """Until the first checkpoint is there."""
    deadline = time.monotonic() + 120
    while not fj.checkpoint.revision(out / "state"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _batches_done(out):
    progress = fj.checkpoint.metadata(out / "state")["tasks"]["first"]
    return progress["batches_done"], progress["num_batches"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_resumes_to_the_same_bits(how, tmp_path, report_arguments, finished_report, same_bits):
    out = tmp_path / "killed"
    process = _start(report_arguments(out, *OFTEN))
    _wait_for_state(process, out)
    process.send_signal(how)
    output, errors = process.communicate(timeout=120)
    done, total = _batches_done(out)
    assert 0 < done < total, "the run ended before it was interrupted"
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "--resume" in output
    assert quick(report_arguments(out, *OFTEN, "--resume")) == 0
    assert _batches_done(out) == (total, total)
    assert same_bits(out, finished_report, "first")
    a, b = (fj.checkpoint.metadata(x / "state")["tasks"]["first"]["log_loss"] for x in (out, finished_report))
    assert a == b


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, report_arguments):
    """A folder whose run was stopped after four batches."""
    out = tmp_path_factory.mktemp("stopped") / "report"
    stop = after(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(report_arguments(out, *OFTEN), after_step=stop) == 130
    return out


@pytest.fixture
def unfinished(stopped, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(stopped, tmp_path / "unfinished")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--resume", "--row-length", "16"], "had --row-length 32, and this one has 16"),
        (["--resume", "--batch-size", "8"], "had --batch-size 4, and this one has 8"),
        (["--resume", "--unit", "token"], "had --unit document, and this one has token"),
        (["--resume", "--groups", "param"], "had --groups row, and this one has param"),
        (["--resume", "--dtype", "bfloat16"], "had --dtype float32, and this one has bfloat16"),
        (["--resume", "--max-tokens", "999"], "had --max-tokens 80000, and this one has 999"),
        (["--resume", "--task", "unknown"], "nothing to resume for the task 'unknown'"),
        (["--resume", "--overwrite"], "give one of them"),
        ([], "holds an unfinished run of the task 'first'"),
    ],
)
def test_a_folder_with_an_unfinished_run_is_not_misused(unfinished, report_arguments, capsys, more, sentence):
    before = fj.checkpoint.metadata(unfinished / "state")
    assert main(report_arguments(unfinished, *OFTEN, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("fisher-jax: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert fj.checkpoint.metadata(unfinished / "state") == before


def test_resume_with_another_model_or_text_is_refused(unfinished, report_arguments, texts, tmp_path, capsys):
    from tiny import write_model

    other = write_model(tmp_path / "other", seed=1)
    assert main(report_arguments(unfinished, *OFTEN, "--resume", "--model", str(other))) == 2
    assert "had the model tiny-llama" in capsys.readouterr().err
    assert main(report_arguments(unfinished, *OFTEN, "--resume", "--text", *texts[::-1])) == 2
    assert "had the text" in capsys.readouterr().err


def test_overwrite_starts_again(unfinished, report_arguments, finished_report, same_bits):
    assert quick(report_arguments(unfinished, *OFTEN, "--overwrite")) == 0
    assert same_bits(unfinished, finished_report, "first")


def test_an_interrupt_after_measuring_loses_nothing(tmp_path, report_arguments, capsys):
    out = tmp_path / "out"
    assert main(report_arguments(out, "--task", "first", "--max-tokens", "500"), picture=interrupt) == 130
    assert "give the same command again" in capsys.readouterr().out
    done, total = _batches_done(out)
    assert done == total


def test_resume_without_a_run_is_refused(tmp_path, report_arguments, capsys):
    assert main(report_arguments(tmp_path / "none", "--resume")) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

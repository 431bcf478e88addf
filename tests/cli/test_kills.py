"""A run killed inside a save, a page or a model: nothing half-written is seen, another run ends in the same bits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import interrupt, main, quick

from fisher_jax._support.errors import InputError
from fisher_jax.models import load

OPTIONS = ["--task", "third", "--max-tokens", "600", "--held-out-tokens", "0", "--checkpoint-every", "0"]


def _dying(out, number, arguments):
    """(exit code, writes) of the command, killed at its number-th write below its folder."""
    script = str(Path(__file__).with_name("dying.py"))
    done = subprocess.run(
        [sys.executable, script, str(out), str(number), "0", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        # It compiles the same program as the tests: a setting of XLA that a person gives stays, and so does this one.
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=-eltwise",
        },
    )
    last = done.stderr.splitlines()[-1:]
    return done.returncode, int(last[0]) if last and last[0].isdigit() else None


def _whole(folder):
    """Checks that every file under its final name can be read to its end."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.is_dir():
            continue
        raw = path.read_bytes()
        end = {".html": b"</html>", ".png": b"IEND\xaeB`\x82", ".csv": b"\n", ".md": b"\n"}.get(path.suffix)
        assert end is None or raw.rstrip(b"\n" if path.suffix == ".html" else b"").endswith(end), path
        if path.suffix == ".json":
            json.loads(raw)


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_report_killed_at_a_write_resumes_to_the_same_bits(
    share, tmp_path, report_arguments, finished_report, undisturbed, same_bits
):
    reference, writes = undisturbed
    out = shutil.copytree(finished_report, tmp_path / "out")
    code, _ = _dying(out, int(share * writes), report_arguments(out, *OPTIONS))
    assert code == -signal.SIGKILL
    _whole(out)
    if quick(report_arguments(out, *OPTIONS, "--resume")) == 2:  # killed before its first save was there
        assert quick(report_arguments(out, *OPTIONS)) == 0
    for task in ("first", "second"):
        assert same_bits(out, finished_report, task)
    assert same_bits(out, reference, "third")
    assert not [path for path in out.rglob(".*") if "incoming" in path.name or path.name.startswith(".f")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, report_arguments, finished_report):
    """A report with a third task, and how many writes it took."""
    out = shutil.copytree(finished_report, tmp_path_factory.mktemp("undisturbed") / "out")
    code, writes = _dying(out, 0, report_arguments(out, *OPTIONS))
    assert code == 0
    return out, writes


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory, tiny_model, texts):
    """Arguments of trim without its folder, a model that it wrote undisturbed, and in how many writes."""
    out = tmp_path_factory.mktemp("trimmed") / "out"
    arguments = ["trim", "--model", tiny_model, "--by", "magnitude", "--keep", "270", "--text", *texts]
    arguments += ["--characters", "60", "--out"]
    code, writes = _dying(out, 0, [*arguments, str(out)])
    assert code == 0
    return arguments, out, writes


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("left", [3, 7, 12])
def test_a_model_killed_while_it_is_written_is_whole_or_none(left, tmp_path, trimmed):
    arguments, reference, writes = trimmed
    out = tmp_path / "trimmed"
    code, _ = _dying(out, writes - left, [*arguments, str(out)])
    assert code == -signal.SIGKILL
    try:
        load(out)
    except InputError:
        assert main([*arguments, str(out)]) == 0
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in reference.iterdir())
    assert _contents(out) == _contents(reference)


def test_an_interrupted_model_leaves_an_earlier_one_as_it_was(tmp_path, tiny_model, texts):
    out = shutil.copytree(tiny_model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    arguments = ["trim", "--model", tiny_model, "--by", "magnitude", "--keep", "270", "--text", *texts]

    def load_once(source, **options):  # what was written is not read back
        return load(source, **options) if source == tiny_model else interrupt()

    assert main([*arguments, "--out", str(out), "--overwrite"], load=load_once) == 130
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_files_of_killed_runs_go_and_those_of_living_ones_stay(tmp_path):
    from fisher_jax.cli.run.run_folder import run_folder
    from fisher_jax.cli.run.temporary import temporary_beside

    mine = temporary_beside(tmp_path / "x")
    mine.write_text("being written")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = re.sub(rf"-{os.getpid()}-", f"-{ended.pid}-", mine.name)
    deepest = tmp_path / "figures" / "tasks" / "wikipedia"
    deepest.mkdir(parents=True)
    for folder in (tmp_path, *list(deepest.parents)[:2], deepest):
        (folder / left).write_text("half")
        (folder / f"{left}1").mkdir()
    for name in ("00000006", "00000007", ".dropped-0a1b", "notes"):
        (tmp_path / "state" / name).mkdir(parents=True)
        (tmp_path / "state" / name / "file").write_text("something")
    with run_folder(tmp_path, interrupted=str):
        kept = {path for path in tmp_path.rglob("*") if path.name != ".fisher-jax.lock"}
    state = [tmp_path / "state", *(tmp_path / "state" / x for x in ("00000007", "notes"))]
    files = [path / "file" for path in state[1:]]
    assert kept == {mine, *list(deepest.parents)[:2], deepest, *state, *files}

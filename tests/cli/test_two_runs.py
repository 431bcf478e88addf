"""Two runs on one folder: the second says who holds it; without working locks nothing that was finished is lost."""

import copy
import errno
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from kept import keep
from running import main

from fisher_jax._support.errors import ConflictError, InputError
from fisher_jax.cli.report.store import ReportStore
from fisher_jax.cli.run.folder_lock import FILE, FREE_AFTER, flock, hold
from fisher_jax.models import load


def none(file):
    """The lock of a file system that has none."""
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("lock", [flock, none])
def test_the_second_one_is_told_who_holds_the_folder(lock, tmp_path):
    with hold(tmp_path, lock=lock), pytest.raises(InputError) as refused, hold(tmp_path, lock=lock):
        pass
    assert f"process {os.getpid()} on {os.uname().nodename} has been writing there since" in str(refused.value)
    with hold(tmp_path, lock=lock):  # free again
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_dies_with_its_process(tmp_path):
    script = "import sys, os; from pathlib import Path; from fisher_jax.cli.run.folder_lock import hold\n"
    script += "with hold(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert (tmp_path / FILE).exists()
    with hold(tmp_path):
        pass


def test_a_lease_is_free_when_it_was_not_renewed_for_a_minute(tmp_path):
    with hold(tmp_path, lock=none, renewed_every=1000):
        _age(tmp_path / FILE, FREE_AFTER - 5)
        with pytest.raises(InputError), hold(tmp_path, lock=none):
            pass
        _age(tmp_path / FILE, FREE_AFTER + 5)
        with hold(tmp_path, lock=none):
            content = (tmp_path / FILE).read_text()
            assert '"flock": false' in content
    assert not list(tmp_path.iterdir())


def _age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_lease_is_renewed_while_its_run_lives(tmp_path):
    with hold(tmp_path, lock=none, renewed_every=0.02):
        _age(tmp_path / FILE, FREE_AFTER + 5)
        deadline = time.monotonic() + 20
        while time.time() - (tmp_path / FILE).stat().st_mtime > FREE_AFTER and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(InputError), hold(tmp_path, lock=none):
            pass


@pytest.mark.parametrize("content", ["", "null", "[]", "{", '{"pid": "x", "host": 5}', "\0" * 100])
def test_a_damaged_lock_of_nobody_is_taken(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    with hold(tmp_path):
        pass


@pytest.mark.parametrize(
    "arguments",
    [
        ["report"],
        ["compare", "nowhere"],
        ["spectrum"],
        ["train"],
        ["merge", "--models", "nowhere", "nowhere", "--by", "uniform"],
        ["trim", "--by", "magnitude", "--keep", "300"],
    ],
)
def test_every_command_looks_at_the_lock_before_it_loads_anything(arguments, tmp_path, capsys):
    with hold(tmp_path):
        model = ["--init" if arguments[0] == "train" else "--model", "nowhere"] if arguments[0] != "merge" else []
        assert main([*arguments, *model, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "is in use" in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory, tiny_model):
    """A folder with two finished tasks."""
    model, out = load(tiny_model), tmp_path_factory.mktemp("kept") / "out"
    out.mkdir()
    for task in ("first", "second"):
        values = np.random.default_rng(len(task)).uniform(0, 1, (6, model.config.vocab_size))
        keep(out, task, model, {"empirical": values, "true": values})
    return out


@pytest.fixture
def stores(two_tasks, tmp_path):
    """Two runs that have read the same folder, and what is in it."""
    import shutil

    out = shutil.copytree(two_tasks, tmp_path / "out")
    one, other = ReportStore(out), ReportStore(out)
    return out, one, other, one.restore()["first"], copy.deepcopy(one.runs["first"])


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_runs_of_different_tasks_without_locks_keep_all_of_them(stores):
    out, one, other, arrays, progress = stores
    for _ in range(2):
        one.save("one", arrays, progress)
        other.save("other", arrays, progress)
    assert set(ReportStore(out).runs) == {"first", "second", "one", "other"}
    restored = ReportStore(out).restore()
    assert _same(restored["first"], arrays)
    assert _same(restored["one"], arrays)


def test_runs_of_the_same_task_without_locks_keep_the_one_that_came_first(stores):
    out, one, other, arrays, progress = stores
    one.save("third", arrays, progress)
    with pytest.raises(ConflictError, match="'third'"):
        other.save("third", arrays, progress)
    assert set(ReportStore(out).runs) == {"first", "second", "third"}
    one.save("third", arrays, progress)


def test_a_finished_task_is_not_replaced_by_a_run_that_has_not_seen_it(stores):
    out, one, other, arrays, progress = stores
    changed = jax.tree.map(lambda x: x + 1, arrays)
    assert _same(other.restore()["first"], arrays)  # read before it changes
    one.save("first", changed, copy.deepcopy(one.runs["first"]))
    progress.batches_done = 0
    other.save("second", arrays, progress)
    assert _same(ReportStore(out).restore()["first"], changed)

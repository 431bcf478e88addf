"""A command that needs a task takes the only one that fits, or asks with every command spelled out."""

import json
import shlex
import shutil

import numpy as np
import pytest
import tiny
from kept import keep, places
from running import main, quick

from fisher_jax.models import load


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, seed in {"one": 0, "two": 1}.items():
        tiny.write_model(root / name, seed=seed)
    return root


@pytest.fixture(scope="module")
def values(models):
    """What a task can hold: values of rows, and of all parameters."""
    model, rng = load(models / "one"), np.random.default_rng(0)
    rows = rng.gamma(1.0, 1.0, (4, model.config.vocab_size))
    return {"empirical": rows, "true": rows}, rng.gamma(1.0, 1.0, (4, places(model)[1]))


@pytest.fixture
def report(models, values, tmp_path):
    """Writes tasks into a report folder: finished or not, of the head or of all parameters."""

    def write(name, model="one", unfinished=(), **tasks):
        loaded = load(models / model)
        for task, everything in tasks.items():
            layers = values[1] if everything else None
            # One of one batch was finished, or none.
            keep(tmp_path / name, task, loaded, values[0], layers, done=0 if task in unfinished else 1)
        return str(tmp_path / name)

    return write


@pytest.fixture
def trim(models, tmp_path, texts):
    def arguments(state, *more):
        text = ["--text", *texts, "--characters", "60"]
        return ["trim", "--model", str(models / "one"), "--state", state, "--keep", "280", *text, *more]

    return arguments


def _asked(arguments, capsys):
    """The commands that the one sentence of a refusal spells out."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fisher-jax: ")
    assert error.count("\n") == 1
    return [shlex.split(part)[1:] for part in error.split("`")[1::2] if part.startswith("fisher-jax ")]


def test_trim_spells_out_both_commands_and_each_of_them_runs(report, trim, tmp_path, capsys):
    state = report("report", wikipedia=False, pubmed=False)
    out = ["--out", str(tmp_path / "out"), "--overwrite"]
    commands = _asked(trim(state, *out), capsys)
    assert commands == [trim(state, *out, "--task", name) for name in ("wikipedia", "pubmed")]
    assert not (tmp_path / "out").exists()
    assert main(commands[1]) == 0


def test_odd_names_are_spelled_so_that_a_shell_gives_them_back(report, trim, tmp_path, capsys):
    state = report("a report", **{"two words": False, "a (b) #1": False})
    commands = _asked(trim(state, "--out", str(tmp_path / "out")), capsys)
    assert [command[-1] for command in commands] == ["two words", "a (b) #1"]
    assert all(state in command for command in commands)


def test_trim_takes_the_only_finished_task_and_says_so(report, trim, tmp_path, capsys):
    state = report("report", wikipedia=False, pubmed=False, unfinished=("wikipedia",))
    assert main(trim(state, "--out", str(tmp_path / "out"))) == 0
    assert f"{state}:pubmed" in capsys.readouterr().out


def test_trim_takes_a_task_written_behind_its_folder(report, trim, tmp_path, capsys):
    state = report("report", wikipedia=False, pubmed=False)
    assert main(trim(f"{state}:pubmed", "--out", str(tmp_path / "out"))) == 0
    assert main(trim(f"{state}:pubmed", "--task", "wikipedia", "--out", str(tmp_path / "other"))) == 2
    assert "give one of them" in capsys.readouterr().err


def test_trim_says_why_nothing_fits(report, trim, tmp_path, capsys):
    state = report("report", wikipedia=False, pubmed=False, unfinished=("wikipedia", "pubmed"))
    assert main(trim(state, "--out", str(tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert "wikipedia" in error
    assert "pubmed" in error
    assert "not finished" in error


def test_merge_takes_the_only_task_with_all_parameters_or_asks(report, models, tmp_path, capsys):
    one = report("a", wikipedia=False, pubmed=True)
    two = report("b", model="two", pubmed=True)
    start = ["merge", "--models", str(models / "one"), str(models / "two"), "--out", str(tmp_path / "out")]
    assert main([*start, "--states", one, two]) == 0
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["states"] == [one, two]
    shutil.rmtree(tmp_path / "out")
    report("a", news=True)
    commands = _asked([*start, "--states", one, two], capsys)
    assert commands == [[*start, "--states", f"{one}:{name}", two] for name in ("pubmed", "news")]
    assert main(commands[0]) == 0


def test_compare_takes_the_only_two_that_fit_or_asks(report, models, tmp_path, capsys):
    state = report("report", wikipedia=False, pubmed=False, news=False, unfinished=("pubmed",))
    start = ["compare", "--model", str(models / "one"), "--out", str(tmp_path / "out")]
    assert quick([*start, state]) == 0
    capsys.readouterr()
    report("report", mail=False)
    commands = _asked([*start, state], capsys)
    pairs = [("wikipedia", "news"), ("wikipedia", "mail"), ("news", "mail")]
    assert commands == [[*start, f"{state}:{a}", f"{state}:{b}"] for a, b in pairs]
    other = report("other", diary=False)
    commands = _asked([*start, state, other], capsys)
    assert commands == [[*start, f"{state}:{name}", other] for name in ("wikipedia", "news", "mail")]

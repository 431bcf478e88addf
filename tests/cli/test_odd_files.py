"""What lies in a command's own folder may be anything: one sentence before the work, nothing is lost."""

import os
import shutil
import subprocess
import sys

import pytest
from running import main

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.folder_lock import FILE
from fisher_jax.cli.run.model_folder import model_folder
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.temporary import temporary_beside
from tests.mutations_of_states import rewritten

KINDS = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize(
    "name", [FILE, "report.html", "spectrum.json", "spectrum.md", "parts/one.json", "figures/a.png"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_odd_thing_stands_in_the_place_of_a_file(kind, name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    KINDS[kind](tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=name), run_folder(tmp_path, interrupted=str):
        pytest.fail("the work began")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["figures", "parts", "state", "model"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.write_text("a file")])
def test_no_odd_thing_stands_in_the_place_of_a_folder(make, name, tmp_path):
    make(tmp_path / name)
    with pytest.raises(InputError, match=name), run_folder(tmp_path, interrupted=str):
        pytest.fail("the work began")


def test_what_is_not_a_command_s_own_stays_and_does_not_matter(tmp_path):
    os.mkfifo(tmp_path / "my-pipe")
    (tmp_path / "notes").mkdir()
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    with run_folder(tmp_path, interrupted=str):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"my-pipe", "notes", "link"}


def _of_a_dead_process(path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return path.with_name(temporary_beside(path).name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))


def test_what_killed_runs_left_is_not_followed_through_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    precious = _of_a_dead_process(elsewhere / "x")
    precious.mkdir(parents=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(elsewhere)
    own = _of_a_dead_process(out / "x")
    own.symlink_to(elsewhere)
    with run_folder(out, interrupted=str):
        pass
    assert precious.is_dir()
    assert [path.name for path in out.iterdir()] == ["link"]


@pytest.mark.parametrize("name", [".fj-{}-²-x", ".fj-{}--", ".fj-", ".fj-{}-9" + "9" * 40 + "-ab"])
def test_a_name_like_that_of_a_temporary_file_does_no_harm(name, tmp_path):
    host = temporary_beside(tmp_path / "x").name.split("-")[1]
    path = tmp_path / name.format(host)
    path.write_text("mine")
    with run_folder(tmp_path, interrupted=str):
        pass
    assert path.read_text() == "mine"


ODD_LOCKS = {
    "empty": b"",
    "garbage": b"garbage\xff",
    "list": b"[]",
    "no such process": b'{"pid": 1%s, "host": "%s", "flock": true}' % (b"0" * 30, os.uname().nodename.encode()),
}


@pytest.mark.parametrize("content", ODD_LOCKS.values(), ids=ODD_LOCKS)
def test_a_lock_that_nobody_holds_is_taken_over_whatever_it_says(content, tmp_path):
    (tmp_path / FILE).write_bytes(content)
    with run_folder(tmp_path, interrupted=str):
        pass
    assert not list(tmp_path.iterdir())


def test_a_fresh_lease_of_an_impossible_process_is_in_use(tmp_path):
    content = ODD_LOCKS["no such process"].replace(b"true", b"false")
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InputError, match="is in use"), run_folder(tmp_path, interrupted=str):
        pytest.fail("the work began")


def test_a_huge_lock_takes_no_memory(tmp_path):
    with open(tmp_path / FILE, "wb") as file:
        file.truncate(2**40)
    with run_folder(tmp_path, interrupted=str):
        pass
    assert not list(tmp_path.iterdir())


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("command", ["trim", "merge"])
def test_an_obstacle_is_found_before_an_earlier_model_goes(command, tmp_path, tiny_model, texts, capsys):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(tiny_model, out, dirs_exist_ok=True)
    (out / f"{command}.json").mkdir()
    before = _contents(out)
    arguments = {
        "trim": ["trim", "--model", tiny_model, "--by", "magnitude", "--keep", "270"],
        "merge": ["merge", "--models", tiny_model, tiny_model, "--by", "uniform"],
    }[command]
    assert main([*arguments, "--text", *texts, "--out", str(out), "--overwrite"]) == 2
    assert f"{command}.json is a folder" in capsys.readouterr().err
    assert _contents(out) == before


def _write_model(out, *names):
    with model_folder(out) as incoming:
        for name in names:
            (incoming / name).write_text("new")


def test_an_earlier_model_comes_back_where_the_new_one_cannot_take_its_place(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer-notes.json"):
        (tmp_path / name).write_text("earlier")
    (tmp_path / "tokenizer.json").mkdir()
    before = _contents(tmp_path)
    with pytest.raises(OSError, match="tokenizer"):
        _write_model(tmp_path, "config.json", "model.safetensors", "tokenizer.json", "generation_config.json")
    assert _contents(tmp_path) == before
    (tmp_path / "tokenizer.json").rmdir()
    _write_model(tmp_path, "config.json")
    assert _contents(tmp_path) == {"config.json": b"new", "tokenizer-notes.json": b"earlier"}


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_after_the_last_line_changes_nothing(number):
    script = (
        "import os, signal, sys\n"
        "from fisher_jax.cli.main import main\n"
        "sys.argv = ['fisher-jax', '--version']\n"
        f"try: main()\nfinally: os.kill(os.getpid(), signal.{number})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("tokens", [10**400, -1, 0])
def test_impossible_counts_of_a_state_are_refused(tokens, tmp_path, finished_report, report_arguments, capsys):
    out = shutil.copytree(finished_report, tmp_path / "out")

    def change(facts):
        facts["metadata"]["tasks"]["first"]["tokens"] = tokens

    rewritten(out / "state", change)
    assert main(report_arguments(out, "--task", "first")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_name_that_is_given_twice_in_a_state_is_refused(tmp_path):
    import jax.numpy as jnp

    import fisher_jax as fj
    from tests.mutations_of_states import facts_of, rewrite

    fj.checkpoint.save(tmp_path / "state", {"a": jnp.arange(3)}, metadata={"model": "mine"})
    file = facts_of(tmp_path / "state")
    rewrite(file, file.read_text().replace('"metadata"', '"metadata": {"model": "other"}, "metadata"', 1))
    with pytest.raises(InputError, match="twice"):
        fj.checkpoint.restore(tmp_path / "state")


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja", "config.json"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_odd_thing_stands_in_the_place_of_a_file_of_a_model(kind, name, tmp_path, tiny_model, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    KINDS[kind](model / name)
    arguments = ["trim", "--model", str(model), "--by", "magnitude", "--keep", "270", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--text", __file__]) == 2
    assert f"{name} is not a file" in capsys.readouterr().err

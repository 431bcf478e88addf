"""The pairs of Python and JAX that are promised, tested and written down are the same."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ("oldest", "middle", "newest")
SHOWN = ("jax", "flax", "optax", "orbax-checkpoint")


def pair(name):
    """Python's version, and those of all packages."""
    first, *lines = (ROOT / ".ci" / "pairs" / f"{name}.txt").read_text().splitlines()
    return first.removeprefix("# Python "), dict(line.split("==") for line in lines)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_readme_shows_the_pairs():
    rows = re.findall(r"^\| Python (\S+) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    wanted = [(python, " | ".join(versions[x] for x in SHOWN)) for python, versions in map(pair, NAMES)]
    assert rows == wanted


def test_the_package_promises_the_pairs():
    prefix = "Programming Language :: Python :: "
    assert [x.removeprefix(prefix) for x in PROJECT["classifiers"] if x.startswith(prefix)] == [
        pair(name)[0] for name in NAMES
    ]
    python, versions = pair("oldest")
    assert PROJECT["requires-python"] == f">={python}"
    assert {f"{x}>={versions[x]}" for x in SHOWN} <= set(PROJECT["dependencies"])


def run_ci(folder, found, *arguments, **environment):
    """``.ci/run`` where ``found`` are the Pythons at hand and every tool only notes that it was called."""
    tools = {"pip": "", "uv": 'if [ "$1" = python ]; then exit 1; fi', "pyenv": "exit 1"}
    tools |= {f"python{v}": f'case "$2" in *version_info*) echo {v} ;; *) echo "$0" ;; esac' for v in found}
    for name, script in tools.items():
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{script}\n')
        (folder / name).chmod(0o755)
    for name in ("bash", "dirname", "sed", "awk", "grep", "mkdir"):
        (folder / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [shutil.which("bash"), ROOT / ".ci" / "run", *arguments],
        capture_output=True,
        text=True,
        env={"PATH": str(folder), "HOME": str(folder), **environment},
        timeout=60,
    )
    calls = folder / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return done, [line for line in lines if line.startswith("uv run")]


@pytest.mark.parametrize(("found", "missing"), [(["3.11"], "newest"), (["3.13"], "oldest"), ([], "newest")])
def test_ci_names_the_python_that_is_missing(tmp_path, found, missing):
    done, calls = run_ci(tmp_path, found)
    assert done.returncode == 1
    assert f"Python {pair(missing)[0]}" in done.stderr
    assert not calls, "nothing runs before all interpreters are found"


def test_ci_runs_the_suite_on_the_oldest_pair_and_the_numerical_rooms_on_the_newest(tmp_path):
    done, calls = run_ci(tmp_path, ["3.11", "3.13"])
    assert done.returncode == 0, done.stderr
    suite, rooms = (call for call in calls if "pytest" in call)
    assert suite == "uv run --no-sync pytest"
    assert all((ROOT / folder).exists() for folder in rooms.split() if folder.startswith("tests/"))
    assert "tests/operators" in rooms


@pytest.mark.parametrize(
    ("found", "arguments", "pairs", "runs"), [(["3.11"], [], "oldest", 4), (["3.13"], ["--newest"], "", 1)]
)
def test_ci_runs_one_pair_where_it_is_told_to(tmp_path, found, arguments, pairs, runs):
    done, calls = run_ci(tmp_path, found, *arguments, CI_PAIRS=pairs)
    assert done.returncode == 0, done.stderr
    assert len(calls) == runs


def test_ci_refuses_what_it_does_not_know(tmp_path):
    done, _ = run_ci(tmp_path, ["3.11", "3.13"], CI_PAIRS="odlest")
    assert done.returncode == 1
    assert "CI_PAIRS=oldest" in done.stderr

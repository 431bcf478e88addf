"""Several tasks in one report folder: each keeps its own page, pictures and table, and the page shows all."""

import csv
import re
import shutil

import numpy as np
import pytest
from running import interrupt, main, quick

import fisher_jax as fj

FEW = ["--max-tokens", "400", "--held-out-tokens", "0"]


def _lines(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _pictures(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.glob("figures/**/*.png")}


def _page_without_pictures(out):
    return re.sub(r"data:[^\"]*", "", (out / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def steps(tmp_path_factory, report_arguments):
    """Copies of one folder after its first and after its second task."""
    root = tmp_path_factory.mktemp("tasks")
    out = root / "report"
    for number, task in enumerate(("first", "second")):
        more = ["--unit", "sequence"] if number else []
        assert main(report_arguments(out, *FEW, "--task", task, *more)) == 0
        shutil.copytree(out, root / task)
    return root / "first", root / "second"


def test_a_second_task_leaves_the_pictures_of_the_first(steps):
    first, both = map(_pictures, steps)
    assert first
    assert first.items() <= both.items()
    assert len(both) >= 2 * len(first)


def test_the_page_shows_all_tasks(steps):
    for name in ("report.html", "report.md"):
        text = (steps[1] / name).read_text(encoding="utf-8")
        assert text.count("Importance by rank") >= 2
        assert "Tasks side by side" in text
        for task in ("first", "second"):
            assert f"task {task}" in text
    assert _page_without_pictures(steps[1]).count("<img") == len(_pictures(steps[1]))
    text = (steps[1] / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((figures/[^)]+)\)", text)) == set(_pictures(steps[1]))


def test_the_table_has_every_task_and_both_kinds(steps):
    lines = _lines(steps[1] / "importance.csv")
    assert [task for i, task in enumerate(x["task"] for x in lines) if i == 0 or task != lines[i - 1]["task"]] == [
        "first", "second",
    ]  # fmt: skip
    states = fj.checkpoint.restore(steps[1] / "state")
    for task in ("first", "second"):
        own = {int(line["token_id"]): line for line in lines if line["task"] == task}
        for kind in ("empirical", "true"):
            mean = np.asarray(fj.welford.mean(states[task][kind]))
            found = [float(own[row][kind]) for row in range(len(mean))]
            np.testing.assert_allclose(found, mean, rtol=1e-6)
            for row in range(len(mean)):
                low, high = (float(own[row][f"{kind}_{end}"]) for end in ("lower", "upper"))
                assert low <= float(own[row][kind]) <= high


def test_what_was_measured_again_takes_the_place_of_what_was_dropped(steps, report_arguments, tmp_path):
    out = shutil.copytree(steps[1], tmp_path / "copy")
    before = _pictures(out)
    assert main(report_arguments(out, "--max-tokens", "200", "--held-out-tokens", "0", "--task", "first",
                                 "--overwrite", "--kind", "true")) == 0  # fmt: skip
    after = _pictures(out)
    assert set(after) == set(before)
    changed = {name for name in after if after[name] != before[name]}
    assert changed
    assert all("second" not in name or "first" in name for name in changed)
    assert {line["task"] for line in _lines(out / "importance.csv")} == {"first", "second"}


def test_a_dropped_task_takes_its_files_with_it(steps, report_arguments, tmp_path):
    out = shutil.copytree(steps[1], tmp_path / "copy")
    assert main(report_arguments(out, *FEW, "--task", "first", "--overwrite"), after_step=interrupt) == 130
    assert {line["task"] for line in _lines(out / "importance.csv")} == {"second"}
    assert not any("first" in name for name in _pictures(out))
    assert "task first" not in (out / "report.md").read_text(encoding="utf-8")
    assert any("second" in name for name in _pictures(out))


@pytest.mark.parametrize(("one", "other"), [("a b", "a_b"), ("News", "news"), ("x (1)", "x [1]"), ("a..b", "ü" * 60)])
def test_odd_names_have_files_of_their_own(one, other, tmp_path, report_arguments):
    out = tmp_path / "out"
    few = ["--max-tokens", "100", "--held-out-tokens", "0"]
    for task in (one, other):
        assert quick(report_arguments(out, *few, "--task", task)) == 0
    assert [*dict.fromkeys(line["task"] for line in _lines(out / "importance.csv"))] == [one, other]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    names = [path.name.lower() for path in out.rglob("*")]
    assert all(re.fullmatch(r"[\w.~+-]+", name, re.ASCII) for name in names)


def test_layers_of_all_tasks_are_in_one_table(tmp_path, report_arguments):
    out = tmp_path / "out"
    few = ["--max-tokens", "200", "--held-out-tokens", "0"]
    assert quick(report_arguments(out, *few, "--task", "first", "--parameters", "all")) == 0
    before = _lines(out / "layers.csv")
    assert {line["task"] for line in before} == {"first"}
    assert quick(report_arguments(out, *few, "--task", "second")) == 0
    assert _lines(out / "layers.csv") == before

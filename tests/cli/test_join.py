"""Parts that separate jobs measured, and runs on several texts, become one report; anything else is refused."""

import base64
import csv
import dataclasses
import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
from running import after, interrupt, main, never, quick
from tiny import write_model

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax.cli.commands import settings_of
from fisher_jax.cli.report.join.checks import chosen
from fisher_jax.cli.run.choice_error import TaskChoiceError

FEW = ["--task", "first", "--max-tokens", "600", "--held-out-tokens", "0"]
ALL = ["--parameters", "all", "--task", "first", "--max-tokens", "1000", "--held-out-tokens", "0", "--seed", "3"]


def measured(arguments, folder, count, *more):
    """Folders of all parts."""
    outs = [folder / f"part{number}" for number in range(1, count + 1)]
    for number, out in enumerate(outs, 1):
        assert quick(arguments(out, "--part", f"{number}/{count}", *more)) == 0
    return outs


def join(out, folders, *more, **tools):
    return quick(["join", str(out), *map(str, folders), *more], **tools)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, report_arguments):
    """Four parts of the task `first` of the finished report."""
    return measured(report_arguments, tmp_path_factory.mktemp("parts"), 4, "--task", "first")


@pytest.fixture(scope="module")
def joined(tmp_path_factory, parts):
    """One report of the four, in no order of theirs."""
    out = tmp_path_factory.mktemp("joined") / "report"
    assert main(["join", str(out), *(str(parts[i]) for i in (2, 0, 3, 1))]) == 0
    return out


@pytest.fixture(scope="module")
def days(tmp_path_factory, report_arguments, texts):
    """Two runs on halves of the texts."""
    folder = tmp_path_factory.mktemp("days")
    for name, of in (("monday", texts[:10]), ("tuesday", texts[10:])):
        assert quick(report_arguments(folder / name, *FEW, "--task", name, "--text", *of)) == 0
    return folder / "monday", folder / "tuesday"


def states(out, task="first"):
    return fj.checkpoint.restore(out / "state")[task]


def facts(out, task="first"):
    return fj.checkpoint.metadata(out / "state")["tasks"][task]


def assert_same_numbers(one, other):
    """Counts exactly; means, variances, errors and both ends of intervals within 1e-6 of them."""
    assert one.keys() == other.keys()
    np.testing.assert_array_equal(one["counts"], other["counts"])
    for name in one.keys() - {"counts"}:
        a, b = one[name], other[name]
        assert fj.welford.count(a) == fj.welford.count(b)
        assert fj.welford.weight(a) == fj.welford.weight(b)
        for read in (fj.welford.mean, fj.welford.standard_error, lambda x: fj.welford.variance(x)):
            np.testing.assert_allclose(read(a), read(b), rtol=1e-6)
        half = np.asarray(fj.welford.interval(a)[1]) - np.asarray(fj.welford.mean(a))
        for end in (0, 1):
            x, y = (np.asarray(fj.welford.interval(state)[end]) for state in (a, b))
            assert (np.abs(x - y) <= 1e-6 * np.maximum(np.abs(x), half)).all()


def test_joined_parts_are_one_run(joined, finished_report):
    assert_same_numbers(states(finished_report), states(joined))
    one, other = facts(finished_report), facts(joined)
    assert other["log_loss"] == pytest.approx(one["log_loss"], rel=1e-6)
    for of in (one, other):
        del of["seconds"], of["log_loss"]
    assert one == other


def test_the_joined_page_is_that_of_one_run(joined, finished_report):
    one, other = (json.loads((out / "parts" / "first.json").read_text()) for out in (finished_report, joined))
    for name in ("settings", "title", "lead"):
        assert one[name] == other[name]
    assert len(one["blocks"]) == len(other["blocks"])
    for x, y in zip(one["blocks"], other["blocks"], strict=True):
        assert {k: v for k, v in x.items() if k not in ("rows", "light", "dark")} == {
            k: v for k, v in y.items() if k not in ("rows", "light", "dark")
        }
        if x["block"] == "picture":
            pictures = [matplotlib.image.imread(io.BytesIO(base64.b64decode(of["light"]))) for of in (x, y)]
            assert pictures[0].shape == pictures[1].shape
            assert np.abs(pictures[0] - pictures[1]).mean() < 1e-3
        elif x["block"] == "table":
            kept = [[row for row in of["rows"] if not row[0].startswith(("time", "rate"))] for of in (x, y)]
            assert kept[0] == kept[1]


def test_the_joined_table_is_that_of_one_run(joined, finished_report):
    tables = []
    for out in (finished_report, joined):
        with (out / "importance.csv").open(newline="", encoding="utf-8") as stream:
            tables.append([row for row in csv.DictReader(stream) if row["task"] == "first"])
    assert [row["token_id"] for row in tables[0]] == [row["token_id"] for row in tables[1]]
    for name in ("empirical", "true_standard_error", "empirical_upper"):
        one, other = (np.array([float(row[name]) for row in table]) for table in tables)
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_command_of_the_whole_run_finds_it_measured(joined, report_arguments, capsys):
    assert quick(report_arguments(joined, "--task", "first"), program=never, picture=never) == 0
    assert "nothing had to be computed" in capsys.readouterr().out


def test_parts_draw_the_signs_of_the_whole_run(tmp_path, report_arguments):
    assert quick(report_arguments(tmp_path / "one", *ALL)) == 0
    outs = measured(report_arguments, tmp_path, 3, *ALL)
    assert join(tmp_path / "joined", outs) == 0
    assert_same_numbers(states(tmp_path / "one"), states(tmp_path / "joined"))
    assert (tmp_path / "joined" / "layers.csv").is_file()


def test_sixteen_parts_are_one_run(tmp_path, report_arguments, finished_report):
    outs = measured(report_arguments, tmp_path, 16, "--task", "first")
    assert join(tmp_path / "joined", outs) == 0
    assert_same_numbers(states(finished_report), states(tmp_path / "joined"))


def test_an_interrupted_part_goes_on_to_the_same_bits(tmp_path, report_arguments, parts, same_bits):
    out = tmp_path / "part"
    arguments = report_arguments(out, "--task", "first", "--part", "2/4", "--checkpoint-every", "0")
    assert quick(arguments, after_step=after(3, lambda: os.kill(os.getpid(), signal.SIGINT))) == 130
    assert facts(out)["batches_done"] == 3
    assert quick([*arguments, "--resume"]) == 0
    assert same_bits(out, parts[1], "first")


def test_an_unfinished_part_is_refused_with_the_way_on(tmp_path, report_arguments, parts, capsys):
    out = tmp_path / "part"
    arguments = report_arguments(out, "--task", "first", "--part", "2/4", "--checkpoint-every", "0")
    assert quick(arguments, after_step=after(2, lambda: os.kill(os.getpid(), signal.SIGINT))) == 130
    capsys.readouterr()
    assert join(tmp_path / "out", [parts[0], out, *parts[2:]], load=never) == 2
    error = capsys.readouterr().err
    assert f"{out}:first is not finished (2 of " in error
    assert "--part 2/4 --resume" in error
    for more in (["--part", "3/4", "--resume"], ["--resume"]):
        assert quick([x for x in arguments if x not in ("--part", "2/4")] + more) == 2
        assert "had --part 2/4" in capsys.readouterr().err


def changed(folder, to, change):
    """A copy of a folder whose facts of the task are changed."""
    found = fj.checkpoint.metadata(folder / "state")
    change(found["tasks"]["first"])
    to.mkdir()
    fj.checkpoint.save(to / "state", fj.checkpoint.restore(folder / "state"), metadata=found)
    return to


def refused(capsys, out, folders, *more, **tools):
    """The sentence; nothing was loaded or written."""
    before = sorted(out.rglob("*")) if out.exists() else None
    assert join(out, folders, *more, **{"load": never, **tools}) == 2
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    error = capsys.readouterr().err
    assert error.startswith("fisher-jax: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda task: task.update(model="0" * 40), "only states of one model"),
        (lambda task: task["settings"].update({"--dtype": "bfloat16"}), "with --dtype float32 and {}:first with"),
        (lambda task: task["settings"].update({"--row-length": 16}), "with --row-length 32"),
        (lambda task: task["settings"].update({"--unit": "token"}), "with --unit document"),
        (lambda task: task["settings"].update({"--max-tokens": 5}), "with --max-tokens 80000"),
        (lambda task: task["settings"].update({"--seed": 1}), "with --seed None"),
        (lambda task: task["page"].update({"--seed": 1}), "say which with --seed"),
        (lambda task: task["page"].update({"--level": 0.5}), "say which with --level"),
        (lambda task: task.update(texts=[["x"], "none", "0" * 64]), "a part of"),
        (lambda task: task["texts"][0].__setitem__(2, "0" * 64), "not the same text"),
        (lambda task: task.update(part=[2, 5]), "the parts of one division"),
        (lambda task: task.update(part=[3, 4]), "both part 3/4"),
        (lambda task: task.update(part=None), "a whole one"),
        (lambda task: task.update(batches_done=1), "not finished (1 of 10 batches)"),
        (lambda task: task.update(model_source=""), "fj.report"),
    ],
)
def test_a_part_of_another_run_is_refused(change, sentence, tmp_path, parts, capsys):
    odd = changed(parts[1], tmp_path / "odd", change)
    error = refused(capsys, tmp_path / "out", [parts[0], odd, *parts[2:]])
    assert sentence.format(odd) in error or "is not the state of a fisher-jax report" in error
    assert str(odd) in error


def test_a_part_twice_and_missing_parts_are_refused(tmp_path, parts, capsys):
    copy = shutil.copytree(parts[1], tmp_path / "copy")
    assert f"{parts[1]}:first is given twice" in refused(capsys, tmp_path / "out", [*parts, parts[1]])
    error = refused(capsys, tmp_path / "out", [*parts, copy])
    assert f"{parts[1]}:first and {copy}:first are both part 2/4" in error
    assert "2 are missing: 1/4, 3/4" in refused(capsys, tmp_path / "out", [parts[1], parts[3]])
    assert "1 is missing: 4/4" in refused(capsys, tmp_path / "out", parts[:3])


def test_folders_that_cannot_be_joined_are_refused(tmp_path, parts, finished_report, report_arguments, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no state" in refused(capsys, tmp_path / "out", [*parts, empty])
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in refused(capsys, tmp_path / "out", [*parts, tmp_path / "file"])
    assert "a whole run already" in refused(capsys, tmp_path / "out", [f"{finished_report}:first"])
    assert "give the folder to write first" in refused(capsys, parts[0], parts[1:])
    assert "give the folder to write first" in refused(capsys, parts[0], parts)
    for arguments in (["compare", str(parts[0]), f"{finished_report}:second"], ["trim", "--state", str(parts[0])]):
        more = [] if arguments[0] == "compare" else ["--keep", "20", "--model", report_arguments("x")[2]]
        assert main([*arguments, *more, "--out", str(tmp_path / "read")]) == 2
        assert "part 1/4" in capsys.readouterr().err
    assert main(report_arguments(parts[0], "--task", "whole")) == 2
    assert "holds parts of runs" in capsys.readouterr().err


def test_a_flipped_byte_is_found(tmp_path, parts, capsys):
    damaged = shutil.copytree(parts[1], tmp_path / "damaged")
    largest = max((x for x in damaged.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    error = refused(capsys, tmp_path / "out", [parts[0], damaged, *parts[2:]], load=fj.models.load)
    assert str(damaged) in error


def test_another_model_or_text_in_its_place_is_refused(tmp_path, parts, texts, capsys):
    other = write_model(tmp_path / "other", seed=1)
    error = refused(capsys, tmp_path / "out", parts, "--model", str(other), load=fj.models.load)
    assert "was measured on tiny-llama" in error
    error = refused(capsys, tmp_path / "out", parts, "--text", *texts[1:], load=fj.models.load)
    assert "is not the text that was measured" in error
    error = refused(capsys, tmp_path / "out", parts, "--text", texts[0], "--text", texts[1])
    assert "for each of 1" in error


def test_models_and_texts_may_have_moved(tmp_path, parts, tiny_model, texts, joined, same_bits):
    moved = [shutil.copy(text, tmp_path) for text in texts]
    model = shutil.copytree(tiny_model, tmp_path / "tiny-llama")
    assert join(tmp_path / "out", parts, "--model", str(model), "--text", *moved) == 0
    assert same_bits(tmp_path / "out", joined, "first")


def test_an_interrupted_join_goes_on(tmp_path, parts, joined, same_bits, capsys):
    out = tmp_path / "out"
    assert join(out, parts, free_bytes=interrupt) == 130
    assert not out.exists()
    assert join(out, parts, picture=interrupt) == 130
    assert "give the same command again" in capsys.readouterr().out
    assert not (out / "report.html").exists()
    assert join(out, parts) == 0
    assert same_bits(out, joined, "first")
    assert (out / "report.html").is_file()
    assert join(out, parts, picture=never) == 0
    assert "nothing had to be computed" in capsys.readouterr().out


def test_what_the_page_shows_may_be_said_when_joining(tmp_path, parts):
    odd = changed(parts[1], tmp_path / "odd", lambda task: task["page"].update({"--level": 0.5}))
    assert join(tmp_path / "out", [parts[0], odd, *parts[2:]], "--level", "0.9", "--kind", "true") == 0
    page = json.loads((tmp_path / "out" / "parts" / "first.json").read_text())
    assert page["settings"] == {"--level": 0.9, "--kind": "true", "--seed": 0}


def test_more_parts_than_documents_are_refused(tmp_path, report_arguments, capsys):
    assert quick(report_arguments(tmp_path / "x", "--part", "1/100000"), program=never) == 2
    assert "can be cut into 18 at most" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("given", "out"),
    [
        (["--part", "3/16"], "part-03-of-16"),
        (["--part", "3/16", "--out", "report"], "report"),
        ([], "report"),
        (["--part", "01/1"], "part-1-of-1"),
    ],
)
def test_a_part_has_a_folder_of_its_own(given, out):
    assert settings_of(["report", *given])[1].out == Path(out)


def test_days_are_joined_as_the_library_joins_their_states(tmp_path, days):
    out = tmp_path / "week"
    assert join(out, days) == 0
    (task,) = fj.checkpoint.metadata(out / "state")["tasks"]
    found, (monday, tuesday) = states(out, task), (states(day, day.name) for day in days)
    np.testing.assert_array_equal(found["counts"], monday["counts"] + tuesday["counts"])
    for kind in ("empirical", "true"):
        one, other = monday[kind], tuesday[kind]
        assert fj.welford.count(found[kind]) == fj.welford.count(one) + fj.welford.count(other)
        weights = [fj.welford.weight(x) for x in (one, other)]
        means = [np.asarray(fj.welford.mean(x), np.float64) for x in (one, other)]
        np.testing.assert_allclose(fj.welford.mean(found[kind]), np.average(means, 0, weights), rtol=1e-6)
        merged = fj.welford.merge(fj.welford.finish(one), other)
        for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(found[kind]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    told = (out / "report.md").read_text()
    assert "18 of 20 documents" in told
    assert len(facts(out, task)["texts"]) == 2


def test_one_document_a_day_stays_one_document_a_day(tmp_path, report_arguments, texts):
    """Each run numbers its only document 0."""
    for name in (0, 1):
        arguments = report_arguments(tmp_path / str(name), *FEW, "--max-tokens", "60", "--text", texts[name])
        assert quick(arguments) == 0
    assert join(tmp_path / "both", [tmp_path / "0", tmp_path / "1"]) == 0
    assert fj.welford.count(states(tmp_path / "both")["true"]) == 2


def test_a_text_counts_once(tmp_path, days, report_arguments, texts, capsys):
    monday, tuesday = days
    copy = shutil.copytree(monday, tmp_path / "copy")
    assert "were both measured on" in refused(capsys, tmp_path / "out", [monday, tuesday, copy])
    assert join(tmp_path / "week", days) == 0
    capsys.readouterr()
    assert "a text counts once" in refused(capsys, tmp_path / "out", [tmp_path / "week", tuesday])
    overlapping = tmp_path / "overlapping"
    assert quick(report_arguments(overlapping, *FEW, "--text", *texts[9:])) == 0
    capsys.readouterr()
    error = refused(capsys, tmp_path / "out", [monday, overlapping], load=fj.models.load)
    assert texts[9] in error
    assert "would count twice" in error


@pytest.fixture
def with_two_tasks(tmp_path, days):
    """The same folders, each with a second task."""
    outs = []
    for day in days:
        held, about = fj.checkpoint.restore(day / "state"), fj.checkpoint.metadata(day / "state")["tasks"]
        outs.append(tmp_path / day.name)
        outs[-1].mkdir()
        metadata = {"tasks": {**about, "both": about[day.name]}}
        fj.checkpoint.save(outs[-1] / "state", {**held, "both": held[day.name]}, metadata=metadata)
    return outs


def test_of_several_tasks_the_one_that_all_hold_is_joined(with_two_tasks, days):
    one, other = map(str, with_two_tasks)

    def names(*places, task=""):
        return [found.name for found in chosen(places, task)]

    assert names(one, other) == ["both", "both"]
    assert names(f"{one}:monday", f"{other}:both") == ["monday", "both"]
    assert names(f"{one}:monday", f"{other}:tuesday") == ["monday", "tuesday"]
    with pytest.raises(InputError, match="has no task 'monday'"):
        names(one, other, task="monday")
    with pytest.raises(InputError, match="have none in common"):
        names(one, str(days[1]))
    with pytest.raises(TaskChoiceError) as asked:
        names(one, one)
    assert [way.added for way in asked.value.ways] == [("--task", "monday"), ("--task", "both")]


def test_settings_of_join_are_frozen():
    settings = settings_of(["join", "out", "a", "b", "--text", "wikipedia", "--text", "news", "pubmed"])[1]
    assert settings.folders == ("a", "b")
    assert settings.text == (("wikipedia",), ("news", "pubmed"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.task = "x"


def test_the_example_of_the_guide_runs():
    page = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "docs/jobs.md", "exec"), {})


def test_commands_of_the_guide_are_understood(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text(encoding="utf-8")
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    commands = re.findall(r"^fisher-jax (.*)$", shell, re.M)
    assert len(commands) == 5
    for command in commands:
        words = re.sub(r'"\$SLURM_ARRAY_TASK_ID/16"', "3/16", command).replace('"$part" $resume', "part-03-of-16")
        words = re.sub(r"\S*\*\.txt", "wikipedia", words)
        settings_of(words.split())

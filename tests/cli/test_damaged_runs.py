"""What a folder says about its runs may be damaged: one sentence, never a traceback or another number."""

import copy
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from kept import keep
from running import main

import fisher_jax as fj
from fisher_jax.cli.report.store import tasks_of_facts
from fisher_jax.cli.run.records import UnreadableError
from fisher_jax.cli.train.settings import TrainSettings
from fisher_jax.cli.train.store import Point, TrainProgress, progress_of_facts
from fisher_jax.models import load

ODD = [None, [], {}, "", "5", "kind", -1, 10**30, 0.5, math.nan, math.inf, True, [None], {"a": []}, "absent"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory, tiny_model):
    """A folder with two finished tasks on the tiny model."""
    model, out = load(tiny_model), tmp_path_factory.mktemp("reports")
    for task in ("first", "second"):
        values = np.random.default_rng(len(task)).uniform(0, 1, (6, model.config.vocab_size))
        keep(out, task, model, {"empirical": values, "true": values})
    return out


def _places(document, at=()):
    """The path of every value in a JSON document, and of the document itself."""
    yield at
    items = document.items() if isinstance(document, dict) else enumerate(document) if _is_list(document) else ()
    for key, value in items:
        yield from _places(value, (*at, key))


def _is_list(x):
    return isinstance(x, list)


def _mutated(document):
    """(path, value, the document with that value there) for everything odd everywhere."""
    for path in _places(document):
        for value in ODD:
            changed = [copy.deepcopy(document)]
            holder, key = changed, 0
            for step in path:
                holder, key = holder[key], step
            if value == "absent" and path:
                del holder[key]
            else:
                holder[key] = value
            yield path, value, changed[0]


def _same_types(before, after):
    """Whether every value has the type that it had, so that no later step trips over it."""
    if isinstance(before, dict):
        return isinstance(after, dict) and all(k in after and _same_types(v, after[k]) for k, v in before.items())
    if isinstance(after, tuple):  # a named one
        return all(_same_types(x, y) for x, y in zip(before, after, strict=True))
    if isinstance(before, (list, tuple)):
        return isinstance(after, (list, tuple)) and all(_same_types(before[0], x) for x in after)
    numeric = {float: (float, int)}.get(type(before), type(before))
    return isinstance(after, numeric) and isinstance(after, bool) == isinstance(before, bool)


def _in_range(done, total):
    return 0 <= done <= total and total >= 1


def test_every_odd_value_in_the_facts_of_a_report_is_refused_or_means_what_it_says(reports):
    saved = fj.checkpoint.metadata(reports / "state")
    tried = refused = 0
    for path, value, facts in _mutated(saved):
        tried += 1
        try:
            tasks = tasks_of_facts(facts)
        except UnreadableError:
            refused += 1
            continue
        for name, progress in tasks.items():
            before = saved["tasks"].get(name, saved["tasks"]["first"])
            assert _same_types(before, vars(progress)), (path, value)
            assert _in_range(progress.batches_done, progress.num_batches), (path, value)
            assert math.isfinite(progress.log_loss + progress.seconds), (path, value)
    assert refused > tried / 2


def _folder(out):
    out.mkdir(exist_ok=True)
    return out / "state"


@pytest.fixture(scope="module")
def train_facts():
    from dataclasses import asdict

    points = [Point(0, 0, 0.0, None, 5.5), Point(1, 64, 0.1, 5.5, 5.25)]
    progress = TrainProgress(
        TrainSettings().fixed(), "kfac", "text", "held out", 1.0, 4, 100, "kfac", 1, 64, 0.1, 0.2, 0.0, 0, points
    )
    return asdict(progress)


def test_every_odd_value_in_the_facts_of_a_training_run_is_refused_or_means_what_it_says(train_facts):
    tried = refused = 0
    for path, value, facts in _mutated(json.loads(json.dumps(train_facts))):
        tried += 1
        try:
            progress = progress_of_facts(facts)
        except UnreadableError:
            refused += 1
            continue
        assert _in_range(progress.step, progress.steps), (path, value)
        assert isinstance(progress.settings, dict), (path, value)
        assert all(isinstance(point, Point) for point in progress.points), (path, value)
        assert all(math.isfinite(point.held_out_loss) for point in progress.points), (path, value)
        assert math.isfinite(progress.seconds + progress.loss_sum + progress.bytes_per_token), (path, value)
    assert refused > tried / 2


@pytest.mark.parametrize(
    "change",
    [
        lambda task: task.update(batches_done=None),
        lambda task: task.update(batches_done=-1),
        lambda task: task.update(batches_done=2),
        lambda task: task.update(num_batches="1"),
        lambda task: task.update(settings=[]),
        lambda task: task["settings"].pop("--kind"),
        lambda task: task["settings"].update({"--row-length": "32"}),
        lambda task: task["settings"].update({"--unit": "word"}),
        lambda task: task.update(texts="first"),
        lambda task: task.update(part=[0, 3]),
        lambda task: task.update(log_loss=math.nan),
        lambda task: task.update(model=None),
    ],
)  # fmt: skip
def test_commands_tell_damaged_facts_in_one_sentence(change, tmp_path, reports, tiny_model, report_arguments, capsys):
    out = tmp_path / "out"
    facts = copy.deepcopy(fj.checkpoint.metadata(reports / "state"))
    change(facts["tasks"]["second"])
    fj.checkpoint.save(_folder(out), fj.checkpoint.restore(reports / "state"), metadata=facts)
    for arguments in (
        ["compare", str(out), "--model", tiny_model, "--out", str(tmp_path / "compared")],
        report_arguments(out, "--task", "second", "--resume"),
        ["trim", "--state", str(out), "--task", "second", "--model", tiny_model, "--out", str(tmp_path / "trimmed")],
    ):
        assert main([*arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fisher-jax: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arrays",
    [
        {"first": 0, "second": 0},
        {"first": {"empirical": 1, "true": 2, "counts": 3}},
        [1, 2],
        None,
        {"first": {"counts": jnp.zeros(3)}, "second": {"counts": jnp.zeros(3)}},
    ],
)
def test_arrays_that_are_not_those_of_a_report_are_refused(arrays, tmp_path, reports, tiny_model, capsys):
    out = tmp_path / "out"
    fj.checkpoint.save(_folder(out), arrays, metadata=fj.checkpoint.metadata(reports / "state"))
    assert main(["compare", str(out), "--model", tiny_model, "--out", str(tmp_path / "compared")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", ["[]", "null", "5", '"x"', "{", "", "\0", '{"--k": NaN}', "[" * 100_000])
def test_a_damaged_note_of_a_spectrum_is_told_in_one_sentence(content, tmp_path, tiny_model, texts, capsys):
    out = tmp_path / "out"
    (out / "unfinished").mkdir(parents=True)
    fj.checkpoint.save(out / "unfinished" / "lanczos", {"x": 0})
    (out / "unfinished" / "run.json").write_text(content)
    arguments = ["spectrum", "--model", tiny_model, "--text", texts[0], "--out", str(out), "--k", "2", "--resume"]
    assert main([*arguments, "--parameters", "final_norm", "--max-tokens", "64", "--row-length", "32"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fisher-jax: ")
    assert error.count("\n") == 1

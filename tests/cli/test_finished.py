"""A finished run given again computes nothing, says so in a line, and shows what is stored."""

import json

import pytest
from running import main, never, quick

FEW = ["--max-tokens", "400", "--task", "prose"]
NOTHING = {"program": never, "picture": never, "after_step": never}


def _files(out):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}


def _same_answer(first, second, words):
    """What a person reads the second time: the line, and the figures of the first."""
    lines = [line for line in second.splitlines() if "nothing had to be computed" in line]
    assert len(lines) == 1
    assert "--overwrite" in lines[0]
    assert all(word in second for word in words), (words, second)
    assert all(word in first for word in words)


def test_a_report_draws_nothing_again(tmp_path, report_arguments, capsys):
    out = tmp_path / "out"
    assert main(report_arguments(out, *FEW)) == 0
    first, before = capsys.readouterr().out, _files(out)
    assert "pruning: loss on" in first
    assert main(report_arguments(out, *FEW), **NOTHING) == 0
    again = capsys.readouterr().out
    _same_answer(first, again, [f"report: {out}/report.html", "rows to zero changes"])
    assert "pruning: loss on" not in again
    assert _files(out) == before
    assert main(report_arguments(out, *FEW, "--resume"), **NOTHING) == 0
    assert _files(out) == before
    # A page that went is made again from what is kept.
    (out / "report.html").unlink()
    (out / "importance.csv").unlink()
    assert main(report_arguments(out, *FEW), **NOTHING) == 0
    assert "pruning: loss on" not in capsys.readouterr().out
    assert {path: raw for path, (raw, _) in _files(out).items()} == {p: raw for p, (raw, _) in before.items()}


def test_a_setting_of_the_page_alone_draws_it_again(tmp_path, report_arguments):
    out = tmp_path / "out"
    few = [*FEW, "--held-out-tokens", "0"]
    assert quick(report_arguments(out, *few)) == 0
    before = (out / "importance.csv").read_text()
    assert quick(report_arguments(out, *few, "--level", "0.5"), after_step=never) == 0
    assert (out / "importance.csv").read_text() != before


@pytest.fixture
def training(texts):
    def arguments(out, *more):
        sizes = ["--width", "16", "--layers", "1", "--heads", "2", "--row-length", "16", "--batch-size", "4"]
        few = ["--steps", "2", "--eval-every", "1", "--held-out-tokens", "100"]
        return ["train", "--out", str(out), "--text", *texts[:9], *sizes, *few, "--optimizer", "sgd", *more]

    return arguments


def test_a_training_run_trains_and_draws_nothing_again(tmp_path, training, capsys):
    out = tmp_path / "out"
    assert main(training(out)) == 0
    first, before = capsys.readouterr().out, _files(out)
    for more in ([], ["--resume"]):
        assert main(training(out, *more), **NOTHING) == 0
        _same_answer(first, capsys.readouterr().out, [f"page: {out}/train.html", "nats/token", "SGD"])
        assert _files(out) == before  # the times of writing as well
    # What went is made again, without a step.
    (out / "train.html").unlink()
    (out / "model" / "model.safetensors").unlink()
    assert main(training(out), program=never, after_step=never) == 0
    assert (out / "train.html").exists()
    assert (out / "model" / "model.safetensors").read_bytes() == before[out / "model" / "model.safetensors"][0]


def _spectrum(model, texts, out, *more):
    small = ["--parameters", "final_norm", "--k", "2", "--max-tokens", "60", "--row-length", "16"]
    return ["spectrum", "--model", model, "--text", *texts[:5], "--out", str(out), *small, *more]


def test_a_spectrum_multiplies_nothing_again(tmp_path, tiny_model, texts, capsys):
    out = tmp_path / "out"
    run = _spectrum(tiny_model, texts, out)
    assert main(run) == 0
    first, before = capsys.readouterr().out, _files(out)
    value = (out / "spectrum.csv").read_text().splitlines()[1].split(",")[2]
    stages = ("passes: the loss", "eigenvalues: the 2 largest")
    assert all(stage in first for stage in stages)
    for more in ([], ["--resume"]):
        assert main([*run, *more], **NOTHING) == 0
        again = capsys.readouterr().out
        _same_answer(first, again, [f"{float(value):.6g}", f"spectrum: {out}/spectrum.html"])
        assert not any(stage in again for stage in stages)
        assert _files(out) == before
    # A page that went is made again from what is kept.
    (out / "spectrum.html").unlink()
    assert main(run, after_step=never) == 0
    assert (out / "spectrum.html").read_bytes() == before[out / "spectrum.html"][0]
    again = capsys.readouterr().out
    assert not any(stage in again for stage in stages)
    assert main([*run, "--seed", "1"]) == 2
    assert "had --seed 0, and this one has 1" in capsys.readouterr().err
    assert main([*run, "--seed", "1", "--overwrite"]) == 0


def test_a_trimmed_model_is_told_again_and_another_one_is_refused(tmp_path, tiny_model, texts, capsys):
    out = tmp_path / "out"
    trim = ["trim", "--model", tiny_model, "--by", "magnitude", "--text", *texts, "--characters", "60"]
    assert main([*trim, "--keep", "280", "--out", str(out)]) == 0
    first, before = capsys.readouterr().out, _files(out)
    line = next(line for line in first.splitlines() if "bits per byte" in line and "after" in line)
    assert main([*trim, "--keep", "280", "--out", str(out)]) == 0
    _same_answer(first, capsys.readouterr().out, [line.strip()])
    assert _files(out) == before
    assert main([*trim, "--keep", "281", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert _files(out) == before


def test_a_merged_model_is_told_again_and_another_one_is_refused(tmp_path, tiny_model, texts, capsys):
    import tiny

    out, other = tmp_path / "out", tiny.write_model(tmp_path / "other", seed=1)
    merge = ["merge", "--models", tiny_model, str(other), "--by", "uniform", "--text", *texts, "--out", str(out)]
    assert main([*merge, "--characters", "60"]) == 0
    first, before = capsys.readouterr().out, _files(out)
    told = json.loads((out / "merge.json").read_text())["bits_per_byte"]
    values = [f"{value:.4f}" for of in told.values() for value in of.values()]
    assert main([*merge, "--characters", "60"]) == 0
    _same_answer(first, capsys.readouterr().out, values)
    assert _files(out) == before
    assert main([*merge, "--characters", "60", "--weights", "1", "2"]) == 2
    assert "--overwrite" in capsys.readouterr().err

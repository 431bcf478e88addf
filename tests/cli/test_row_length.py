"""Rows are as long as the model allows, at most 256 tokens, unless a length was typed."""

import csv
import json

import pytest
import tiny
from running import main, quick

import fisher_jax as fj

POSITIONS = 64


@pytest.fixture
def report(tiny_model, texts):
    def arguments(out, *more):
        few = ["--max-tokens", "300", "--held-out-tokens", "0", "--batch-size", "4", "--task", "prose"]
        return ["report", "--model", tiny_model, "--text", *texts[:8], "--out", str(out), *few, *more]

    return arguments


def _settings(out):
    return fj.checkpoint.metadata(out / "state")["tasks"]["prose"]["settings"]


def test_a_report_takes_the_positions_that_the_model_has(report, tmp_path, capsys):
    out = tmp_path / "out"
    assert quick(report(out)) == 0
    assert _settings(out)["--row-length"] == POSITIONS
    # The effective length is what a later call is compared by.
    assert quick(report(out, "--row-length", str(POSITIONS))) == 0
    assert quick(report(out, "--row-length", "32")) == 2
    assert f"had --row-length {POSITIONS}, and this one has 32" in capsys.readouterr().err


def test_a_length_that_was_typed_and_is_too_long_stays_an_error(report, tmp_path, texts, tiny_model, capsys):
    out = tmp_path / "out"
    train = ["train", "--init", tiny_model, "--text", *texts[:9], "--out", str(out)]
    spectrum = ["spectrum", "--model", tiny_model, "--text", *texts[:8], "--out", str(out)]
    for arguments in (report(out), train, spectrum):
        assert main([*arguments, "--row-length", "256"]) == 2
        assert "256 is longer than the 64 positions" in capsys.readouterr().err
    assert not out.exists()


def test_a_model_with_many_positions_is_read_in_rows_of_256(report, tmp_path):
    folder, out = tiny.write_model(tmp_path / "long"), tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    assert quick(report(out, "--model", str(folder), "--max-tokens", "600")) == 0
    assert _settings(out)["--row-length"] == 256


def test_a_spectrum_takes_the_positions_that_the_model_has(tmp_path, texts, tiny_model):
    out = tmp_path / "out"
    small = ["--parameters", "final_norm", "--k", "2", "--max-tokens", "100"]
    assert main(["spectrum", "--model", tiny_model, "--text", *texts[:8], "--out", str(out), *small]) == 0
    assert f"at most {POSITIONS} tokens" in (out / "spectrum.md").read_text(encoding="utf-8")
    with (out / "spectrum.csv").open(encoding="utf-8") as stream:
        assert len(list(csv.DictReader(stream))) == 2


def test_training_on_takes_the_positions_that_the_model_has(tmp_path, texts, tiny_model):
    out = tmp_path / "out"
    few = ["--steps", "1", "--batch-size", "2", "--held-out-tokens", "100", "--optimizer", "sgd"]
    assert main(["train", "--init", tiny_model, "--text", *texts[:9], "--out", str(out), *few]) == 0
    assert fj.checkpoint.metadata(out / "state")["settings"]["--row-length"] == POSITIONS


def test_trimming_reads_longer_texts_in_pieces(tmp_path, texts, tiny_model):
    out = tmp_path / "out"
    trim = ["trim", "--model", tiny_model, "--by", "magnitude", "--keep", "280", "--text", *texts, "--out", str(out)]
    assert main(trim) == 0
    told = json.loads((out / "trim.json").read_text())
    assert told["tokens_before"] > POSITIONS * told["documents"]

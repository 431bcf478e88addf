"""Every command under the checks of JAX: rank promotion "raise", ``debug_nans``, and 64-bit numbers switched on."""

import contextlib
import csv

import jax
import numpy as np
import pytest
import tiny
from running import main

TRAIN = ["--width", "16", "--layers", "1", "--heads", "2", "--row-length", "16", "--batch-size", "4", "--steps", "2"]
SHORT = ["--batch-size", "2", "--max-tokens", "120", "--held-out-tokens", "60"]


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        yield


MODES = {"strict": strict, "x64": lambda: jax.enable_x64(True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, the texts, and a report of all parameters with two tasks."""
    root = tmp_path_factory.mktemp("modes")
    for name, seed in {"one": 0, "two": 1}.items():
        tiny.write_model(root / name, seed=seed)
    return root


def reported(folder, out, text, *more):
    options = ["--model", str(folder / "one"), "--row-length", "16", *SHORT, "--out", str(out)]
    return main(["report", "--text", *text, *options, *more])


def rows(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("mode", MODES)
def test_report_compare_trim_and_merge(mode, folder, texts, tmp_path):
    with MODES[mode]():
        for task, text in {"first": texts[:6], "second": texts[6:12]}.items():
            assert reported(folder, tmp_path / "report", text, "--task", task, "--parameters", "all") == 0
        assert (
            main(["compare", str(tmp_path / "report"), "--model", str(folder / "one"), "--out", str(tmp_path / "c")])
            == 0
        )
        trim = ["trim", "--model", str(folder / "one"), "--state", str(tmp_path / "report"), "--task", "first"]
        assert main([*trim, "--keep", "280", "--text", *texts[:20], "--out", str(tmp_path / "trimmed")]) == 0
        models = [str(folder / "one"), str(folder / "two")]
        assert (
            main(
                ["merge", "--models", *models, "--by", "uniform", "--text", *texts[:20], "--out", str(tmp_path / "m")]
            )
            == 0
        )
    assert (tmp_path / "trimmed" / "config.json").exists()
    assert (tmp_path / "m" / "config.json").exists()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["kfac", "adamw"])
def test_train(mode, optimizer, texts, tmp_path):
    options = ["--text", *texts[:9], "--held-out-tokens", "300", "--eval-every", "1", "--optimizer", optimizer]
    with MODES[mode]():
        assert main(["train", "--out", str(tmp_path), *TRAIN, *options]) == 0
    losses = [float(row["held_out_loss"]) for row in rows(tmp_path / "curve.csv")]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("mode", MODES)
def test_spectrum(mode, folder, texts, tmp_path):
    options = ["--text", *texts[:3], "--row-length", "16", "--max-tokens", "45", "--batch-size", "2"]
    options += ["--k", "2", "--density"]
    where = ["--model", str(folder / "one"), "--parameters", "final_norm", "--out", str(tmp_path)]
    with MODES[mode]():
        assert main(["spectrum", *where, *options, "--blocks", "--density-steps", "4", "--probes", "2"]) == 0
    assert (tmp_path / "spectrum.csv").exists()

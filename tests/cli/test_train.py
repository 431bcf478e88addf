"""`fisher-jax train` on tiny models: the same bits after any stop, a model that opens elsewhere, refusals."""

import csv
import os
import re
import signal

import jax
import numpy as np
import pytest
from running import after, main, quick

import fisher_jax as fj
from fisher_jax.cli.train.data import bytes_of_tokens, read_text, tokenizer_for
from fisher_jax.cli.train.model import config_for, first_params
from fisher_jax.cli.train.optimizers import build
from fisher_jax.cli.train.settings import OPTIMIZERS, TrainSettings
from fisher_jax.models import from_config, load
from tests.models import decoder_oracle

SIZES = ["--width", "16", "--layers", "1", "--heads", "2", "--row-length", "16", "--batch-size", "4"]
TINY = {"width": 16, "layers": 1, "heads": 2, "row_length": 16, "batch_size": 4, "held_out_tokens": 300}


@pytest.fixture
def arguments(texts):
    def build(out, *more):
        options = ["--text", *texts[:9], "--held-out-tokens", "300", "--steps", "6", "--eval-every", "2"]
        return ["train", "--out", str(out), *SIZES, *options, "--checkpoint-every", "0", *more]

    return build


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """A whole run of K-FAC, with its page."""
    out = tmp_path_factory.mktemp("finished") / "kfac"
    options = ["--text", *texts[:9], "--held-out-tokens", "300", "--steps", "6", "--eval-every", "2"]
    assert main(["train", "--out", str(out), *SIZES, *options, "--checkpoint-every", "0"]) == 0
    return out


def _rows(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _curve(out):
    saved = fj.checkpoint.metadata(out / "state")
    return [[step, tokens, *losses] for step, tokens, _, *losses in saved["points"]], saved["step"]


def _same_bits(a, b):
    left, right = (fj.checkpoint.restore(out / "state") for out in (a, b))
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert _curve(a) == _curve(b)


def _refused(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fisher-jax: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_kfac_stopped_by_an_interrupt_goes_on_to_the_same_bits(finished, tmp_path, arguments, capsys):
    out = tmp_path / "out"
    stop = after(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert quick(arguments(out), after_step=stop) == 130
    assert "--resume" in capsys.readouterr().out
    assert _curve(out)[1] == 3  # between two evaluations, and between two refreshes of the factors
    assert "holds an unfinished run (3 of 6 steps)" in _refused(arguments(out), capsys)
    assert "had --seed 0, and this one has 1" in _refused(arguments(out, "--resume", "--seed", "1"), capsys)
    other = arguments(out, "--resume", "--split-documents", "blank-line", "--text", __file__)
    assert "had the text" in _refused(other, capsys)
    assert quick(arguments(out, "--resume")) == 0
    _same_bits(out, finished)


def test_a_crash_loses_nothing_that_was_saved(finished, tmp_path, arguments):
    def crash():
        raise RuntimeError("power cut")

    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="power cut"):
        quick(arguments(out), after_step=after(5, crash))
    assert _curve(out)[1] == 4
    assert quick(arguments(out, "--resume")) == 0
    _same_bits(out, finished)


def test_a_finished_run_is_used_as_it_is(finished, arguments, capsys):
    before = fj.checkpoint.describe(finished / "state")
    assert quick(arguments(finished)) == 0
    assert "nothing had to be computed" in capsys.readouterr().out
    assert "had --steps 6, and this one has 7" in _refused(arguments(finished, "--steps", "7"), capsys)
    assert fj.checkpoint.describe(finished / "state") == before


def test_the_last_loss_is_that_of_the_written_model_in_float64(finished, texts):
    model = load(finished / "model")
    settings = TrainSettings(text=tuple(texts[:9]), **TINY)
    held = read_text(settings, tokenizer_for("bytes")).packed.held_out
    assert held.num_targets > 250
    assert model.tokenizer.encode("aé\n") == list("aé\n".encode())
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    losses = []
    for row, length in zip(held.tokens, held.lengths, strict=True):
        logits = decoder_oracle.logits(model.config, params, row[None, : length - 1])[0]
        log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        losses.append(log_sum - logits[np.arange(length - 1), row[1:length]])
    wanted = np.concatenate(losses).mean()
    first, *_, last = _rows(finished / "curve.csv")
    assert float(last["held_out_loss"]) == pytest.approx(wanted, rel=1e-6)
    assert float(last["held_out_bits_per_byte"]) == pytest.approx(wanted / np.log(2), rel=1e-6)
    assert float(first["held_out_loss"]) == pytest.approx(np.log(256), rel=0.02)
    assert float(last["held_out_loss"]) < float(first["held_out_loss"]) - 0.5
    assert [row["step"] for row in _rows(finished / "curve.csv")] == ["0", "2", "4", "6"]
    assert int(last["tokens"]) == 6 * 4 * 16


def test_a_run_goes_on_from_a_model(finished, texts, arguments, tmp_path, capsys):
    out = tmp_path / "out"
    run = [
        "train",
        "--init",
        str(finished / "model"),
        "--out",
        str(out),
        "--text",
        *texts[:9],
        "--optimizer",
        "adamw",
    ]
    run += ["--held-out-tokens", "300", "--row-length", "16", "--batch-size", "4", "--steps", "2"]
    assert quick(run) == 0
    before, after = (fj.checkpoint.metadata(folder / "state")["points"] for folder in (finished, out))
    assert after[0][-1] == pytest.approx(before[-1][-1], rel=1e-6)  # the loss that the first run ended with
    assert after[-1][-1] != after[0][-1]
    first, further = load(finished / "model"), load(out / "model")
    assert further.config == first.config
    assert further.tokenizer.encode("aé") == first.tokenizer.encode("aé")
    assert f"from the weights of model ({first.fingerprint})" in capsys.readouterr().out
    assert f"had --init model ({first.fingerprint}), and this one has None" in _refused(arguments(out), capsys)
    assert "leave --width 32 out" in _refused([*run, "--width", "32"], capsys)
    assert "longer than the 16 positions" in _refused([*run, "--row-length", "17"], capsys)


def test_several_optimizers_in_one_picture(finished, tmp_path, arguments, capsys):
    out = tmp_path / "out"
    assert main(arguments(out, "--compare", "adamw", "sgd", "--against", str(finished))) == 0
    found = {(row["optimizer"], row["step"]): float(row["held_out_loss"]) for row in _rows(out / "curve.csv")}
    assert {name for name, _ in found} == {"adamw", "sgd", "kfac"}
    assert found["adamw", "0"] == found["sgd", "0"] == found["kfac", "0"]  # the same weights to begin with
    assert found["adamw", "6"] != found["sgd", "6"]
    page = (out / "train.html").read_text(encoding="utf-8")
    assert page.count("<img") == 1
    assert {path.name for path in (out / "figures").iterdir()} == {"train-loss.png"}
    assert "reaches the last loss of" in capsys.readouterr().out
    for name in ("adamw", "sgd"):
        assert load(out / name / "model").config.width == 16
    other = arguments(tmp_path / "other", "--held-out-tokens", "200", "--against", str(finished))
    assert "measured on other held-out tokens" in _refused(other, capsys)


def test_a_loss_that_is_not_a_number_keeps_the_state_before_it(tmp_path, arguments, capsys):
    out = tmp_path / "out"
    error = _refused(arguments(out, "--optimizer", "sgd", "--learning-rate", "1e15"), capsys)
    assert "the last good state is kept" in error
    assert "smaller --learning-rate" in error
    done = fj.checkpoint.metadata(out / "state")["step"]
    stopped = int(re.search(r"stopped at step (\d+)", error)[1])
    assert 0 < done <= stopped
    settings = TrainSettings(**TINY)
    params = first_params(config_for(settings, tokenizer_for("bytes")), 0)
    example = fj.next_token_batch(np.zeros((4, 17), np.int32))  # what SGD does not look at
    tx = build(TrainSettings(**TINY, optimizer="sgd"), lambda params, tokens: tokens, example)
    saved = fj.checkpoint.restore(out / "state", {"params": params, "optimizer": tx.init(params)})
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(saved))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--width", "18", "--heads", "4"], "gives no even head size"),
        (["--learning-rate", "0.1"], "kfac chooses its learning rate itself"),
        (["--optimizer", "adamw", "--damping", "0.1"], "--damping is for kfac"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--against", "nowhere"], "holds no run of fisher-jax train"),
        (["--tokenizer", "nowhere"], "no file or folder 'nowhere'"),
        (["--text", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["--row-length", "9000"], "fewer than one sequence"),
    ],
)
def test_input_that_cannot_be_used(more, sentence, tmp_path, arguments, capsys):
    out = tmp_path / "out"
    assert sentence in _refused(arguments(out, *more), capsys)
    assert not out.exists()


@pytest.mark.parametrize("more", [["--optimizer", "newton"], ["--steps", "0"], ["--learning-rate", "-1"]])
def test_options_out_of_range(more, tmp_path, arguments, capsys):
    assert main(arguments(tmp_path / "out", *more)) == 2
    assert more[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_every_parameter(name):
    settings = TrainSettings(**TINY, optimizer=name)
    config = config_for(settings, tokenizer_for("bytes"))
    tokens = np.zeros((4, 17), np.int32)
    tx = build(settings, from_config(config).apply, jax.eval_shape(fj.next_token_batch, tokens))

    def update(params):
        updates, _ = tx.update(
            params, tx.init(params), params, batch=fj.next_token_batch(tokens), key=jax.random.key(0)
        )
        return updates

    params = jax.eval_shape(lambda: first_params(config, 0))
    assert jax.eval_shape(update, params) == params


def test_an_epoch_has_every_row_once_and_depends_on_the_step_alone(texts):
    settings = TrainSettings(text=tuple(texts[:9]), **TINY)
    text = read_text(settings, tokenizer_for("bytes"))
    rows = text.packed.stream.tokens
    steps = -(-len(rows) // 4)
    seen = np.concatenate([text.batch(settings, step)[0] for step in range(steps)])[: len(rows)]
    assert sorted(map(bytes, seen)) == sorted(map(bytes, rows))
    assert not np.array_equal(seen, rows)
    again = np.concatenate([text.batch(settings, step)[0] for step in range(steps, 2 * steps)])
    assert not np.array_equal(seen[: len(rows)], again[: len(rows)])


@pytest.mark.parametrize("source", ["bytes", "model"])
def test_bytes_of_tokens_add_up_to_those_of_the_text(source, tiny_model):
    tokenizer = tokenizer_for(tiny_model if source == "model" else source)
    text = "the river runs past old mills, où 水 😀\n"
    assert bytes_of_tokens(tokenizer)[tokenizer.encode(text)].sum() == len(text.encode())

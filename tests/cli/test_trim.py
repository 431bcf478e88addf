"""fisher-jax trim: really smaller, the same on what is kept, and every text still encodable."""

import json
import re

import numpy as np
import pytest
import tiny
from running import main, quick

from fisher_jax import models
from fisher_jax.text.bits_per_byte import bits_per_byte, difference, measure


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model, its texts, and the report on them."""
    root = tmp_path_factory.mktemp("trim")
    model, texts = tiny.write_model(root / "model"), tiny.write_texts(root / "texts", words=60)
    report = ["report", "--model", str(model), "--text", *texts, "--row-length", "32", "--max-tokens", "400"]
    assert quick([*report, "--held-out-tokens", "0", "--task", "prose", "--out", str(root / "report")]) == 0
    return model, texts, root / "report"


def trim(folders, out, *options):
    model, texts, report = folders
    common = ["trim", "--model", str(model), "--text", *texts, "--characters", "60", "--out", str(out)]
    state = [] if "magnitude" in options else ["--state", str(report)]
    return main([*common, *state, *options])


@pytest.mark.parametrize("by", ["empirical", "magnitude"])
def test_the_written_model_has_the_logits_of_the_kept_tokens(folders, tmp_path, by, capsys):
    assert trim(folders, tmp_path / "out", "--keep", "280", "--by", by) == 0
    whole, cut = models.load(folders[0]), models.load(tmp_path / "out")
    kept = np.array(json.loads((tmp_path / "out" / "trim.json").read_text())["kept_token_ids"])
    assert cut.config.vocab_size == cut.tokenizer.vocab_size == len(kept) == 280
    tokens = np.random.default_rng(0).integers(0, 280, (2, 12)).astype(np.int32)
    want = np.asarray(whole.apply(whole.params, kept[tokens].astype(np.int32)))[..., kept]
    np.testing.assert_allclose(cut.apply(cut.params, tokens), want, atol=1e-5)
    assert [cut.tokenizer.token_text(i) for i in range(280)] == [whole.tokenizer.token_text(int(i)) for i in kept]
    assert re.search(r"logits of the kept tokens differ by at most \d", capsys.readouterr().out)


def test_the_told_bits_per_byte_are_those_of_the_two_models(folders, tmp_path):
    assert trim(folders, tmp_path / "out", "--keep", "270") == 0
    told = json.loads((tmp_path / "out" / "trim.json").read_text())
    texts = [tiny.prose(number, 60)[:60] for number in (7, 15)]
    for name, folder in (("before", folders[0]), ("after", tmp_path / "out")):
        model = models.load(folder)
        nats = size = 0.0
        for text in texts:  # one token after the other
            ids = [model.tokenizer.encode("\n")[0], *model.tokenizer.encode(text)]
            logits = np.asarray(model.apply(model.params, np.array([ids], np.int32)), np.float64)[0]
            nats -= sum(logits[i, ids[i + 1]] - np.log(np.exp(logits[i]).sum()) for i in range(len(ids) - 1))
            size += len(text.encode())
        assert told[f"bits_per_byte_{name}"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    assert told["tokens_after"] > told["tokens_before"]


def test_the_error_of_the_change_is_that_of_a_ratio_over_texts():
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 100, 400)
    before = measured(rng.normal(2.0, 0.1, 400) * sizes, sizes)
    after = before._replace(bits=before.bits + rng.normal(0.3, 0.2, 400) * sizes)
    change, error = difference(after, before)
    assert change == pytest.approx(bits_per_byte(after) - bits_per_byte(before))
    assert error == pytest.approx(0.2 / np.sqrt(400), rel=0.15)


def measured(bits, sizes):
    from fisher_jax.text.bits_per_byte import Loss

    return Loss(bits, sizes, sizes)


def test_a_text_that_is_too_long_names_the_option(folders):
    from fisher_jax._support.errors import InputError

    with pytest.raises(InputError, match="--characters"):
        measure(models.load(folders[0]), ["zq" * 100])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep", "100"], "100 tokens cannot be kept of"),
        (["--keep", "5000"], "give a number from 256 (single bytes and special tokens)"),
        (["--keep", "260", "--task", "news"], "has no task 'news'; it holds prose"),
    ],
)
def test_bad_input_is_one_clear_sentence_and_writes_nothing(folders, tmp_path, options, words, capsys):
    assert trim(folders, tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scores_of_another_model_and_missing_scores_are_refused(folders, tmp_path, capsys):
    other = tiny.write_model(tmp_path / "other", seed=1)
    assert trim((other, *folders[1:]), tmp_path / "out", "--keep", "260") == 2
    assert "was measured on" in capsys.readouterr().err
    assert main(["trim", "--keep", "260", "--out", str(tmp_path / "out")]) == 2
    assert "give its folder with --state" in capsys.readouterr().err


def test_a_model_that_is_there_is_not_overwritten(folders, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert trim(folders, tmp_path, "--keep", "260", "--by", "magnitude") == 2
    assert "holds a model" in capsys.readouterr().err

"""Commands on models as published: padded heads, GGUF files, settings with token ids; and on damaged ones."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from running import main
from safetensors.numpy import load_file, save_file

from fisher_jax import models

sys.path.append(str(Path(__file__).parents[1] / "models"))

import tiny_models
from published_models import llama3_config, llama3_gguf

PAD = 3


def padded(folder, **settings):
    """A tiny model with rows of the head beyond its tokens, as Qwen has 151,936 rows for 151,665 tokens."""
    tiny.write_model(folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.concatenate([rows, np.full((PAD, rows.shape[1]), 0.01, rows.dtype)])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(rows) + PAD} | settings))
    return folder, len(rows)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A padded model, its number of tokens, its texts and a report with two tasks."""
    root = tmp_path_factory.mktemp("padded")
    model, tokens = padded(root / "model", eos_token_id=[5, 260], pad_token_id=None)
    (model / "generation_config.json").write_text(
        json.dumps({"suppress_tokens": [7, 290], "bad_words_ids": [[5], [290, 7]], "eos_token_id": 5})
    )
    texts = tiny.write_texts(root / "texts", words=60)
    common = ["report", "--model", str(model), "--row-length", "32", "--max-tokens", "400", "--held-out-tokens", "0"]
    for task, part in {"one": texts, "two": texts[4:]}.items():
        assert main([*common, "--text", *part, "--task", task, "--out", str(root / "report")]) == 0
    return model, tokens, texts, root / "report"


def test_a_report_names_rows_without_a_token(measured):
    _, tokens, _, report = measured
    table = (report / "importance.csv").read_text()
    assert all(f"<no text {tokens + i}>" in table for i in range(PAD))


def test_tasks_of_a_padded_model_are_compared(measured, tmp_path):
    given = ["compare", str(measured[-1]), "--model", str(measured[0]), "--out", str(tmp_path / "out")]
    assert main(given) == 0
    assert f"<no text {measured[1]}>" in (tmp_path / "out" / "compare.csv").read_text()


def test_a_padded_model_is_trimmed_and_its_settings_are_renumbered(measured, tmp_path):
    model, _, texts, report = measured
    options = ["--text", *texts, "--characters", "60", "--keep", "270", "--out", str(tmp_path / "out")]
    assert main(["trim", "--model", str(model), "--state", str(report), "--task", "one", *options]) == 0
    kept = json.loads((tmp_path / "out" / "trim.json").read_text())["kept_token_ids"]
    written, generation = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert written["eos_token_id"] == [kept.index(id) for id in (5, 260) if id in kept]
    assert generation["suppress_tokens"] == [kept.index(id) for id in (7, 290) if id in kept]
    assert generation["eos_token_id"] == kept.index(5)
    assert [kept.index(5)] in generation["bad_words_ids"]
    assert models.load(tmp_path / "out").config.vocab_size == 270


def test_a_gguf_with_llama3_factors_is_trimmed_and_merged(tmp_path):
    config = llama3_config()
    file = llama3_gguf(tmp_path / "tiny.gguf", config)
    texts = tiny.write_texts(tmp_path / "texts", count=16, words=10)
    whole = ["--text", *texts, "--characters", "30", "--keep", "260", "--by", "magnitude"]
    assert main(["trim", "--model", str(file), *whole, "--out", str(tmp_path / "trimmed")]) == 0
    merged = ["merge", "--models", str(file), str(file), "--by", "uniform", "--out", str(tmp_path / "merged")]
    assert main(merged) == 0
    for name in ("trimmed", "merged"):
        found = models.load(tmp_path / name).config
        np.testing.assert_allclose(found.rope_divisors, config.rope_divisors, rtol=1e-12)


@pytest.mark.parametrize("command", ["trim", "merge"])
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, command, capsys):
    config = dataclasses.replace(tiny_models.LLAMA, out_bias=True)  # a bias of the output alone is no family's
    file = tiny_models.write_gguf(tmp_path / "odd.gguf", config, tiny_models.random_params(config))
    out = ["--out", str(tmp_path / "out")]
    if command == "trim":
        given = ["trim", "--model", str(file), "--keep", "260", "--by", "magnitude", *out]
    else:
        given = ["merge", "--models", str(file), str(file), "--by", "uniform", *out]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert "no family of models that is written computes this decoder" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", '{"eos_token_id": [5, 9999999]}'),
        ("generation_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"eos_token": 7}'),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_settings_that_trim_cannot_carry_are_refused_before_the_work(tmp_path, name, content, capsys):
    model = tiny.write_model(tmp_path / "model")
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    given = ["trim", "--model", str(model), "--keep", "260", "--by", "magnitude", "--out", str(tmp_path / "out")]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "2"},
        {"hidden_size": [16]},
        {"rope_theta": 0},
        {"rms_norm_eps": -1},
        {"tie_word_embeddings": "false"},
        {"architectures": [1]},
        {"model_type": {"a": "\x1b[31m[/x]\n"}},
    ],
)
def test_a_report_on_a_malformed_model_is_one_sentence(tmp_path, changes, capsys):
    model = tiny.write_model(tmp_path / "model")
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert main(["report", "--model", str(model), "--text", "wikipedia", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fisher-jax: ")
    assert error.count("\n") == 1
    assert "\x1b" not in error
    assert next(iter(changes)) in error or "supported" in error
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_read_are_told(tmp_path, capsys):
    model = tiny.write_model(tmp_path / "model")
    (model / "consolidated.safetensors").write_bytes(b"")
    texts = tiny.write_texts(tmp_path / "texts", count=16, words=20)
    given = ["--text", *texts, "--characters", "30", "--keep", "260", "--by", "magnitude"]
    assert main(["trim", "--model", str(model), *given, "--out", str(tmp_path / "out")]) == 0
    assert "not read, since they are not this model's weights: 'consolidated.safetensors'" in capsys.readouterr().out

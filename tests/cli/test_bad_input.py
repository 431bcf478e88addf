"""Bad input: one clear sentence, exit code 2, nothing half-written."""

import errno
import io
import json
import sys

import pytest
from running import main, shared
from tiny import write_model

import fisher_jax as fj


def _refused(arguments, out, capsys, **tools):
    """The sentence of a run that must fail and leave nothing behind."""
    assert main(arguments, **tools) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fisher-jax: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.out + captured.err
    assert not out.exists() or not any(out.iterdir())
    return captured.err


def _text_cases(folder_path):
    bad = folder_path / "latin.txt"
    bad.write_bytes(b"plain text and then caf" + b"\xe9 au lait")
    empty, blank, binary = (folder_path / name for name in ("empty.txt", "blank.txt", "binary.txt"))
    empty.write_bytes(b"")
    blank.write_text(" \n\n\t\n")
    binary.write_bytes(b"abc\x00def")
    short = folder_path / "short.txt"
    short.write_text("the river")
    return {
        "missing": ([str(folder_path / "nowhere.txt")], "there is no text file"),
        "folder": ([str(folder_path)], "is a folder"),
        "empty": ([str(empty)], "holds no text"),
        "blank": ([str(blank)], "holds no text"),
        "latin-1": ([str(bad)], "not UTF-8: byte 23 is 0xe9"),
        "binary": ([str(binary)], "holds a zero byte at 3"),
        "short": ([str(short)], "fewer than one sequence of 32"),
        "stdin twice": (["-", "-"], "only once"),
    }


@pytest.mark.parametrize("case", ["missing", "folder", "empty", "blank", "latin-1", "binary", "short", "stdin twice"])
def test_text_that_cannot_be_used(case, tmp_path, tiny_model, capsys):
    text, sentence = _text_cases(tmp_path)[case]
    out = tmp_path / "out"
    arguments = ["report", "--model", tiny_model, "--out", str(out), "--row-length", "32", "--text", *text]
    assert sentence in _refused(arguments, out, capsys)


def test_empty_standard_input(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    out = tmp_path / "out"
    arguments = ["report", "--model", tiny_model, "--out", str(out), "--text", "-"]
    assert "standard input holds no text" in _refused([*arguments, "--row-length", "32"], out, capsys)


def test_a_corpus_whose_package_is_missing(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gensim", None)
    out = tmp_path / "out"
    arguments = ["report", "--model", tiny_model, "--out", str(out), "--text", "news", "--row-length", "32"]
    assert "dependency group `shipped`" in _refused(arguments, out, capsys)


def test_models_that_cannot_be_used(tmp_path, report_arguments, capsys):
    out = tmp_path / "out"
    broken = write_model(tmp_path / "foreign")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "mamba", "architectures": ["Mamba"]}))
    assert "amba" in _refused(report_arguments(out, "--model", str(broken)), out, capsys)
    assert "nowhere" in _refused(report_arguments(out, "--model", str(tmp_path / "nowhere")), out, capsys)
    small = write_model(tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    sentence = _refused(report_arguments(out, "--model", str(small)), out, capsys)
    assert "--row-length 32 is longer than the 16 positions" in sentence


def test_a_loss_that_is_not_a_number_names_the_batch_and_its_documents(tmp_path, report_arguments, capsys):
    out = tmp_path / "out"
    poisoned = write_model(tmp_path / "poisoned", poison=True)
    sentence = _refused(report_arguments(out, "--model", str(poisoned)), out, capsys)
    assert "batch 0 was rejected" in sentence
    assert "text00.txt" in sentence


def test_a_nan_later_keeps_the_state_before_it(tmp_path, report_arguments, capsys):
    def with_nan_from_document_5(make, *about):
        step = shared(make, *about)

        def spoilt(params, state, tokens, mask, units, index):
            state, loss, count = step(params, state, tokens, mask, units, index)
            return state, float("nan") if units[0] >= 5 else loss, count

        return spoilt

    out = tmp_path / "out"
    arguments = report_arguments(out, "--task", "first", "--checkpoint-every", "0")
    assert main(arguments, program=with_nan_from_document_5) == 2
    error = capsys.readouterr().err
    progress = fj.checkpoint.metadata(out / "state")["tasks"]["first"]
    assert f"batch {progress['batches_done']} was rejected" in error
    assert progress["batches_done"] > 0


def test_folders_that_cannot_be_written(tmp_path, report_arguments, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    assert main(report_arguments(file)) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(report_arguments(file / "below")) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(report_arguments("/proc/fisher")) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert file.read_text() == "x"


def test_a_disk_that_is_full_from_the_start(tmp_path, report_arguments, capsys):
    out = tmp_path / "deep" / "out"
    assert "MiB free" in _refused(report_arguments(out), out, capsys, free_bytes=lambda folder: 1000)
    assert not out.parent.exists()


def test_a_disk_that_fills_up(tmp_path, report_arguments, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fj.checkpoint, "save", full)
    out = tmp_path / "out"
    assert "is full" in _refused(report_arguments(out), out, capsys)


@pytest.mark.parametrize(
    "arguments", [["--level", "95"], ["--row-length", "1"], ["--max-tokens", "none"], ["--unit", "word"]]
)
def test_options_out_of_range(arguments, tmp_path, report_arguments, capsys):
    assert main(report_arguments(tmp_path / "out", *arguments)) == 2
    assert arguments[0] in capsys.readouterr().err

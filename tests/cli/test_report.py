"""The command from end to end on a tiny random model."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from running import main

import fisher_jax as fj
from fisher_jax.models import load


def _csv(out):
    with (out / "importance.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


class _Page(HTMLParser):
    """Collects tags, their nesting errors and every address."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.images, self.text = [], [], 0, []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in {"src", "srcset", "href"}]
        self.images += tag == "img"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_well_formed_and_self_contained(finished_report):
    html = (finished_report / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert page.images == len(list((finished_report / "figures").rglob("*.png"))) == 14
    assert page.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert "http" not in re.sub(r'"data:image/png;base64,[^"]*"', "", html)
    assert "<script" not in html


def test_markdown_shows_every_picture(finished_report):
    text = (finished_report / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\((figures/[^)]+)\)", text)
    assert sorted(shown) == sorted(
        str(p.relative_to(finished_report)) for p in (finished_report / "figures").rglob("*.png")
    )
    for path in shown:
        assert (finished_report / path).read_bytes().startswith(b"\x89PNG")


def test_csv_has_every_row_once_in_order_of_importance(finished_report, tiny_model):
    rows = [row for row in _csv(finished_report) if row["task"] == "first"]
    model = load(tiny_model)
    assert sorted(int(row["token_id"]) for row in rows) == list(range(model.config.vocab_size))
    means = [float(row["empirical"]) for row in rows]
    assert means == sorted(means, reverse=True)
    for row in rows:
        assert float(row["empirical_lower"]) <= float(row["empirical"]) <= float(row["empirical_upper"])


def test_csv_agrees_with_a_direct_computation(finished_report, tiny_model, texts):
    model = load(tiny_model)
    state = fj.checkpoint.restore(finished_report / "state")["first"]
    progress = fj.checkpoint.metadata(finished_report / "state")["tasks"]["first"]
    counts = np.asarray(state["counts"])
    assert counts.sum() == progress["tokens"]
    # Every row of text, by a plain loop over documents: count, and sum of (p - onehot)^2 |h|^2.
    forward = jax.jit(model.hidden)
    total, labels, tokens_seen = np.zeros(model.config.vocab_size), np.zeros_like(counts), 0
    for number, path in enumerate(texts):
        if number % 8 == 7:
            continue  # held out
        tokens = np.array(model.tokenizer.encode(Path(path).read_text("utf-8")))
        for first in range(0, len(tokens) - 1, 31):
            row = tokens[first : first + 32]
            padded = np.pad(row, (0, 32 - len(row)))[None, :-1]
            hidden = np.asarray(forward(model.params, padded), np.float64)[0, : len(row) - 1]
            logits = hidden @ np.asarray(model.head(model.params), np.float64).T
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            p[np.arange(len(p)), row[1:]] -= 1
            total += (p**2 * np.sum(hidden**2, axis=1, keepdims=True)).sum(axis=0)
            np.add.at(labels, row[1:], 1)
            tokens_seen += len(p)
    assert tokens_seen == progress["tokens"]
    np.testing.assert_array_equal(counts, labels)
    np.testing.assert_allclose(np.asarray(fj.welford.mean(state["empirical"])), total / tokens_seen, rtol=2e-4)


def test_tasks_share_a_folder_and_are_compared(finished_report):
    assert set(fj.checkpoint.restore(finished_report / "state")) == {"first", "second"}
    text = (finished_report / "report.md").read_text(encoding="utf-8")
    assert "Tasks side by side" in text


def test_single_entries_add_up_to_the_rows(finished_report):
    state = fj.checkpoint.restore(finished_report / "state")["second"]
    entries, rows = (np.asarray(fj.welford.mean(state[name])) for name in ("param", "empirical"))
    np.testing.assert_allclose(entries.sum(axis=1), rows, rtol=1e-4)


def test_one_file_gives_a_report_without_intervals(tmp_path, tiny_model, texts, capsys):
    out = tmp_path / "single"
    arguments = ["report", "--model", tiny_model, "--text", texts[0], "--out", str(out), "--row-length", "16"]
    assert main([*arguments, "--batch-size", "2"]) == 0
    assert "one document gives no intervals" in capsys.readouterr().out
    assert {row["empirical_lower"] for row in _csv(out)} == {"nan"}
    assert "There is only one document here" in (out / "report.md").read_text()


def test_first_line_and_last_line_say_what_a_person_needs(tmp_path, report_arguments, capsys):
    out = tmp_path / "lines"
    assert main(report_arguments(out, "--held-out-tokens", "0", "--unit", "sequence", "--kind", "true")) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("fisher-jax ")
    assert lines[-1] == f"report: {out}/report.html"
    assert "Not measured" in (out / "report.md").read_text()


def test_a_finished_run_is_not_measured_twice(finished_report, report_arguments, capsys):
    before = json.dumps(fj.checkpoint.metadata(finished_report / "state"))
    arguments = report_arguments(finished_report, "--task", "second", "--max-tokens", "2000", "--groups", "param")
    assert main(arguments) == 0
    assert "nothing had to be computed" in capsys.readouterr().out
    assert json.dumps(fj.checkpoint.metadata(finished_report / "state")) == before


def test_help_and_version(capsys):
    for arguments in (["--help"], ["report", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    assert re.search(r"fisher-jax \d+\.\d+", capsys.readouterr().out)

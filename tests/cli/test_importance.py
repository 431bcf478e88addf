"""Tables, outliers, comparisons, and pictures of awkward tokens."""

import csv
import io
import json

import numpy as np
import pytest

from fisher_jax._support.printable import readable
from fisher_jax.cli.page import style
from fisher_jax.cli.report import plots, pruning_plots
from fisher_jax.cli.report.importance import Importance, compare, importance_csv, outliers
from fisher_jax.cli.report.orderings import orderings
from fisher_jax.cli.report.pruning import prune
from fisher_jax.cli.run.tools import TOOLS

AWKWARD = [
    "$\\frac$",
    " $x",
    "中文",
    "\n",
    '"quoted", comma',
    "שלום",
    "\x00",
    "👍",
    "_a^b\\frac",
    "%",
    "&<b>",
    "é",
    " " * 40,
]


def _importance(size=240, seed=0):
    generator = np.random.default_rng(seed)
    counts = np.sort(generator.poisson(40 / np.arange(1, size + 1) ** 0.8))[::-1]
    mean = (counts + 0.01) * np.exp(0.05 * generator.normal(size=size))
    error = 0.2 * mean
    return Importance(mean, error, mean - 2 * error, mean + 2 * error, counts, 30.0, 5000.0)


def _tokens(size):
    return [readable(AWKWARD[i % len(AWKWARD)] + str(i // len(AWKWARD))) for i in range(size)]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Paris", "␣Paris"),
        ("\n\n", "\\n\\n"),
        ("a\\n", "a\\\\n"),
        ("\x07", "\\x07"),
        ("\u200b", "\\u200b"),
        ("", "∅"),
    ],
)
def test_tokens_are_readable_on_one_line(token, shown):
    assert readable(token) == shown


def test_different_tokens_look_different():
    tokens = ["\n", "\\n", " ", "␣", "\t", "\\t", "n", ""]
    shown = [readable(token) for token in tokens]
    assert len(set(shown)) >= len(tokens) - 1  # only a real ␣ looks like a space


def test_csv_survives_commas_quotes_and_line_breaks():
    result, other = _importance(len(AWKWARD)), _importance(len(AWKWARD), seed=1)
    text = importance_csv({"=a,b": {"true": result, "empirical": other}}, AWKWARD)
    rows = list(csv.reader(io.StringIO(text)))
    assert {len(row) for row in rows} == {12}
    assert {json.loads(row[0]) for row in rows[1:]} == {"=a,b"}
    assert {json.loads(row[2]) for row in rows[1:]} == set(AWKWARD)
    assert [int(row[1]) for row in rows[1:]] == result.order.tolist()


def test_outliers_are_the_rows_put_there():
    result = _importance()
    often = np.flatnonzero(result.counts >= 5)
    high, low = often[1], often[-1]
    result.mean[high] *= 50
    result.mean[low] /= 50
    assert {high, low} <= set(outliers(result).tolist())
    assert outliers(result._replace(counts=np.zeros_like(result.counts))).size == 0


def test_comparison_finds_what_moved():
    here, there = _importance(), _importance()
    here.mean[3] *= 4
    there.mean[5] *= 4
    found = compare("a", here, "b", there)
    assert found.gainers.tolist() == [3]
    assert found.losers.tolist() == [5]
    assert 0.95 < found.rank_correlation < 1
    assert compare("a", here, "b", here).rank_correlation == pytest.approx(1)
    # What counts is the difference over its error: a large but uncertain one comes later.
    here.mean[0] *= 20
    here.error[0] = 10 * here.mean[0]
    assert compare("a", here, "b", there).gainers.tolist() == [3, 0]


def test_labels_are_moved_apart_within_their_bounds():
    placed = style.spread([1.0, 1.0, 1.0, 9.9, 5.0], 0.5, 0.0, 10.0)
    assert np.all(np.diff(np.sort(placed)) >= 0.5 - 1e-6)
    assert placed.min() >= 0
    assert placed.max() <= 10
    assert placed[4] == 5.0


def test_ticks_of_a_logarithmic_axis_are_plain_text():
    with style.theme_context(style.LIGHT):
        from matplotlib.figure import Figure

        axes = Figure().subplots()
    for low, high, wanted in (
        (0.5, 3e5, ["1", "10", "100", "1k", "10k", "100k"]),
        (3.0, 40.0, ["5", "10", "20"]),
        (4e-14, 3e-13, ["5·10⁻¹⁴", "10⁻¹³", "2·10⁻¹³"]),
    ):
        style.log_axis(axes, "x", low, high, compact=True)
        assert [label.get_text() for label in axes.get_xticklabels()] == wanted


@pytest.mark.parametrize("intervals", [True, False])
def test_every_picture_can_be_drawn_of_awkward_tokens(intervals, monkeypatch):
    main = _importance()
    if not intervals:
        nothing = np.full_like(main.mean, np.nan)
        main = main._replace(error=nothing, lower=nothing, upper=nothing, units=1.0)
    main.mean[-20:] = 0.0
    tokens, size = _tokens(len(main.mean)), len(main.mean)
    comparison = compare("a", main, "b", _importance(seed=1))
    generator = np.random.default_rng(0)
    head = generator.normal(size=(size, 8)).astype(np.float32)
    ranked = orderings(main.mean, main.mean, head, main.counts)
    hidden, targets = generator.normal(size=(60, 8)).astype(np.float32), generator.integers(0, size, 60)
    pruned = prune(hidden, targets, np.arange(60) // (20 if intervals else 60), head, ranked)
    drawings = [
        lambda theme: plots.rank_figure(theme, main, main, tokens, "true", 0.9),
        lambda theme: plots.frequency_figure(theme, main, tokens),
        lambda theme: plots.dots_figure(
            theme, [("title $", main.order[:9]), ("b", main.order[-9:])], main, tokens, 0.9
        ),
        lambda theme: plots.columns_figure(theme, generator.exponential(size=8)),
        lambda theme: plots.comparison_figure(theme, comparison, main, main, tokens),
        lambda theme: pruning_plots.zeroed_figure(theme, pruned),
        lambda theme: pruning_plots.removed_figure(theme, pruned),
    ]
    for draw in drawings:
        (picture,) = style.drawn([style.picture("name", "words", draw)], TOOLS)
        assert picture.light.startswith(b"\x89PNG")
        assert picture.dark.startswith(b"\x89PNG")
        assert picture.light != picture.dark

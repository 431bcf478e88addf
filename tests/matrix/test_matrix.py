"""Every cell of the table: a value against float64 oracles, or a named refusal."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.matrix import measured, page, table
from tests.matrix.table import COLUMNS, ROWS, Refusal, kind_of


def cells(kind):
    every = [(name, column) for column in COLUMNS for name in ROWS]
    return [pytest.param(*cell, id=", ".join(cell)) for cell in every if kind(*kind_of(*cell))]


@pytest.fixture(scope="module")
def found():
    """The device count is fixed when JAX starts, and so is how it compiles."""
    environment = {**os.environ, "XLA_FLAGS": measured.FASTEST, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.matrix.measured"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "column"), cells(lambda kind, why: kind == "value"))
def test_value(found, name, column):
    cell = found[f"{name}, {column}"]
    assert "failed" not in cell, cell["failed"]
    if "largest" in cell:  # in standard errors of a mean over draws
        assert cell["largest"] < 5
        assert cell["root"] < 1.6
        return
    assert cell["distance"] < cell["rtol"]
    if column == "donation":
        assert cell["donated"]


@pytest.mark.parametrize(("name", "column"), cells(lambda kind, why: isinstance(why, Refusal)))
def test_refusal(found, name, column):
    refusal, told = kind_of(name, column)[1], found[f"{name}, {column}"]
    assert told.get("failed", str(told)).startswith(f"{refusal.error.__name__}: ")
    assert all(word in told["failed"] for word in refusal.names), told["failed"]


@pytest.mark.parametrize("line", [*ROWS, *COLUMNS])
def test_few_cells_are_refused(line):
    of_line = [kind_of(n, c)[0] for n in ROWS for c in COLUMNS if line in (n, c)]
    counted = [kind for kind in of_line if kind != "no meaning"]
    assert counted.count("refused") <= 0.15 * len(counted)


def test_the_page_is_the_table():
    assert page.PATH.read_text() == page.text(), "run python -m tests.matrix.page"


@pytest.mark.parametrize("name", ROWS)
def test_what_is_right_depends_on_the_mask(name):
    """A cell whose mask or weights are left out is far from what is right."""
    mask, weights = (ROWS[name].right(table.wanted(column)) for column in ("mask", "weights"))
    assert table.distance(mask, weights) > 0.02
    assert np.isfinite(weights).any()

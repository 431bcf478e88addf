"""Every cell of the table: a value against float64 oracles, or a named refusal.

Operations run one by one here, so that one column shares what another has compiled; a process of its own compiles.
"""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.eight_devices import FLAGS
from tests.matrix import cases, page, table
from tests.matrix.table import APART, COLUMNS, ROWS, Refusal, kind_of

HERE = [column for column in COLUMNS if column not in APART]
# What is random is right in the mean over draws here; elsewhere a draw is the plain model's.
DRAWN = ("mask", "rows that interact", "bfloat16", "x64")


def cells(*columns, kind):
    every = [(name, column) for column in columns for name in ROWS]
    return [pytest.param(*cell, id=", ".join(cell)) for cell in every if kind(*cell)]


def is_value(name, column):
    return kind_of(name, column)[0] == "value"


def is_refused(name, column):
    return isinstance(kind_of(name, column)[1], Refusal)


@functools.cache
def right(column):
    return table.wanted(column)


@functools.cache
def one_draw(name, of):
    """The plain model's, with the masks and weights of a column."""
    with jax.disable_jit():
        return table.measure(ROWS[name], cases.case(of))


@pytest.mark.parametrize(("name", "column"), cells(*HERE, kind=is_value))
def test_value(name, column, tmp_path):
    row, folder = ROWS[name], tmp_path / "state" if column.startswith("checkpoint") else None
    with table.precision(column):
        case = cases.case(column)
        if row.draws is not None and column in DRAWN:
            with jax.disable_jit():
                draws = row.draws(case)
            largest, root = table.of_draws(draws, row.right(right(column)), slack=case.rtol)
            assert largest < 5
            assert root < 1.6
            return
        with jax.disable_jit():
            found = table.measure(row, case, folder, like=column == "checkpoint, like")
        wanted = row.right(right(column)) if row.draws is None else one_draw(name, table.same_draws(column))
        assert table.distance(found, wanted) < case.rtol


@pytest.mark.parametrize(("name", "column"), cells(*HERE, kind=is_refused))
def test_refusal(name, column):
    refusal = kind_of(name, column)[1]
    with jax.disable_jit(), pytest.raises(refusal.error) as told:
        table.measure(ROWS[name], cases.case(column))
    assert all(word in str(told.value) for word in refusal.names), told.value


@pytest.fixture(scope="module")
def apart():
    """The device count is fixed when JAX starts."""
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.matrix.on_eight_devices"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "column"), cells(*APART, kind=is_value))
def test_value_of_a_compiled_update(apart, name, column):
    found = apart[f"{name}, {column}"]
    assert "failed" not in found, found["failed"]
    assert found["distance"] < 2e-4
    if column == "donation":
        assert found["donated"]


@pytest.mark.parametrize(("name", "column"), cells(*APART, kind=is_refused))
def test_refusal_of_a_compiled_update(apart, name, column):
    refusal, told = kind_of(name, column)[1], apart[f"{name}, {column}"]
    assert told.get("failed", "").startswith(f"{refusal.error.__name__}: ")
    assert all(word in told["failed"] for word in refusal.names), told["failed"]


@pytest.mark.parametrize("line", [*ROWS, *COLUMNS])
def test_few_cells_are_refused(line):
    of_line = [kind_of(n, c)[0] for n in ROWS for c in COLUMNS if line in (n, c)]
    counted = [kind for kind in of_line if kind != "no meaning"]
    assert counted.count("refused") <= 0.15 * len(counted)


def test_the_page_is_the_table():
    assert page.PATH.read_text() == page.text(), "run python -m tests.matrix.page"


def test_the_oracle_sees_another_model():
    """What is off by a mask, a weight or the order of positions is far from what is right."""
    weights = right("weights")
    for name, row in ROWS.items():
        assert table.distance(row.right(right("mask")), row.right(weights)) > 0.05, name
        assert np.isfinite(row.right(weights)).any(), name

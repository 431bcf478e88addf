"""The blocks of ``docs/inverse.md`` run, one after the other, and give what the page says."""

import pathlib
import re

import numpy as np
import pytest

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "inverse.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def names():
    found = {"print": lambda *texts: None}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "inverse.md", "exec"), found)
    return found


def test_blocks_run(names):
    assert names["found"].reason == names["again"].reason == "converged"
    assert names["scores"].shape == (32, 16)
    assert names["spread"].shape == (1, 4, 20, 20)
    assert np.isfinite(names["evidence"]).all()


def test_a_preconditioner_changes_the_way_and_not_the_answer(names):
    for name, x in names["found"].x.items():
        np.testing.assert_allclose(names["again"].x[name], x, atol=1e-3 * np.abs(x).max())

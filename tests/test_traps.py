"""The page of common mistakes: its numbers are computed again, and the tests that it names exist."""

import pathlib
import re

import pytest

from tests.traps import MEASURED

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/traps.md").read_text()
SECTIONS = dict(re.findall(r"## (.*)\n((?:.|\n)*?)(?=\n## |\Z)", PAGE))


@pytest.mark.parametrize("trap", MEASURED)
def test_the_number_of_the_page_is_measured(trap):
    assert re.findall(r"\*\*([\d.]+)\*\*", SECTIONS[trap]) == [f"{MEASURED[trap]():.2g}"]


def test_every_trap_is_on_the_page_and_names_a_test_that_exists():
    assert SECTIONS.keys() == MEASURED.keys()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for title, text in SECTIONS.items():
        named = re.findall(r"`(test_\w+)`", text)
        assert named or "matrix.md" in text, title
        assert all(f"def {name}(" in tests for name in named), title

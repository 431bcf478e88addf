"""The table as a page: ``python -m tests.matrix.page`` writes ``docs/matrix.md``."""

import pathlib

from tests.matrix.table import COLUMNS, ROWS, Refusal, kind_of

PATH = pathlib.Path(__file__).parents[2] / "docs" / "matrix.md"
MARKS = {"value": "✓", "refused": "R", "no meaning": "."}

HEAD = """# What is right, and what is refused

Every cell with ✓ is a number that `tests/matrix` compares with a float64 oracle, a loop over per-token Jacobians that
shares no code with the library. R is an error that names the cause and the way out. A dot has no meaning, and is
not counted; where it is asked for all the same it is an error too, if the table below says so.

The model has two layers, an embedding and a head; positions mix, rows do not. All columns are this one function, so
that all have one right answer: it works on positions first, in reverse, on windows, in a loop, and so on.
"""


def text() -> str:
    """Of the whole page."""
    lines = [HEAD, "## Columns\n"]
    lines += [f"{i}. **{name}**: {about}" for i, (name, about) in enumerate(COLUMNS.items(), 1)]
    numbers = [str(i) for i in range(1, len(COLUMNS) + 1)]
    lines += ["", "## Cells\n", "| | " + " | ".join(numbers) + " |", "|---|" + "---|" * len(COLUMNS)]
    for row in ROWS:
        marks = [MARKS[kind_of(row, column)[0]] for column in COLUMNS]
        lines.append(f"| {row} | " + " | ".join(marks) + " |")
    lines += ["", "## Refused\n", "| what | where | error | why, and the way out |", "|---|---|---|---|"]
    found: dict[tuple[str, Refusal], list[str]] = {}
    for row in ROWS:
        for column in COLUMNS:
            why = kind_of(row, column)[1]
            if isinstance(why, Refusal):
                found.setdefault((column, why), []).append(row)
    for (column, refusal), rows in found.items():
        lines.append(f"| {', '.join(rows)} | {column} | `{refusal.error.__name__}` | {refusal.why} |")
    return "\n".join(lines) + "\n"


def main():
    PATH.write_text(text())


if __name__ == "__main__":
    main()

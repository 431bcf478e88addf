"""Tables as CSV, in which no cell is taken for a formula and every text can be read back."""

import csv
import io
from collections.abc import Iterable, Sequence

from fisher_jax._support.printable import quoted

TOKEN = "token"  # the column of tokens, all of them JSON strings


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of cells. One that begins with a double quote is a JSON string, and every other is what it says.

    Tokens are written so, and whatever else a spreadsheet could take for a formula or a CSV reader for several lines.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(name, value) for name, value in zip(header, row, strict=True)] for row in rows)
    return stream.getvalue()


def _cell(name: str, value: object) -> object:
    if not isinstance(value, str):
        return value
    if name == TOKEN:
        return quoted(value)
    return value if not value or _is_plain(value) or _is_number(value) else quoted(value)


def _is_plain(text: str) -> bool:
    return text.isprintable() and text[0] not in "=+-@ '\""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and text.isprintable() and not text.startswith(" ")

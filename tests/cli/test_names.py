"""Names and tokens with markup, escape sequences, line breaks and formulas: shown as what they are, and never run."""

import csv
import io
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from running import main
from tiny import prose

from fisher_jax._support.errors import InputError
from fisher_jax._support.printable import printable, quoted, readable, shortened
from fisher_jax.cli.page import html, markdown
from fisher_jax.cli.page.blocks import Heading, Paragraph, Picture
from fisher_jax.cli.page.blocks import Table as PageTable
from fisher_jax.cli.page.csv_text import csv_text
from fisher_jax.cli.run.folder import check_writable
from fisher_jax.cli.run.progress import StreamProgress
from fisher_jax.cli.run.terminal import Terminal
from fisher_jax.models import load

NAMES = [
    "[/x]", "[final]", "[bold]x[/bold]", "[link=file:///etc]x", ":smile:", "\x1b[2J\x1b]0;title\x07", "a\nb", "a\rb",
    "\u202eabc", "\u2066x", "\x00", "\x9b31m", "\udcff", "\u2028", "x\ty", "a\x08b", "<script>alert(1)</script>",
    "|`*_#", "&lt;b&gt;", "\\|", "=1+1", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "'=1", '"', '"x"', 'a","b', " ",
    "", "␣", "NA", "nan", "null", "1e5", "-5", "中文", "👍", "שלום", "a,b;c", "\ud800", "\U000e0041",
]  # fmt: skip


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a terminal would get."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda: capsys.readouterr().out


def harmless(text, *, colours=False):
    """Printable lines, but for the colours and cursor moves that a program of our own writes."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text) if colours else text
    return all(line.isprintable() for line in plain.replace("\r", "").split("\n"))


@pytest.mark.parametrize("name", NAMES)
def test_a_string_is_printed_as_one_line_of_itself(name, printed):
    Terminal().print(f"<{name}>")
    found = printed()
    assert found == f"<{printable(name)}>\n"
    assert harmless(found)


@pytest.mark.parametrize("name", NAMES)
def test_headings_tables_and_styled_text_are_harmless(name, printed):
    terminal = Terminal()
    terminal.say("model", name)
    assert printed() == f"model: {printable(name)}\n"
    table = Table(title=Text(name))
    table.add_column(name)
    table.add_row(name)
    terminal.print(table)
    terminal.print(Text.assemble(name, (name, "bold")))
    assert harmless(printed())


def test_a_progress_bar_is_harmless(printed, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal = Terminal()
    with StreamProgress(terminal, 10) as display:
        display._bar.update(display._task, rate="[/x]", loss="\x1b]0;title\x07")
        display._bar.refresh()
    assert terminal.is_terminal
    found = printed()
    assert "[/x]" in found
    assert harmless(found, colours=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_lacks_a_character_gets_an_escape(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    Terminal().print("␣中")
    sys.stdout.flush()
    assert raw.getvalue() == b"\\u2423\\u4e2d\n"


@pytest.mark.parametrize("name", NAMES)
def test_an_error_is_one_printable_line(name, tmp_path, capsys):
    place = name.replace("\x00", "").replace("\ud800", "") or "x"
    assert main(["trim", "--keep", "5", "--state", f"{tmp_path}/{place}", "--out", f"{tmp_path}/out"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fisher-jax: ")
    assert captured.err.count("\n") == 1
    assert harmless(captured.out + captured.err)


@pytest.mark.parametrize("text", NAMES)
def test_a_quoted_text_is_printable_and_comes_back(text):
    assert json.loads(quoted(text)) == text
    assert quoted(text).isprintable()


@pytest.mark.parametrize("text", NAMES)
def test_tokens_come_back_from_a_table_and_are_never_formulas(text):
    written = csv_text(["token", "name", "z"], [[text, text, "-1.5e-03"], [text, text, -2]])
    assert written.count("\n") == 3
    assert harmless(written)
    for row in csv.DictReader(io.StringIO(written, newline="")):
        assert json.loads(row["token"]) == text
        assert (json.loads(row["name"]) if row["name"].startswith('"') else row["name"]) == text
        assert row["token"][0] == '"'
        assert is_number(row["name"]) or row["name"][:1] not in tuple("=+-@\t\r")
        assert float(row["z"]) < 0


def is_number(text):
    try:
        return float(text) is not None
    except ValueError:
        return False


def pages(name):
    table = PageTable(name, ["token", name], [[name, "1"], ["x", name]])
    return [Heading(name), Paragraph(f"about {name}"), table, Picture("p", name, b"", b"")]


class Reader(HTMLParser):
    """Tags and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_in_html_shows_a_name_and_keeps_its_structure(name):
    page = html.render(name, name, pages(name))
    page.encode()
    read, plain = Reader(), Reader()
    read.feed(page)
    plain.feed(html.render("x", "x", pages("x")))
    assert read.tags == plain.tags or name == ""
    assert harmless(page)
    assert name == "" or printable(name) in "".join(read.texts)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_in_markdown_shows_a_name_and_keeps_its_structure(name):
    page = markdown.render(name, name, pages(name))
    page.encode()
    lines, plain = page.split("\n"), markdown.render("x", "x", pages("x")).split("\n")
    assert len(lines) == len(plain) or name == ""
    assert harmless(page)
    for line, other in zip(lines, plain, strict=False) if name else ():
        assert line.startswith("#") == other.startswith("#")
        cells = re.sub(r"\\.", "", line).split("|")
        assert len(cells) == len(other.split("|"))
        assert not re.search(r"[`<>&*_\[\]]", re.sub(r"\\.|!\[|\]\(figures/p.png\)", "", line))


def test_long_names_keep_their_ends():
    assert shortened("a" * 500 + "z").endswith("z")
    assert len(shortened("a" * 500)) == 121
    assert readable(" Paris\n") == "␣Paris\\n"


def test_a_folder_in_which_no_state_would_be_kept_is_refused(tmp_path):
    with pytest.raises(InputError, match="--out"):
        check_writable(tmp_path / "[final]")


def test_a_report_of_odd_names_from_end_to_end(tmp_path, tiny_model, capsys):
    model = tmp_path / "[/x]\x1b[31m\n=1"
    shutil.copytree(tiny_model, model)
    texts = [os.fsdecode(os.fsencode(tmp_path) + b"/\xff[/x]\x1b]0;t\x07\n=%d.txt" % number) for number in range(8)]
    for number, path in enumerate(texts):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(f"{prose(number)} [/x] =1+1 \x1b[31m | <script> `x` @a -1 +2 \t\r\n")
    out = tmp_path / "=\x1b2J\nout"
    sizes = ["--row-length", "32", "--batch-size", "4"]
    assert main(["report", "--model", str(model), "--text", *texts, "--out", str(out), *sizes]) == 0
    captured = capsys.readouterr()
    assert harmless(captured.out + captured.err)
    assert "[/x]\\x1b[31m\\n=1" in captured.out
    assert "\n=1" not in captured.out
    for name in ("report.md", "report.html", "importance.csv"):
        assert harmless((out / name).read_text("utf-8"))
    with (out / "importance.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    text_of = load(model).tokenizer.token_text
    assert all(json.loads(row["token"]) == text_of(int(row["token_id"])) for row in rows)

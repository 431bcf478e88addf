"""The report as one HTML file: pictures inside, light and dark, narrow and wide, without scripts."""

import base64
from collections.abc import Mapping
from html import escape
from html.parser import HTMLParser
from pathlib import Path

from fisher_jax._support.printable import printable
from fisher_jax.cli.page.blocks import Block, Contents, Heading, Paragraph, Picture, Table

# Characters in which the facts of a page are: they stand before its style.
HEAD_LENGTH = 2**16

_STYLE = "\n" + Path(__file__).with_name("page.css").read_text("utf-8")


def render(title: str, lead: str, blocks: list[Block], facts: Mapping[str, str] = {}) -> str:
    """A complete page; ``facts`` are for `read_facts`."""
    said = "".join(f'<meta name="{escape(name)}" content="{escape(value)}">\n' for name, value in facts.items())
    body = "\n".join(_block(block) for block in blocks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{said}<title>{_escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_escape(title)}</h1>
<p class="lead">{_escape(lead)}</p>
{body}
</main>
</body>
</html>
"""


def _escape(text: str) -> str:
    """One line of plain text."""
    return escape(printable(text))


def _block(block: Block) -> str:
    match block:
        case Heading():
            return _heading(block)
        case Contents(parts):
            lines = "".join(f'<li><a href="#{escape(to)}">{_escape(text)}</a></li>' for to, text in parts.items())
            return f"<nav><ul>{lines}</ul></nav>"
        case Paragraph(text):
            return f"<p>{_escape(text)}</p>"
        case Picture():
            return _picture(block)
        case Table():
            return _table(block)


def _heading(heading: Heading) -> str:
    tag = f"h{max(heading.level, 2)}"
    kind = ' class="part"' if heading.level == 1 else ""
    anchor = f' id="{escape(heading.anchor)}"' if heading.anchor else ""
    return f"<{tag}{kind}{anchor}>{_escape(heading.text)}</{tag}>"


def _picture(picture: Picture) -> str:
    light, dark = ("data:image/png;base64," + base64.b64encode(raw).decode() for raw in (picture.light, picture.dark))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{_escape(picture.alt)}" src="{light}"></picture></figure>'
    )


def _table(table: Table) -> str:
    def cells(tag: str, row: list[str]) -> str:
        return "".join(
            f"<{tag}{' class=left' if i < table.left else ''}>{_escape(text)}</{tag}>" for i, text in enumerate(row)
        )

    caption = f"<caption>{_escape(table.caption)}</caption>" if table.caption else ""
    head = f"<thead><tr>{cells('th', table.header)}</tr></thead>" if table.header else ""
    rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table>{caption}{head}\n<tbody>\n{rows}\n</tbody></table></div>'


def read_facts(page: str) -> dict[str, str]:
    """What a page says of itself, from its first `HEAD_LENGTH` characters."""
    reader = _Facts()
    reader.feed(page.partition("<style>")[0])
    return reader.found


class _Facts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "meta" and values.get("name"):
            self.found[str(values["name"])] = values.get("content") or ""

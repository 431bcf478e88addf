"""The report as Markdown, with its pictures in `figures/`."""

from fisher_jax._support.printable import printable
from fisher_jax.cli.page.blocks import Block, Contents, Heading, Paragraph, Picture, Table

_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#$~&"})


def render(title: str, lead: str, blocks: list[Block]) -> str:
    """The whole document."""
    parts = [f"# {_escape(title)}", _escape(lead), *(_block(block) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    return printable(text).translate(_SPECIAL)


def _block(block: Block) -> str:
    match block:
        case Heading(text, level, anchor):
            named = f'<a id="{anchor}"></a>\n\n' if anchor else ""
            return f"{named}{'#' * max(level, 2)} {_escape(text)}"
        case Contents(parts):
            return "\n".join(f"- [{_escape(text)}](#{anchor})" for anchor, text in parts.items())
        case Paragraph(text):
            return _escape(text)
        case Picture():
            return f"![{_escape(block.alt)}](figures/{block.name}.png)"
        case Table():
            header = block.header or [""] * len(block.rows[0])
            rule = ["---" if i < block.left else "---:" for i in range(len(header))]
            lines = [" | ".join(_escape(cell) for cell in row) for row in [header, *block.rows]]
            table = "\n".join(f"| {line} |" for line in [lines[0], " | ".join(rule), *lines[1:]])
            return f"{_escape(block.caption)}\n\n{table}" if block.caption else table

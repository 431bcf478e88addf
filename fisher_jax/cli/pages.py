"""What a command leaves in its folder: a page as HTML and Markdown, its pictures, its tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fisher_jax.cli import html, markdown
from fisher_jax.cli.blocks import Block, Picture
from fisher_jax.cli.folder import write_atomically

__all__ = ["write_pages"]


def write_pages(
    out: Path,
    name: str,
    heading: tuple[str, str],
    parts: Sequence[Block],
    tables: Mapping[str, str | None],
    figure_prefixes: tuple[str, ...],
) -> None:
    """`name.html` and `name.md` with title and lead, `figures/*.png`, and the tables by file name.

    Everything is worded before the first file is written. What an earlier run left goes: pictures with one of the
    prefixes that are not drawn now, and tables that are ``None``.
    """
    blocks = list(parts)
    pictures = {f"{block.name}.png": block.light for block in blocks if isinstance(block, Picture)}
    pages = {
        **tables,
        f"{name}.md": markdown.render(*heading, blocks),
        f"{name}.html": html.render(*heading, blocks),
    }
    for picture, raw in pictures.items():
        write_atomically(out / "figures" / picture, raw)
    for page, text in pages.items():
        if text is None:
            (out / page).unlink(missing_ok=True)
        else:
            write_atomically(out / page, text)
    for path in (out / "figures").glob("*.png"):
        if path.name.startswith(figure_prefixes) and path.name not in pictures:
            path.unlink()

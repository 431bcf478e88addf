"""What a command leaves in its folder: a page as HTML and Markdown, its pictures, its tables."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fisher_jax.cli.page import html, markdown
from fisher_jax.cli.page.blocks import Block, Picture
from fisher_jax.cli.run.folder import read_plain, write_atomically


def write_pages(
    out: Path,
    name: str,
    heading: tuple[str, str],
    parts: Sequence[Block],
    tables: Mapping[str, str | None],
    figure_prefixes: tuple[str, ...],
    made_from: str = "",
) -> None:
    """`name.html` and `name.md` with title and lead, `figures/*.png`, and the tables by file name.

    Everything is worded before the first file is written, and the HTML comes last: where it says what it was
    ``made_from``, and which files go with it, all of them are there. What an earlier run left goes: pictures with one
    of the prefixes that are not drawn now, and tables that are ``None``.
    """
    blocks = list(parts)
    pictures = {f"figures/{block.name}.png": block.light for block in blocks if isinstance(block, Picture)}
    written = [f"{name}.md", *(table for table, text in tables.items() if text is not None), *pictures]
    pages = {
        **tables,
        f"{name}.md": markdown.render(*heading, blocks),
        f"{name}.html": html.render(*heading, blocks, {"made-from": made_from, "files": json.dumps(written)}),
    }
    for picture, raw in pictures.items():
        write_atomically(out / picture, raw)
    for page, text in pages.items():
        if text is None:
            (out / page).unlink(missing_ok=True)
        else:
            write_atomically(out / page, text)
    _remove_figures(out, figure_prefixes, keep=pictures)


def page_is_current(out: Path, name: str, made_from: str) -> bool:
    """Whether `name.html` was made from the same, and all files that go with it are there."""
    try:
        said = html.read_facts(read_plain(out / f"{name}.html")[: html.HEAD_LENGTH])
        files = json.loads(said.get("files", "[]"))
    except (OSError, ValueError):
        return False
    return said.get("made-from") == made_from and all((out / file).is_file() for file in files)


def remove_pages(out: Path, name: str, tables: Sequence[str], figure_prefixes: tuple[str, ...]) -> None:
    """All that `write_pages` left."""
    for page in (f"{name}.html", f"{name}.md", *tables):
        (out / page).unlink(missing_ok=True)
    _remove_figures(out, figure_prefixes, keep=())


def _remove_figures(out: Path, prefixes: tuple[str, ...], keep: Any) -> None:
    folder = out / "figures"
    for path in folder.rglob("*.png"):
        place = path.relative_to(folder).as_posix()
        if place.startswith(prefixes) and f"figures/{place}" not in keep:
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):  # the deepest first
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()

"""The terminal: what is printed is never read as markup, and no control character of a name reaches it."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import TextColumn
from rich.segment import Segment
from rich.text import Text

from fisher_jax._support.printable import printable

__all__ = ["Terminal", "Words", "bold", "headed"]


class Terminal(Console):
    """A console for words that others chose: a string is one line, and everything unprintable in it an escape."""

    def __init__(self, *, stderr: bool = False):
        # A character that the encoding lacks becomes an escape as well.
        if not stderr and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        file = None if stderr else sys.stdout
        super().__init__(file=file, stderr=stderr, soft_wrap=True, markup=False, highlight=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(x) if isinstance(x, str) else x for x in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Cells of tables, fields of a progress bar and the like, when they are drawn."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                lines = segment.text.split("\n")
                yield Segment("\n".join(map(printable, lines)), segment.style)


def bold(sentence: str) -> Text:
    """A line in bold."""
    return Text(printable(sentence), style="bold")


def headed(heading: str, sentence: str) -> Text:
    """A line that begins with a word in bold."""
    return Text.assemble((heading, "bold"), f": {printable(sentence)}")


class Words(TextColumn):
    """A column of a progress bar, which is no markup either."""

    def __init__(self, text_format: str):
        super().__init__(text_format, markup=False)

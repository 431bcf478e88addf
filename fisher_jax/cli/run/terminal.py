"""The terminal: what is printed is never read as markup, and no control character of a name reaches it."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from fisher_jax._support.printable import few, printable
from fisher_jax.cli.run.progress import duration
from fisher_jax.cli.run.stopping import stop_if_requested
from fisher_jax.models import LanguageModel


class Terminal(Console):
    """A console for words that others chose: a string is one line, and everything unprintable in it an escape.

    It says what is done now, and knows how long each stage took.
    """

    def __init__(self, *, stderr: bool = False):
        # A character that the encoding lacks becomes an escape as well.
        if not stderr and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        file = None if stderr else sys.stdout
        super().__init__(file=file, stderr=stderr, soft_wrap=True, markup=False, highlight=False, emoji=False)
        self._began = time.monotonic()
        self.seconds: dict[str, float] = {}  # of every stage

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

    def say(self, heading: str, sentence: str) -> None:
        """A line that begins with a word in bold."""
        self.print(Text.assemble((heading, "bold"), f": {printable(sentence)}"))

    @contextmanager
    def stage(self, name: str, sentence: str) -> Iterator[None]:
        stop_if_requested()
        self.say(name, sentence)
        started = time.monotonic()
        yield
        stop_if_requested()
        self.seconds[name] = time.monotonic() - started

    @property
    def took(self) -> str:
        """How long all of it took so far, as the beginning of a line."""
        return f"took {duration(time.monotonic() - self._began)}"

    def say_weights(self, model: LanguageModel) -> None:
        """In which dtype the weights are, and in which their files have them."""
        self.print(f"  weights: {stored_and_kept(model)}")

    def say_unread(self, model: LanguageModel) -> None:
        """The first few files beside a model's weights that are not read, if there are any."""
        if model.unread:
            names = few(list(map(repr, model.unread)), 5)
            self.print(f"  not read, since they are not this model's weights: {names}")

    def summary(
        self, title: str, lines: Sequence[str], page: tuple[str, Path], shown: Table | None = None
    ) -> None:  # fmt: skip
        """The last thing on the terminal: a headline, a table, sentences, and what lies where."""
        self.print()
        if title:
            self.print(Text(printable(title), style="bold"))
        if shown is not None:
            self.print(shown)
            self.print()
        for line in lines:
            self.print(line)
        self.print(Text.assemble(f"{page[0]}: ", (printable(str(page[1].resolve())), "bold")))


def stored_and_kept(model: LanguageModel) -> str:
    return f"{model.dtype} (in its files {model.stored})" if model.stored else model.dtype


def table(header: Sequence[str], rows: Iterable[Sequence[str]], padding: int = 2) -> Table:
    """Columns of numbers behind one of names."""
    made = Table(box=None, padding=(0, padding), header_style="bold")
    for i, name in enumerate(header):
        made.add_column(name, justify="right" if i else "left")
    for row in rows:
        made.add_row(*map(printable, row))
    return made

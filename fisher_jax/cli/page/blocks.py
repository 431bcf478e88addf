"""The parts a report is made of; `html` and `markdown` each render them."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Heading(NamedTuple):
    """A section title; level 1 begins a part of the page, which `Contents` can lead to by its anchor."""

    text: str
    level: int = 2
    anchor: str = ""


class Paragraph(NamedTuple):
    """Plain words."""

    text: str


class Table(NamedTuple):
    """A small table; columns after the first `left` ones are numbers, set to the right."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    left: int = 1


class Picture(NamedTuple):
    """One picture, drawn on a light and on a dark background."""

    name: str  # of the file, without its ending
    alt: str
    light: bytes
    dark: bytes


class Drawing(NamedTuple):
    """A picture that is not drawn yet: a function of the colours gives its figure."""

    name: str
    alt: str
    figure: Callable[[Any], Any]


class Contents(NamedTuple):
    """Where the parts of a long page are: their titles by anchor."""

    parts: dict[str, str]


Block = Heading | Paragraph | Table | Picture | Contents
Sketch = Block | Drawing

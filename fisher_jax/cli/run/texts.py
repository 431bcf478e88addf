"""The option --text: names of corpora, files, or standard input."""

import os
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.values import as_task_name, place
from fisher_jax.text.corpora import CORPORA
from fisher_jax.text.files import check_text_file


def default_task(sources: Sequence[str]) -> str:
    """A short name for what these sources measure: corpus names, or the stems of the files."""
    stems = [source if source in CORPORA else "stdin" if source == "-" else Path(source).stem for source in sources]
    name = "+".join(stems[:3]) + (f"+{len(stems) - 3}-more" if len(stems) > 3 else "")
    return as_task_name(name)


def text_source(text: str) -> str:
    """A value of --text: the name of a corpus, `-`, or a file that looks like a text."""
    if text not in CORPORA and text != "-":
        try:
            check_text_file(place(text))
        except InputError as error:
            missing = f" The corpora that can be named are {', '.join(CORPORA)}." if not os.path.exists(text) else ""
            raise ArgumentTypeError(f"{error}{missing}".removesuffix(".").replace(". The", "; the")) from None
    return text

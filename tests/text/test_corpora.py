"""Documents from files and shipped corpora, and prose from wiki markup."""

import pytest

from fisher_jax.cli.run.texts import default_task
from fisher_jax.text.corpora import CORPORA, documents
from fisher_jax.text.wikitext import strip_markup


def test_a_file_is_one_document_or_a_document_for_each_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \r\nthree\n\n\n--\n\nfour\n")
    assert [d.text for d in documents([str(path)])] == ["one\ntwo\n\n \nthree\n\n\n--\n\nfour\n"]
    split = list(documents([str(path)], split="blank-line"))
    assert [d.text for d in split] == ["one\ntwo", "three", "four"]
    assert len({d.id for d in split}) == 3


@pytest.mark.parametrize("name", list(CORPORA))
def test_shipped_corpora_have_many_documents_with_names_of_their_own(name):
    pytest.importorskip("gguf")  # part of the same installation; the texts come with the group `shipped`
    found = []
    for document in documents([name]):
        found.append(document)
        if len(found) == 60:
            break
    assert len({d.id for d in found}) == 60
    assert min(len(d.text) for d in found) > 20


def test_wikipedia_is_prose():
    articles = list(documents(["wikipedia"]))
    text = "".join(article.text for article in articles)
    assert 90 <= len(articles) <= 110
    assert 2.0e6 < len(text) < 3.5e6
    for leftover in ("[[", "]]", "{{", "}}", "<ref", "''", "&nbsp;", "http://", "\n==", "{|"):
        assert leftover not in text


def test_the_task_is_named_after_the_text():
    assert default_task(["wikipedia"]) == "wikipedia"
    assert default_task(["-"]) == "stdin"
    assert default_task(["a/b.txt", "c.md"]) == "b+c"
    assert default_task(["1", "2", "3", "4", "5"]) == "1+2+3+2-more"


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Bold''' and ''slanted''.", "Bold and slanted."),
        ("A [[river|stream]] in [[Spain]].", "A stream in Spain."),
        ("One{{efn|A {{nested|template}} here.}} two.", "One two."),
        ("It is {{convert|5|km|mi}} long.", "It is 5 km long."),
        ("The {{lang|fr|mot}} juste.", "The mot juste."),
        ("Fact.<ref name=x>Book, p. 1</ref><ref name=x /> Next.", "Fact. Next."),
        ("Fact.<ref>See <i>Book</i> {{cite|a=b}}</ref> Next.", "Fact. Next."),
        ("[[File:A.jpg|thumb|A [[mill]] by [[night]]]]\nText.", "Text."),
        ("Text [http://example.org the site] more.", "Text the site more."),
        ("Text.\n[[Category:Mills]]\n[[de:Mühle]]", "Text."),
        ('{| class="wikitable"\n|-\n| cell || {| inner |}\n|}\nAfter.', "After."),
        ("X (; born 1900) &ndash; y&nbsp;z.", "X (born 1900) – y z."),  # noqa: RUF001
        ("Name ({{lang-ru|x}}) was.", "Name was."),
        ("* first\n** second\n# third", "first\n\nsecond\n\nthird"),
        ("<!-- gone -->Here <small>small</small> x<sup>2</sup>.", "Here small x2."),
        ("A.\n== Empty ==\n== Full ==\nB.", "A.\n\nFull\n\nB."),
        ("A.\n== References ==\nlist\n=== Sub ===\nmore\n== Life ==\nB.", "A.\n\nLife\n\nB."),
        ("&lt;ref&gt;escaped&lt;/ref&gt;Kept.", "Kept."),
        ("Cost: $5 and 3 < 4.", "Cost: $5 and 3 < 4."),
        ("Unclosed {{template and [[link stay", "Unclosed template and link stay"),
    ],
)
def test_markup_becomes_prose(markup, prose):
    assert strip_markup(markup) == prose

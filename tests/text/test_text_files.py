"""Texts: only plain files, read in pieces and no further than needed."""

import io
import itertools
import os
import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_jax._support.errors import InputError
from fisher_jax.cli.commands import settings_of
from fisher_jax.cli.run.texts import default_task
from fisher_jax.cli.run.values import is_task_name
from fisher_jax.text.corpora import documents
from fisher_jax.text.files import first_characters, paragraphs, pieces


def cut(text, sizes):
    """The text in pieces of these sizes."""
    parts = []
    for size in itertools.cycle(sizes):
        if not text:
            return parts
        parts.append(text[:size])
        text = text[size:]
    return parts


@given(st.text("ab \n\t", max_size=60), st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_paragraphs_are_those_of_the_whole_text_however_it_is_cut(text, sizes):
    text = "a" + text  # white space before the first paragraph is its own matter
    expected = [part.strip("\n") for part in re.split(r"\n[ \t]*\n\s*", text)]
    found = list(paragraphs(iter(cut(text, sizes)), None))
    assert [part.rstrip() for part in found] == [part.rstrip() for part in expected if part.strip()]


@given(st.text("ab\n", max_size=60), st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 9))
def test_paragraphs_are_cut_at_a_length(text, sizes, longest):
    whole = list(paragraphs(iter(cut(text, sizes)), None))
    assert list(paragraphs(iter(cut(text, sizes)), longest)) == [part[:longest] for part in whole]


@given(st.text(max_size=40).filter(lambda text: "\0" not in text and not text.startswith("\ufeff")))
def test_a_file_is_the_text_that_was_written(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "written.txt"
    path.write_bytes(text.encode())
    assert "".join(pieces(str(path), "written")) == text.replace("\r\n", "\n")


def test_a_text_is_read_no_further_than_needed():
    read = []
    endless = (read.append(1) or "x" * 100 for _ in itertools.count())
    assert first_characters(endless, 250) == "x" * 250
    assert len(read) == 3


def test_standard_input_without_an_end_is_read_no_further_than_needed(monkeypatch):
    class Endless(io.RawIOBase):
        mode = "rb"  # every file has one, and the check of annotations reads it

        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = b"word " * (len(buffer) // 5) + b" " * (len(buffer) % 5)
            return len(buffer)

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    (document,) = documents(["-"], longest=1000)
    assert len(document.text) == 1000


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="closed"):
        list(documents(["-"]))


def test_a_file_of_many_gigabytes_is_refused_where_all_of_it_is_wanted(tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("words and words")
    assert "".join(pieces(str(path), path.name, limit=15)) == "words and words"
    with pytest.raises(InputError, match="GiB"):
        list(pieces(str(path), path.name, limit=14))


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "sparse", "loop", "latin", "late zero"])
def test_what_is_no_text_is_refused_before_a_model_is_loaded(kind, tmp_path):
    path = tmp_path / "x"
    with socket.socket(socket.AF_UNIX) as listening:
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "socket":
                listening.bind(str(path))
            case "device":
                path.symlink_to("/dev/zero")
            case "folder":
                path.mkdir()
            case "sparse":
                path.touch()
                os.truncate(path, 10**12)
            case "loop":
                path.symlink_to(path)
            case "latin":
                path.write_bytes(b"caf\xe9 " * 10**5)
            case "late zero":
                path.write_bytes(b"word " * 1000 + b"\0")
        with pytest.raises(InputError, match="--text"):
            settings_of(["report", "--text", str(path)])


@pytest.mark.parametrize(
    "source",
    ["=1+1.txt", "x/@me.txt", "-.txt", "a:b.txt", "\x1b[2J.txt", "a\nb.txt", "é" * 100 + ".txt", "\udcff.txt"],
)
def test_a_task_named_after_a_file_can_be_named(source):
    assert is_task_name(default_task([source]))
    assert is_task_name(default_task([source] * 5))

"""Malformed options: one sentence of printable characters, exit code 2, before anything is computed."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations_of_flags import BASES, KINDS, flag_cases
from running import main

from fisher_jax._support.errors import InputError
from fisher_jax.cli.commands import parser, settings_of

CASES = flag_cases(seed=13, count=240)


def refusal(arguments):
    """The sentence with which settings are refused; None where they are accepted."""
    try:
        settings_of(arguments)
    except InputError as error:
        return str(error)
    return None


def readable_sentence(text):
    return text.startswith("fisher-jax") and text.count("\n") == 1 and text[:-1].isprintable() and len(text) < 1000


def test_every_option_has_mutations():
    commands = next(a for a in parser()._actions if a.choices and "report" in a.choices).choices
    for command in BASES:
        known = {name for action in commands[command]._actions for name in action.option_strings} - {"-h", "--help"}
        assert known == set(KINDS[command])


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_mutated_option_is_accepted_or_refused_in_a_sentence(number, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, refused = CASES[number]
    if refusal(arguments) is None:
        assert not refused
        _, settings = settings_of(arguments)
        assert all(math.isfinite(x) for x in vars(settings).values() if isinstance(x, int | float))
    else:
        assert main(arguments) == 2
        assert readable_sentence(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e3", 1000), ("1.5e3", 1500), ("80_000", 80_000), ("80,000", 80_000), ("1,000,000", 1_000_000), ("007", 7)],
)
def test_ways_to_write_a_whole_number(text, value):
    assert settings_of(["report", "--max-tokens", text])[1].max_tokens == value


def test_seeds_are_those_that_give_different_keys():
    assert settings_of(["report", "--seed", str(2**32 - 1)])[1].seed == 2**32 - 1
    with pytest.raises(InputError):
        settings_of(["report", "--seed", str(2**32)])


@pytest.mark.parametrize(
    "arguments",
    [
        ["trim", "--keep", "5", "--by", "magnitude", "--model", "m", "--out", "m"],
        ["trim", "--keep", "5", "--by", "magnitude", "--model", "m", "--out", "m/inside"],
        ["trim", "--keep", "5", "--by", "magnitude", "--model", "m", "--out", "m/../m", "--overwrite"],
        ["merge", "--models", "m", "n", "--by", "uniform", "--out", "n", "--overwrite"],
        ["merge", "--models", "m", "n", "--by", "uniform", "--base", "b", "--out", "b", "--overwrite"],
    ],
)
def test_a_model_is_never_written_into_a_folder_that_is_read(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "n", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(InputError, match="--out"):
        settings_of(arguments)


def test_a_pattern_that_explodes_ends_soon(tmp_path, tiny_model, texts, capsys):
    slow = "((([a-z/_]+)+)+)+#"
    assert (
        main(["spectrum", "--model", tiny_model, "--text", *texts, "--parameters", slow, "--out", str(tmp_path)]) == 2
    )
    assert readable_sentence(capsys.readouterr().err)

"""Seeded mutations of the command line: values that people and accidents give to options."""

import random
from typing import NamedTuple

__all__ = ["BASES", "KINDS", "Case", "flag_cases", "grown"]


class Case(NamedTuple):
    """Arguments of one run, and whether nobody can have meant them, so that they must be refused."""

    arguments: list[str]
    refused: bool


# A command that is right, to which one option is added.
BASES = {
    "report": ["report"],
    "join": ["join", "out", "one", "two"],
    "compare": ["compare", "nowhere"],
    "spectrum": ["spectrum"],
    "train": ["train"],
    "merge": ["merge", "--models", "one", "two", "--by", "uniform"],
    "trim": ["trim", "--keep", "5", "--by", "magnitude"],
}
_COUNT = "count"
# What a value of each option is; a test sees to it that none is missing.
KINDS: dict[str, dict[str, str]] = {
    "report": {
        "--model": "model", "--text": "text", "--split-documents": "choice", "--max-tokens": _COUNT,
        "--held-out-tokens": _COUNT, "--part": "part", "--task": "task", "--parameters": "choice", "--kind": "choice",
        "--groups": "choice", "--unit": "choice", "--level": "fraction", "--row-length": _COUNT,
        "--batch-size": _COUNT, "--dtype": "choice", "--seed": "seed", "--out": "out",
        "--resume": "switch", "--overwrite": "switch", "--checkpoint-every": "real",
    },
    "join": {
        "--task": "task", "--overwrite": "switch", "--model": "model", "--text": "text", "--level": "fraction",
        "--kind": "choice", "--seed": "seed",
    },
    "compare": {"--model": "model", "--kind": "choice", "--q": "fraction", "--out": "out"},
    "spectrum": {
        "--operator": "choice", "--parameters": "pattern", "--k": _COUNT, "--density": "switch", "--blocks": "switch",
        "--model": "model", "--text": "text", "--split-documents": "choice", "--max-tokens": _COUNT,
        "--row-length": _COUNT, "--tol": "fraction",
        "--max-products": _COUNT, "--check-every": _COUNT, "--basis": _COUNT,
        "--batch-size": _COUNT, "--remat": "switch", "--probes": _COUNT,
        "--density-steps": _COUNT, "--block-tokens": _COUNT, "--dtype": "choice", "--seed": "seed", "--out": "out",
        "--resume": "switch", "--overwrite": "switch", "--checkpoint-every": "real",
    },
    "train": {
        "--optimizer": "choice", "--compare": "choice", "--against": "folder", "--steps": _COUNT,
        "--learning-rate": "real", "--weight-decay": "real", "--damping": "real", "--update-every": _COUNT,
        "--batch-size": _COUNT, "--row-length": _COUNT, "--seed": "seed", "--init": "model", "--width": _COUNT,
        "--layers": _COUNT, "--heads": _COUNT, "--tokenizer": "model", "--text": "text",
        "--split-documents": "choice", "--held-out-tokens": _COUNT, "--eval-every": _COUNT, "--out": "out",
        "--resume": "switch", "--overwrite": "switch", "--checkpoint-every": "real",
    },
    "merge": {
        "--models": "model", "--states": "folder", "--base": "model", "--by": "choice", "--weights": "real",
        "--floor": "real", "--scale": "real", "--out": "out", "--overwrite": "switch", "--dtype": "choice",
        "--text": "text", "--split-documents": "choice", "--documents": _COUNT, "--characters": _COUNT,
    },
    "trim": {
        "--keep": _COUNT, "--state": "folder", "--task": "task", "--by": "choice", "--model": "model", "--out": "out",
        "--overwrite": "switch", "--dtype": "choice", "--text": "text", "--split-documents": "choice",
        "--documents": _COUNT, "--characters": _COUNT,
    },
}  # fmt: skip

_NO_NUMBER = (
    "", " ", "nan", "NaN", "inf", "-inf", "Infinity", "1e400", "1e99999999", "1e", "e5", "0x10", "0b1", "1_", "_1",
    "1__0", "1,5", "1,00,000", "1.2.3", "ten", "None", "true", "½", "²", "٣", "\uff11\uff12",
    "1\u00a0000", "1;2", "1\x00",
    "1\x1b[31m", "[bold]1[/bold]", "9" * 5000, "1" + "0" * 30, "-1" + "0" * 30, "0" * 4400 + "x", "--", "1 2",
    "\ud800", "1\n", "+-1", "1j",
)  # fmt: skip
_LONG = "x" * 300
_NAMES = (
    "", "\x00", "a\x00b", _LONG, _LONG + "/" + _LONG, "a\nb", "\x1b[2J", "[/x]", "[final]", "[bold]x", "\u202eabc",
    "\udcff", "a" * 100_000, "~nobody-of-this-name/x", "/dev/null", "/proc/self/mem", ".", "..", "a:b", "*",
    ":smile:",
)  # fmt: skip
_OUT_REFUSED = ("", "\x00", "a\x00b", _LONG, "x/" + _LONG, "/dev/null", "a" * 100_000)
_VALUES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # Values that must be refused before anything is read, and values about which only the manner counts.
    "count": (("0.5", "-1", "-7", "1.0e0.5", "1e18", "1e30", str(2**63), str(2**64), *_NO_NUMBER),
              ("1e2", "1_000", "1,000", "007", "+3", "0", "3.0", str(2**31))),
    "seed": (("-1", str(2**32), str(2**63), str(2**64), "0.5", "1e18", *_NO_NUMBER), ("0", "7", str(2**32 - 1))),
    "part": (("0/4", "5/4", "x/4", "3/0", "3", "3/", "/4", "-1/4", "1/-4", "1/2/3", "1.5/4", "1/4 ", "1/10000000",
              "1/1e3", "0/0", *_NO_NUMBER), ("1/1", "16/16", "01/04", "3/1000000")),
    "fraction": (("0", "1", "-0.5", "95", "1e-400", "0.99999999999999999", *_NO_NUMBER), ("0.5", "1e-3", ".5")),
    "real": (("1e31", "1e308", "-1e308", "1e18", *_NO_NUMBER), ("1e-3", "0.5", "1", "-0.5", "0", "1e-46")),
    "task": (("", "\x00", _LONG, ".", "..", "a/b", "a\nb", "\x1b[2J", "\u202eabc", "\udcff", "a" * 100_000, "=1+1",
              "@x", " ", "\t"), ("a:b", "é" * 10, "x y", "[/x]", "[final]")),
    "out": (_OUT_REFUSED, ("a\nb", "\x1b[2J", "[/x]", ".", "..")),
    "text": (("", "\x00", _LONG, "a" * 100_000, "/dev/zero", "/dev/null", "/", ".", "/proc/self/mem", "\udcff",
              "[/x]", "*", "a:b", "~nobody-of-this-name/x"), ("wikipedia", "news")),
    "model": ((), _NAMES),
    "folder": ((), _NAMES),
    "choice": (("", " ", "\x1b[2J", "[/x]", _LONG, "a\nb", "\ud800", "HEAD"), ()),
    "pattern": (("(", "[", "*", "a{99999999999}", "(" * 100_000, "(?P<x", "\\", "x" * 100_000), ("\x00", "[/x]", "")),
    "switch": ((), ()),
}  # fmt: skip


def flag_cases(seed: int, count: int) -> list[Case]:
    """``count`` commands, each with one or two malformed options; the same ones for the same seed."""
    drawn = random.Random(seed)
    options = [
        (command, name) for command, kinds in KINDS.items() for name, kind in kinds.items() if kind != "switch"
    ]
    cases = []
    for _ in range(count):
        command, name = drawn.choice(options)
        refused, tolerated = _VALUES[KINDS[command][name]]
        value = drawn.choice((*refused, *tolerated))
        if drawn.random() < 0.1:
            value = grown(value, drawn)
        # An equals sign keeps a value such as -1 from being read as an option.
        given = [f"{name}={value}"] if drawn.random() < 0.7 else [name, value]
        cases.append(Case([*BASES[command], *given], value in refused))
    return cases


def grown(value: str, drawn: random.Random) -> str:
    """One character more, less or other."""
    place = drawn.randrange(len(value) + 1)
    middle = drawn.choice(("", "\x1b", "\n", "-", "9", ".", "[/x]", "\u202e", "e", ","))
    return value[:place] + middle + value[place + drawn.randrange(2) :]

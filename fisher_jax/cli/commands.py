"""The commands, their words and options. Heavy imports wait until the first line is printed."""

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fisher_jax._support.errors import InputError
from fisher_jax._support.machine import installed
from fisher_jax.cli.cache.settings import CacheSettings
from fisher_jax.cli.compare.settings import CompareSettings
from fisher_jax.cli.doctor.settings import DoctorSettings
from fisher_jax.cli.merge.settings import MergeSettings
from fisher_jax.cli.report.join.settings import JoinSettings
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.run.options import Settings, add_options, settings_from
from fisher_jax.cli.run.tools import Tools
from fisher_jax.cli.spectrum.settings import SpectrumSettings
from fisher_jax.cli.train.settings import TrainSettings
from fisher_jax.cli.trim.settings import TrimSettings

_VERSION = f"fisher-jax {installed('fisher-jax', 'of no package')}"


# What it is in a line of the help, and its options: the module of these has no heavy import, so that help is instant,
# and tells the rest. `run` in the module ``command`` beside it does it.
_COMMANDS: dict[str, tuple[str, type[Settings]]] = {
    "report": ("which vocabulary tokens of a language model matter", ReportSettings),
    "join": ("one report from the parts of a run, or from several days", JoinSettings),
    "compare": ("which tokens and layers matter more in one text than in another", CompareSettings),
    "spectrum": ("eigenvalues of the curvature of a language model's loss", SpectrumSettings),
    "train": ("train a small language model with K-FAC, AdamW and others", TrainSettings),
    "merge": ("one model from several that were fine-tuned from the same one", MergeSettings),
    "trim": ("a smaller vocabulary: embedding, head and tokenizer cut together", TrimSettings),
    "cache": ("what is kept of dequantised weights, and away with it", CacheSettings),
    "doctor": ("whether this device and compiler compute what they should", DoctorSettings),
}


class _Parser(argparse.ArgumentParser):
    """Refuses options as all other input is refused, with one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists the options.")


def parser() -> argparse.ArgumentParser:
    """The options of every command."""
    parser = _Parser(prog="fisher-jax", description="Fisher information of language models.")
    parser.add_argument("--version", action="version", version=_VERSION, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, settings) in _COMMANDS.items():
        description, _, examples = (sys.modules[settings.__module__].__doc__ or "").partition("\n\n")
        options = commands.add_parser(
            name, help=summary, description=description, epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        add_options(options, settings)
    return parser


def settings_of(arguments: Sequence[str] | None = None) -> tuple[str, Any]:
    """The command and its checked settings, before anything heavy is imported.

    Raises:
        InputError: an option that is unknown or out of its range, or settings that do not go together.
        SystemExit: 0, after help.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    for argument in given:
        name, _, value = argument.partition("=")
        if name.startswith("--") and value == "--":  # argparse would take it for the end of the options
            raise InputError(f"{name} has no value; give one after the equals sign.")
    options = parser().parse_args(given)
    return options.command, settings_from(_COMMANDS[options.command][1], options)


def run_command(arguments: Sequence[str] | None, started: Callable[[], None], tools: Tools) -> int:
    """The exit code of the command that the arguments name; ``started`` is called when its imports are done."""
    # Errors are told once, by us; orbax would print a traceback of each of its threads as well.
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    name, settings = settings_of(arguments)
    print(f"{_VERSION}: starting up", flush=True)
    module = importlib.import_module(_COMMANDS[name][1].__module__.removesuffix("settings") + "command")
    started()
    return module.run(settings, tools)

"""The commands, their words and options. Heavy imports wait until the first line is printed."""

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from fisher_jax._support.errors import InputError
from fisher_jax.cli.compare.settings import CompareSettings
from fisher_jax.cli.doctor.settings import DoctorSettings
from fisher_jax.cli.merge.settings import MergeSettings
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.run.options import Settings, add_options, settings_from
from fisher_jax.cli.run.tools import Tools
from fisher_jax.cli.spectrum.settings import SpectrumSettings
from fisher_jax.cli.train.settings import TrainSettings
from fisher_jax.cli.trim.settings import TrimSettings

_DESCRIPTION = """Which vocabulary tokens (rows of the head) of a language model matter on a text: importance with
confidence intervals, and what pruning by it costs; with --parameters all also every layer and attention head. Writes
report.html, report.md, importance.csv, layers.csv and the state."""

_EXAMPLES = """examples:
  fisher-jax report                                 the shipped model on Wikipedia articles, under ten minutes
  fisher-jax report --text news                     adds a second task to the same report, side by side
  fisher-jax report --parameters all --out all      every layer and attention head as well
  fisher-jax report --text mine.txt --split-documents blank-line --out mine
  fisher-jax report --model path/to/model.gguf --max-tokens 20000 --out quick
  fisher-jax report --resume                        goes on after Ctrl-C or a crash
"""

_COMPARE_DESCRIPTION = """Which tokens matter more in one text than in another, and which less: the states of two
reports on one model, tested row by row with false discoveries under control, in total, and, where both reports have
--parameters all, for every tensor, layer and attention head. Differences are B minus A. Writes compare.html,
compare.md, compare.csv and pictures."""

_COMPARE_EXAMPLES = """examples:
  fisher-jax report                                     one text
  fisher-jax report --text pubmed                       another, a second task of the same folder
  fisher-jax compare report                             its two tasks
  fisher-jax compare report:wikipedia report:pubmed     the same, by name
  fisher-jax compare old-report new-report --kind true
"""

_SPECTRUM_DESCRIPTION = """Eigenvalues of the curvature of a language model's loss on a text, each with a bound of its
error: sharpness, condition number, gap; with --density how all of them are distributed, with --blocks the
spectrum and capacity of every layer. Writes spectrum.html, spectrum.md, spectrum.csv and pictures."""

_SPECTRUM_EXAMPLES = """examples:
  fisher-jax spectrum --parameters final_norm                 one small tensor: a minute
  fisher-jax spectrum                                         the 10 largest over all parameters; long
  fisher-jax spectrum --operator hessian --k 3 --max-tokens 256   both ends
  fisher-jax spectrum --parameters "layers/attention" --density --blocks --out attention
"""

_TRAIN_DESCRIPTION = """Trains a small language model, with K-FAC or with optimizers of optax, on the shipped text or
your own, from one seed to the same bits. Writes train.html, train.md, curve.csv, a checkpoint, and the model as a
Hugging Face folder that every other command opens."""

_TRAIN_EXAMPLES = """examples:
  fisher-jax train                                   K-FAC on bytes of Wikipedia: two minutes on two cores
  fisher-jax train --compare kfac adamw              two runs from the same weights in one picture
  fisher-jax train --optimizer adamw --learning-rate 3e-3 --out adamw --against train
  fisher-jax train --tokenizer smollm2 --width 128   with a head of 49,152 tokens
  fisher-jax train --init train/model --text pubmed --optimizer adamw --learning-rate 1e-3 --out finetuned
  fisher-jax train --resume                          goes on after Ctrl-C or a crash, to the same bits
  fisher-jax report --model train/model --out train/report   what the trained model found important
"""

_MERGE_DESCRIPTION = """One model from several that were fine-tuned from the same one: the mean of their parameters,
in which each counts by its Fisher information on its own text. A report keeps sums over groups, so that each
parameter has the mean of its group: rows of the head, attention heads, else whole tensors of a layer; a .safetensors
file of fj.exchange.save can bring every single one. Writes a Hugging Face folder and, with --text, tells the bits per
byte."""

_MERGE_EXAMPLES = """examples:
  fisher-jax train --out base                                            a small model, and two that go on from it
  fisher-jax train --init base/model --text pubmed --out a --optimizer adamw --learning-rate 1e-3 --batch-size 32
  fisher-jax train --init base/model --text news --out b --optimizer adamw --learning-rate 1e-3 --batch-size 32
  fisher-jax report --model a/model --text pubmed --parameters all --out a/report
  fisher-jax report --model b/model --text news --parameters all --out b/report
  fisher-jax merge --models a/model b/model --states a/report b/report --text pubmed --text news
  fisher-jax merge --models a/model b/model --by uniform --base base/model --scale 1.5 --out sum
"""

_TRIM_DESCRIPTION = """A smaller model: only the vocabulary tokens that matter most stay. Embedding, head and
tokenizer are cut together; single bytes and special tokens stay, so that every text can still be encoded. Writes a
Hugging Face folder and says what it costs in bits per byte on held-out text."""

_TRIM_EXAMPLES = """examples:
  fisher-jax report                                    scores of the shipped model's tokens, in report/
  fisher-jax trim --state report --keep 16000          a third of the vocabulary, in trimmed/
  fisher-jax trim --state report --task pubmed --keep 16000 --out pubmed   by one of several tasks
  fisher-jax trim --by magnitude --keep 16000 --out other
"""

_DOCTOR_DESCRIPTION = """Whether this device and this compiler compute what they should: versions, devices, memory,
settings and caches; then every estimator, the closed-form head, K-FAC, Lanczos and a checkpoint on a small decoder,
in each dtype, against loops of one token. It says what to do where something is wrong (exit code 1), and is what a
bug report starts with."""

_DOCTOR_EXAMPLES = """examples:
  fisher-jax doctor                        a minute on two cores
  fisher-jax doctor --json doctor.json     the file to send with a bug report
  fisher-jax doctor --dtypes float16 --seconds 0
"""


def _version() -> str:
    from importlib.metadata import version

    return version("fisher-jax")


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(f"fisher-jax {_version()}")
        parser.exit()


class _Command(NamedTuple):
    """One command: its words and its options; `run` in the module ``command`` of its folder does it."""

    name: str
    help: str
    description: str
    examples: str
    settings: type[Settings]


_COMMANDS = (
    _Command(
        "report", "which vocabulary tokens of a language model matter",
        _DESCRIPTION, _EXAMPLES, ReportSettings,
    ),
    _Command(
        "compare", "which tokens and layers matter more in one text than in another",
        _COMPARE_DESCRIPTION, _COMPARE_EXAMPLES, CompareSettings,
    ),
    _Command(
        "spectrum", "eigenvalues of the curvature of a language model's loss",
        _SPECTRUM_DESCRIPTION, _SPECTRUM_EXAMPLES, SpectrumSettings,
    ),
    _Command(
        "train", "train a small language model with K-FAC, AdamW and others",
        _TRAIN_DESCRIPTION, _TRAIN_EXAMPLES, TrainSettings,
    ),
    _Command(
        "merge", "one model from several that were fine-tuned from the same one",
        _MERGE_DESCRIPTION, _MERGE_EXAMPLES, MergeSettings,
    ),
    _Command(
        "trim", "a smaller vocabulary: embedding, head and tokenizer cut together",
        _TRIM_DESCRIPTION, _TRIM_EXAMPLES, TrimSettings,
    ),
    _Command(
        "doctor", "whether this device and compiler compute what they should",
        _DOCTOR_DESCRIPTION, _DOCTOR_EXAMPLES, DoctorSettings,
    ),
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Refuses options as all other input is refused, with one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists the options.")


def parser() -> argparse.ArgumentParser:
    """The options of every command."""
    parser = _Parser(prog="fisher-jax", description="Fisher information of language models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        options = commands.add_parser(
            command.name,
            help=command.help,
            description=command.description,
            epilog=command.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(options, command.settings)
        options.set_defaults(chosen=command)
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
    return options.chosen.name, settings_from(options.chosen.settings, options)


def run_command(arguments: Sequence[str] | None, started: Callable[[], None], tools: Tools) -> int:
    """The exit code of the command that the arguments name; ``started`` is called when its imports are done."""
    # Errors are told once, by us; orbax would print a traceback of each of its threads as well.
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    name, settings = settings_of(arguments)
    _say_start()
    module = importlib.import_module(f"fisher_jax.cli.{name}.command")
    started()
    return module.run(settings, tools)


def _say_start() -> None:
    print(f"fisher-jax {_version()}: starting up", flush=True)

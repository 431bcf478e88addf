"""The command line: options in, exit code out. Heavy imports wait until the first line is printed."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from fisher_jax.cli.settings import add_report_options, settings_from
from fisher_jax.cli.spectrum_settings import add_spectrum_options, spectrum_settings_from
from fisher_jax.cli.train_settings import add_train_options, train_settings_from
from fisher_jax.cli.trim_settings import add_trim_options, trim_settings_from
from fisher_jax.errors import InputError, RejectedBatchError

__all__ = ["main"]

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

_SPECTRUM_DESCRIPTION = """Eigenvalues of the curvature of a language model's loss on a text, each with a bound of its
error: sharpness, condition number, gap; with --density how all of them are distributed, with --blocks the
spectrum and capacity of every layer. Writes spectrum.html, spectrum.md, spectrum.csv and pictures."""

_SPECTRUM_EXAMPLES = """examples:
  fisher-jax spectrum --parameters final_norm                 one small tensor: a minute
  fisher-jax spectrum                                         the 10 largest over all parameters; long
  fisher-jax spectrum --operator hessian --k 3 --tokens 256   both ends
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
  fisher-jax train --resume                          goes on after Ctrl-C or a crash, to the same bits
  fisher-jax report --model train/model --seq-len 64 what the trained model found important
"""

_TRIM_DESCRIPTION = """A smaller model: only the vocabulary tokens that matter most stay. Embedding, head and
tokenizer are cut together; single bytes and special tokens stay, so that every text can still be encoded. Writes a
Hugging Face folder and says what it costs in bits per byte on held-out text."""

_TRIM_EXAMPLES = """examples:
  fisher-jax report                                    scores of the shipped model's tokens, in report/
  fisher-jax trim --state report --keep 16000          a third of the vocabulary, in trimmed/
  fisher-jax trim --by magnitude --keep 16000 --out other
"""


def _version() -> str:
    from importlib.metadata import version

    return version("fisher-jax")


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(f"fisher-jax {_version()}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fisher-jax", description="Fisher information of language models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    report = commands.add_parser(
        "report",
        help="which vocabulary tokens of a language model matter",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_report_options(report)
    report.set_defaults(start=_report)
    spectrum = commands.add_parser(
        "spectrum",
        help="eigenvalues of the curvature of a language model's loss",
        description=_SPECTRUM_DESCRIPTION,
        epilog=_SPECTRUM_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_spectrum_options(spectrum)
    spectrum.set_defaults(start=_spectrum)
    train = commands.add_parser(
        "train",
        help="train a small language model with K-FAC, AdamW and others",
        description=_TRAIN_DESCRIPTION,
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_train_options(train)
    train.set_defaults(start=_train)
    trim = commands.add_parser(
        "trim",
        help="a smaller vocabulary: embedding, head and tokenizer cut together",
        description=_TRIM_DESCRIPTION,
        epilog=_TRIM_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_trim_options(trim)
    trim.set_defaults(start=_trim)
    return parser


def _report(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    _say_start()
    from fisher_jax.cli.report import run

    return run(settings)


def _spectrum(options: argparse.Namespace) -> int:
    settings = spectrum_settings_from(options)
    _say_start()
    from fisher_jax.cli.spectrum import run

    return run(settings)


def _train(options: argparse.Namespace) -> int:
    settings = train_settings_from(options)
    _say_start()
    from fisher_jax.cli.train import run

    return run(settings)


def _trim(options: argparse.Namespace) -> int:
    settings = trim_settings_from(options)
    _say_start()
    from fisher_jax.cli.trim import run

    return run(settings)


def _say_start() -> None:
    print(f"fisher-jax {_version()}: starting up", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when done, 2 for input that cannot be used, 130 when interrupted after saving."""
    options = _parser().parse_args(arguments)
    # Errors are told once, by us; orbax would print a traceback of each of its threads as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        return options.start(options)
    except (InputError, RejectedBatchError) as error:
        print(f"fisher-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fisher-jax: interrupted before anything was measured; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our lines went away, as in `fisher-jax report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())

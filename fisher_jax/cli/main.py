"""The command line: options in, exit code out. Heavy imports wait until the first line is printed."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from fisher_jax.cli.settings import add_report_options, settings_from
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
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when done, 2 for input that cannot be used, 130 when interrupted after saving."""
    options = _parser().parse_args(arguments)
    try:
        settings = settings_from(options)
        print(f"fisher-jax {_version()}: starting up", flush=True)
        from fisher_jax.cli.report import run

        # Errors are told once, by us; orbax would print a traceback of each of its threads as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        return run(settings)
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

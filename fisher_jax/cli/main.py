"""The entry of the command line, from arguments to the exit code: what went wrong is told in one sentence.

Signals are taken over first, since all that is imported later takes a while.
"""

import os
import sys
from collections.abc import Sequence

from fisher_jax._support.errors import InputError, RejectedBatchError
from fisher_jax._support.printable import printable, shortened
from fisher_jax.cli.run.choice_error import TaskChoiceError
from fisher_jax.cli.run.compiler import avoid_faulty_fusions
from fisher_jax.cli.run.stopping import EXIT_CODE, InterruptedRunError, StopSignals, stop_signals
from fisher_jax.cli.run.tools import TOOLS, Tools

_LONGEST = 800  # characters of a sentence; a name may be of any length


def main(arguments: Sequence[str] | None = None, tools: Tools = TOOLS) -> int:
    """Runs the command; 0 when done, 2 for input that cannot be used, 130 when interrupted after saving."""
    try:
        with stop_signals(last=arguments is None) as signals:
            return _run(arguments, signals, tools)
    except KeyboardInterrupt:  # between the last line of the command and the first one here
        return EXIT_CODE


def _told(error: BaseException, sentence: str, arguments: Sequence[str] | None) -> str:
    """The sentence; where it asks for a choice, with the command for each."""
    if isinstance(error, TaskChoiceError):
        return error.told(sys.argv[1:] if arguments is None else arguments)
    return shortened(sentence, _LONGEST)


def _run(arguments: Sequence[str] | None, signals: StopSignals, tools: Tools) -> int:
    """0 when done, 2 for input that cannot be used, 130 when interrupted."""
    try:
        from fisher_jax.cli.commands import run_command

        avoid_faulty_fusions(os.environ, next(iter(sys.argv[1:] if arguments is None else arguments), None))
        code = run_command(arguments, signals.started, tools)
        if signals.requested:  # and swallowed somewhere
            raise KeyboardInterrupt
        return code
    except InterruptedRunError as stopped:
        print(printable(str(stopped)))
        return EXIT_CODE
    except BaseException as error:
        # What a signal raised may come out of an import or a callback as another error.
        if signals.requested or isinstance(error, KeyboardInterrupt):
            print("fisher-jax: interrupted before anything was measured; nothing was written", file=sys.stderr)
            return EXIT_CODE
        if isinstance(error, BrokenPipeError):  # the reader of our lines went away, as in `fisher-jax report | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if (sentence := _sentence(error)) is None:
            raise
        print(f"fisher-jax: {printable(_told(error, sentence, arguments))}", file=sys.stderr)
        return 2


def _sentence(error: BaseException) -> str | None:
    """What a person can do about the error; None where it is a fault of this program."""
    if isinstance(error, InputError | RejectedBatchError):
        return str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "there is not enough memory for this run; give a smaller --batch-size, --row-length or model."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)} cannot be used: {error.strerror or error}."
    return None


if __name__ == "__main__":
    sys.exit(main())

"""The entry of the command line: signals are taken over first, since all that is imported later takes a while."""

import sys
from collections.abc import Sequence

from fisher_jax.cli.run.stopping import EXIT_CODE, stop_signals
from fisher_jax.cli.run.tools import TOOLS, Tools


def main(arguments: Sequence[str] | None = None, tools: Tools = TOOLS) -> int:
    """Runs the command; 0 when done, 2 for input that cannot be used, 130 when interrupted after saving."""
    try:
        with stop_signals(last=arguments is None) as signals:
            from fisher_jax.cli.outcome import run

            return run(arguments, signals, tools)
    except KeyboardInterrupt:  # between the last line of the command and the first one here
        return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())

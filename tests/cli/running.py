"""The command as tests call it: with tools of their own, and programs that runs share."""

from functools import partial

from fisher_jax.cli import main as entry
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.run.tools import Tools

_made = {}


def shared(make, config, settings):
    """One program for all runs that differ in nothing which it depends on; a process of its own compiles anew."""
    # That of a report is compiled for each shape that it meets, that of a training run before the first step.
    sizes = {"--max-tokens", "--held-out-tokens"}
    sizes |= {"--batch-size", "--row-length"} if isinstance(settings, ReportSettings) else set()
    key = (type(settings), config, *(item for item in settings.fixed().items() if item[0] not in sizes))
    if key not in _made:
        _made[key] = make()
    return _made[key]


def main(arguments, **tools):
    return entry.main(arguments, Tools(**{"program": shared, **tools}))


# For tests that look at states and tables.
quick = partial(main, picture=lambda make: b"a picture")


def after(steps, do):
    """The tool `after_step` that does something once so many steps are done."""
    seen = []

    def step():
        seen.append(1)
        if len(seen) == steps:
            do()

    return step


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def never(*arguments, **options):
    raise AssertionError("something was computed")

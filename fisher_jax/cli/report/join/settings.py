"""One report from several folders of `fisher-jax report`: from all parts of one run (--part), whose numbers
are then those of a single job, or from finished runs on different texts, such as those of several days. Model and
settings must be the same; a part or a text counts once. The pruning curves are measured here, on what was held out of
the texts. Writes what `fisher-jax report` writes.

examples:
  fisher-jax report --part 3/16                  one of 16 jobs: writes part-03-of-16/
  fisher-jax join report part-*-of-16/           when all have ended
  fisher-jax join week monday tuesday friday     three reports on three texts
  fisher-jax join week monday:news tuesday:news  of folders that hold several tasks
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fisher_jax._support.errors import InputError
from fisher_jax.cli.report.settings import KINDS
from fisher_jax.cli.run import options, values
from fisher_jax.cli.run.options import Settings, option
from fisher_jax.cli.run.texts import text_source

_AS_ASKED = "(default: as `fisher-jax report` was asked)"


@dataclass(frozen=True, kw_only=True)
class JoinSettings(Settings):
    """What one joining was asked to do."""

    out: Path = option(
        type=values.folder, help="folder to write", group="what to join", positional=True, metavar="OUT"
    )
    folders: tuple[str, ...] = option(
        type=values.file_or_folder, help="what `fisher-jax report` wrote, or FOLDER:TASK where a folder holds "
        "several tasks", positional=True, metavar="FOLDER", nargs="+",
    )  # fmt: skip
    task: str = option(
        "", values.task_name, "the task to join, where folders hold several (default: the one that all hold)",
        metavar="NAME",
    )  # fmt: skip
    overwrite: bool = options.overwrite("drop an earlier run of this task in OUT")
    model: str = option(
        "", values.file_or_folder, "where the model lies now (default: where it lay)", group="what was measured",
        metavar="M",
    )  # fmt: skip
    text: tuple[tuple[str, ...], ...] = option(
        (), text_source, "where the text lies now; of several texts, --text for each, in the order of "
        "the folders (default: where it lay)", metavar="FILE", nargs="+", action="append",
    )  # fmt: skip
    level: float | None = option(
        None, values.fraction(0.95), f"of the intervals {_AS_ASKED}", group="how to show it", metavar="P"
    )
    kind: str | None = option(None, None, f"whose scores the page shows first {_AS_ASKED}", choices=KINDS)
    seed: int | None = options.option(None, values.seed, f"of random orders and ties {_AS_ASKED}")

    def page(self) -> dict[str, object]:
        """Settings of the page that were asked for here."""
        asked = {"--level": self.level, "--kind": self.kind, "--seed": self.seed}
        return {name: value for name, value in asked.items() if value is not None}

    def checked(self) -> Self:
        if self.out.resolve() in [Path(folder).resolve() for folder in self.folders]:
            raise InputError(f"{self.out} is read and would be written; give the folder to write first: join OUT ...")
        return self

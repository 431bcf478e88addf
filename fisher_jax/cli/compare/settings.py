"""Which tokens matter more in one text than in another, and which less: the states of two
reports on one model, tested row by row with false discoveries under control, in total, and, where both reports have
--parameters all, for every tensor, layer and attention head. Differences are B minus A. Writes compare.html,
compare.md, compare.csv and pictures.

examples:
  fisher-jax report                                     one text
  fisher-jax report --text pubmed                       another, a second task of the same folder
  fisher-jax compare report                             its two tasks
  fisher-jax compare report:wikipedia report:pubmed     the same, by name
  fisher-jax compare old-report new-report --kind true
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run import options
from fisher_jax.cli.run.options import Settings, option
from fisher_jax.cli.run.values import file_or_folder, fraction

KINDS = ("empirical", "true")


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """What one comparison was asked to do."""

    reports: tuple[str, ...] = option(
        type=file_or_folder, help="A and B: folders that `fisher-jax report` wrote, or FOLDER:TASK where a folder "
        "holds several tasks; one folder alone: its two tasks", group="what to compare", positional=True,
        metavar="REPORT", nargs="+",
    )  # fmt: skip
    model: str = options.model()
    kind: str = option(
        "both", None, "scores of the texts' own next tokens, or the exact mean over the model's",
        choices=(*KINDS, "both"),
    )  # fmt: skip
    q: float = option(
        0.05, fraction(0.05), "share of false discoveries that is accepted among the discoveries", metavar="Q"
    )
    out: Path = options.out("compare", group="where to keep it")

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS if self.kind == "both" else (self.kind,)

    def checked(self) -> Self:
        if len(self.reports) > 2:
            raise InputError(f"two reports are compared, found {len(self.reports)}; give A and B.")
        return self

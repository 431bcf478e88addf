"""The options of `fisher-jax compare`, with no heavy import so that help is instant."""

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

"""The options of `fisher-jax compare`, with no heavy import so that help is instant."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.options import add_model_option, values_for
from fisher_jax.cli.run.values import file_or_folder, folder, fraction

__all__ = ["KINDS", "CompareSettings", "add_compare_options", "compare_settings_from"]

KINDS = ("empirical", "true")


@dataclass(frozen=True)
class CompareSettings:
    """What one comparison was asked to do."""

    reports: tuple[str, ...]
    model: str = "smollm2"
    kind: str = "both"
    rate: float = 0.05
    out: Path = Path("compare")

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS if self.kind == "both" else (self.kind,)


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """Options in the order in which a person meets them."""
    default = CompareSettings(reports=())
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "reports",
        metavar="REPORT",
        nargs="+",
        type=file_or_folder,
        help="A and B: folders that `fisher-jax report` wrote, or FOLDER:TASK where a folder holds several tasks; "
        "one folder alone: its two tasks",
    )
    add_model_option(what, default.model)
    what.add_argument(
        "--kind",
        choices=(*KINDS, "both"),
        default=default.kind,
        help="scores of the texts' own next tokens, or the exact mean over the model's (default %(default)s)",
    )
    what.add_argument(
        "--q",
        metavar="Q",
        dest="rate",
        type=fraction(0.05),
        default=default.rate,
        help="share of false discoveries that is accepted among the discoveries (%(default)s)",
    )
    where = parser.add_argument_group("where to keep it")
    where.add_argument("--out", metavar="DIR", type=folder, default=default.out, help="folder to write (compare/)")


def compare_settings_from(options: argparse.Namespace) -> CompareSettings:
    """Checked settings."""
    if len(options.reports) > 2:
        raise InputError(f"two reports are compared, found {len(options.reports)}; give A and B.")
    return CompareSettings(**values_for(CompareSettings, options))

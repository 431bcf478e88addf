"""The options of `fisher-jax trim`, with no heavy import so that help is instant."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.options import (
    add_length_options,
    add_model_folder_options,
    add_model_option,
    add_text_options,
    refuse_model_there,
    values_for,
)
from fisher_jax.cli.run.values import count, place, task_name

__all__ = ["TrimSettings", "add_trim_options", "trim_settings_from"]

ORDERS = ("true", "empirical", "saliency", "frequency", "magnitude")


@dataclass(frozen=True)
class TrimSettings:
    """What one trimming was asked to do."""

    keep: int
    model: str = "smollm2"
    state: str | None = None
    task: str | None = None
    by: str = "true"
    out: Path = Path("trimmed")
    overwrite: bool = False
    text: tuple[str, ...] = ("wikipedia",)
    split_documents: str = "none"
    documents: int = 32
    characters: int = 1_200
    dtype: str = "float32"


def add_trim_options(parser: argparse.ArgumentParser) -> None:
    """Options in the order in which a person meets them."""
    default = TrimSettings(keep=1)
    what = parser.add_argument_group("what to cut")
    what.add_argument("--keep", metavar="N", type=count(1), required=True, help="tokens of the new vocabulary")
    what.add_argument(
        "--state",
        metavar="DIR",
        type=place,
        help="folder that `fisher-jax report` wrote for this model, or FOLDER:TASK: its scores say which tokens "
        "matter",
    )
    what.add_argument(
        "--task", metavar="NAME", type=task_name, help="which task of that folder (default: the only finished one)"
    )
    what.add_argument(
        "--by",
        choices=ORDERS,
        default=default.by,
        help="order of importance: exact true or empirical Fisher of a token's row, saliency, corpus frequency, or "
        "weight magnitude (needs no state); default %(default)s",
    )
    add_model_option(what, default.model)
    add_model_folder_options(what, default.out, default.dtype)
    how = parser.add_argument_group(
        "how to measure the loss before and after",
        "every eighth document of the text is used, which a report on the same text does not stream",
    )
    add_text_options(how, default.text, default.split_documents)
    add_length_options(how, default.documents, default.characters)


def trim_settings_from(options: argparse.Namespace) -> TrimSettings:
    """Checked settings."""
    if options.state is None and options.by != "magnitude":
        raise InputError(
            f"--by {options.by} needs scores: run `fisher-jax report` on this model first and give its folder with "
            "--state, or choose --by magnitude."
        )
    refuse_model_there(options, [options.model, *([options.state] if options.state else [])], "trim.json")
    return TrimSettings(**values_for(TrimSettings, options))

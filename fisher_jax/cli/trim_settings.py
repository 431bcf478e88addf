"""The options of `fisher-jax trim`, with no heavy import so that help is instant."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from fisher_jax.cli.options import add_model_option, add_text_options, count, refuse_model_there
from fisher_jax.errors import InputError

__all__ = ["TrimSettings", "add_trim_options", "trim_settings_from"]

ORDERS = ("empirical", "true", "saliency", "frequency", "magnitude")


@dataclass(frozen=True)
class TrimSettings:
    """What one trimming was asked to do."""

    keep: int
    model: str = "smollm2"
    state: Path | None = None
    task: str | None = None
    by: str = "empirical"
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
        type=Path,
        help="folder that `fisher-jax report` wrote for this model: its scores say which tokens matter",
    )
    what.add_argument("--task", metavar="NAME", help="which task of that folder (default: the only one)")
    what.add_argument(
        "--by",
        choices=ORDERS,
        default=default.by,
        help="order of importance: empirical or exact true Fisher of a token's row, saliency, corpus frequency, or "
        "weight magnitude (needs no state); default %(default)s",
    )
    add_model_option(what, default.model)
    what.add_argument("--out", metavar="DIR", type=Path, default=default.out, help="model folder to write (trimmed/)")
    what.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    what.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=default.dtype, help="of the written weights (float32)"
    )
    how = parser.add_argument_group(
        "how to measure the loss before and after",
        "every eighth document of the text is used, which a report on the same text does not stream",
    )
    add_text_options(how, default.text, default.split_documents)
    how.add_argument(
        "--documents", metavar="N", type=count(2), default=default.documents, help="documents to read (32)"
    )
    how.add_argument(
        "--characters", metavar="N", type=count(16), default=default.characters, help="of each, at most (1,200)"
    )


def trim_settings_from(options: argparse.Namespace) -> TrimSettings:
    """Checked settings."""
    values = {name: value for name, value in vars(options).items() if name in TrimSettings.__dataclass_fields__}
    values["text"] = tuple(options.text)
    if options.state is None and options.by != "magnitude":
        raise InputError(
            f"--by {options.by} needs scores: run `fisher-jax report` on this model first and give its folder with "
            "--state, or choose --by magnitude."
        )
    refuse_model_there(options)
    return TrimSettings(**values)

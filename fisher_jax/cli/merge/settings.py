"""The options of `fisher-jax merge`, with no heavy import so that help is instant."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.options import add_length_options, add_model_folder_options, refuse_model_there, values_for
from fisher_jax.cli.run.texts import text_source
from fisher_jax.cli.run.values import file_or_folder, finite, not_negative

__all__ = ["MergeSettings", "add_merge_options", "merge_settings_from"]

WAYS = ("fisher", "uniform", "magnitude")


@dataclass(frozen=True)
class MergeSettings:
    """What one merging was asked to do."""

    models: tuple[str, ...]
    states: tuple[str, ...] = ()
    base: str | None = None
    by: str = "fisher"
    weights: tuple[float, ...] = ()
    floor: float = 0.0
    scale: float = 1.0
    out: Path = Path("merged")
    overwrite: bool = False
    dtype: str = "float32"
    text: tuple[tuple[str, ...], ...] = ()
    split_documents: str = "none"
    documents: int = 32
    characters: int = 1_200


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """Options in the order in which a person meets them."""
    default = MergeSettings(models=())
    what = parser.add_argument_group("what to merge")
    what.add_argument(
        "--models",
        metavar="M",
        type=file_or_folder,
        nargs="+",
        required=True,
        help="Hugging Face folders or GGUF files of one architecture and tokenizer, fine-tuned from one model",
    )
    what.add_argument(
        "--states",
        metavar="S",
        type=file_or_folder,
        nargs="+",
        default=[],
        help="for each model, in the same order: a folder of `fisher-jax report --parameters all` on that model "
        "(FOLDER:TASK where it holds several tasks), or a .safetensors file of fj.exchange.save",
    )
    what.add_argument(
        "--base",
        metavar="M",
        type=file_or_folder,
        help="the model that all were fine-tuned from: what each learnt beyond it is merged and added to it",
    )
    how = parser.add_argument_group("how to merge")
    how.add_argument(
        "--by",
        choices=WAYS,
        default=default.by,
        help="what a model's parameter weighs: its Fisher information, the same for all, or its own magnitude (with "
        "--base: of its change); default %(default)s",
    )
    how.add_argument(
        "--weights",
        metavar="X",
        type=not_negative,
        nargs="+",
        default=[],
        help="one number for each model, such as its tokens, by which its weights are multiplied (default: 1)",
    )
    how.add_argument(
        "--floor",
        metavar="X",
        type=not_negative,
        default=default.floor,
        help="least weight of a parameter, as a share of the mean of its tensor (%(default)g)",
    )
    how.add_argument(
        "--scale",
        metavar="X",
        type=finite,
        default=default.scale,
        help="with --base: by how much the merged change is multiplied (%(default)g)",
    )
    where = parser.add_argument_group("where to keep it")
    add_model_folder_options(where, default.out, default.dtype)
    loss = parser.add_argument_group(
        "how to measure it",
        "bits per byte of every model, of the plain mean and of the merged model; every eighth document of a text is "
        "used, which a report or a training run on the same text does not see",
    )
    loss.add_argument(
        "--text",
        metavar="FILE",
        type=text_source,
        nargs="+",
        action="append",
        default=[],
        help="a text to measure on: files, one document each, or a shipped corpus: wikipedia, news, pubmed; give "
        "--text again for another one (default: nothing is measured)",
    )
    loss.add_argument(
        "--split-documents",
        choices=("none", "blank-line"),
        default=default.split_documents,
        help="blank-line: each paragraph of a file is a document of its own",
    )
    add_length_options(loss, default.documents, default.characters)


def merge_settings_from(options: argparse.Namespace) -> MergeSettings:
    """Checked settings."""
    number = len(options.models)
    if number < 2:
        raise InputError("one model alone cannot be merged; give two or more to --models.")
    if options.by == "fisher" and len(options.states) != number:
        raise InputError(
            f"--by fisher needs a state for each of the {number} models, found {len(options.states)}: run "
            "`fisher-jax report --parameters all` on each model and give the folders with --states, or choose --by "
            "uniform."
        )
    if options.by != "fisher" and options.states:
        raise InputError(f"--states are for --by fisher; leave them out for --by {options.by}.")
    if options.weights and len(options.weights) != number:
        raise InputError(f"--weights needs one number for each of the {number} models, found {len(options.weights)}.")
    if options.weights and not any(options.weights):
        raise InputError("all --weights are 0, so that no model would count; give one above 0.")
    if options.scale != 1 and options.base is None:
        raise InputError("--scale multiplies what was learnt beyond a base; give that model with --base.")
    base = [] if options.base is None else [options.base]
    refuse_model_there(options, [*options.models, *base, *options.states], "merge.json")
    values = values_for(MergeSettings, options) | {"text": tuple(map(tuple, options.text))}
    return MergeSettings(**values)

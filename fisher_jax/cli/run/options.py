"""Options that several commands share, and the values they take; no heavy import, so that help is instant."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.texts import text_source
from fisher_jax.cli.run.values import LONGEST_ROW, count, file_or_folder, folder

__all__ = [
    "ROW_LENGTH",
    "add_folder_options",
    "add_length_options",
    "add_model_folder_options",
    "add_model_option",
    "add_row_length_option",
    "add_text_options",
    "refuse_model_there",
    "refuse_resume_and_overwrite",
    "values_for",
]


# Tokens of a row, where the model has the positions and no length was typed.
ROW_LENGTH = 256


def add_model_option(group: Any, default: str) -> None:
    group.add_argument(
        "--model",
        metavar="M",
        type=file_or_folder,
        default=default,
        help="the shipped SmolLM2-135M (default), a GGUF file, a Hugging Face folder (config.json, *.safetensors, "
        "tokenizer.json), or a hub name; Llama family or GPT-2",
    )


def add_text_options(group: Any, text: tuple[str, ...], split: str) -> None:
    group.add_argument(
        "--text",
        metavar="FILE",
        nargs="+",
        type=text_source,
        default=list(text),
        help="UTF-8 text files, one document each; - for standard input; or a shipped corpus: wikipedia (default), "
        "news, pubmed",
    )
    group.add_argument(
        "--split-documents",
        choices=("none", "blank-line"),
        default=split,
        help="blank-line: each paragraph of a file is a document of its own (default: a file is one document)",
    )


def add_folder_options(group: Any, out: Path, *, resume: str, overwrite: str) -> None:
    group.add_argument("--out", metavar="DIR", type=folder, default=out, help=f"folder to write ({out}/)")
    group.add_argument("--resume", action="store_true", help=resume)
    group.add_argument("--overwrite", action="store_true", help=overwrite)


def add_row_length_option(group: Any, *names: str) -> None:
    group.add_argument(
        *names,
        metavar="N",
        type=count(2, LONGEST_ROW),
        help=f"tokens per row (default {ROW_LENGTH}, or all positions of a model that has fewer)",
    )


def add_model_folder_options(group: Any, out: Path, dtype: str) -> None:
    """For commands that write a model."""
    group.add_argument("--out", metavar="DIR", type=folder, default=out, help=f"model folder to write ({out}/)")
    group.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=dtype, help="of the written weights (float32)"
    )


def add_length_options(group: Any, documents: int, characters: int) -> None:
    """How much text bits per byte are measured on."""
    group.add_argument(
        "--documents", metavar="N", type=count(2), default=documents, help=f"documents to read ({documents})"
    )
    group.add_argument(
        "--characters", metavar="N", type=count(16), default=characters, help=f"of each, at most ({characters:,})"
    )


def refuse_resume_and_overwrite(options: argparse.Namespace) -> None:
    if options.resume and options.overwrite:
        raise InputError("--resume goes on with a run and --overwrite drops it; give one of them.")


def refuse_model_there(options: argparse.Namespace, sources: Sequence[str | Path], result: str) -> None:
    """What is read is never written over, and a model that is there only if asked to.

    One that the command wrote itself, with its ``result`` beside it, is told again by the command.
    """
    out = Path(os.path.realpath(options.out))
    for source in map(Path, sources):
        if source.is_dir() and out.is_relative_to(os.path.realpath(source)):
            raise InputError(f"--out {options.out} lies in {source}, which is read; choose another --out.")
    there = (options.out / "config.json").exists() and not (options.out / result).exists()
    if there and not options.overwrite:
        raise InputError(f"{options.out} holds a model; choose another --out, or --overwrite.")


def values_for(settings: type, options: argparse.Namespace) -> dict[str, Any]:
    """What was given for the fields of a dataclass of settings; lists become tuples, which are hashable."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name in settings.__dataclass_fields__  # type: ignore[attr-defined]
    }

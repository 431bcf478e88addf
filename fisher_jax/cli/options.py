"""Options that several commands share, and the values they take; no heavy import, so that help is instant."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fisher_jax.errors import InputError

__all__ = [
    "add_folder_options",
    "add_length_options",
    "add_model_folder_options",
    "add_model_option",
    "add_text_options",
    "count",
    "fraction",
    "not_negative",
    "positive",
    "refuse_model_there",
    "refuse_resume_and_overwrite",
    "seconds",
    "values_for",
]


def count(minimum: int) -> Callable[[str], int]:
    """Whole numbers from ``minimum`` on, also written 80_000 or 80,000."""

    def count(text: str) -> int:
        value = int(text.replace("_", "").replace(",", ""))
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {value}")
        return value

    return count


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, not {text}")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def fraction(instance: float) -> Callable[[str], float]:
    """Numbers strictly between 0 and 1, such as ``instance``."""

    def fraction(text: str) -> float:
        value = float(text)
        if not 0 < value < 1:
            raise argparse.ArgumentTypeError(f"must lie between 0 and 1, for example {instance:g}, not {text}")
        return value

    return fraction


def add_model_option(group: Any, default: str) -> None:
    group.add_argument(
        "--model",
        metavar="M",
        default=default,
        help="the shipped SmolLM2-135M (default), a GGUF file, a Hugging Face folder (config.json, *.safetensors, "
        "tokenizer.json), or a hub name; Llama family or GPT-2",
    )


def add_text_options(group: Any, text: tuple[str, ...], split: str) -> None:
    group.add_argument(
        "--text",
        metavar="FILE",
        nargs="+",
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
    group.add_argument("--out", metavar="DIR", type=Path, default=out, help=f"folder to write ({out}/)")
    group.add_argument("--resume", action="store_true", help=resume)
    group.add_argument("--overwrite", action="store_true", help=overwrite)


def add_model_folder_options(group: Any, out: Path, dtype: str) -> None:
    """For commands that write a model."""
    group.add_argument("--out", metavar="DIR", type=Path, default=out, help=f"model folder to write ({out}/)")
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


def refuse_model_there(options: argparse.Namespace) -> None:
    if (options.out / "config.json").exists() and not options.overwrite:
        raise InputError(f"{options.out} holds a model; choose another --out, or --overwrite.")


def values_for(settings: type, options: argparse.Namespace) -> dict[str, Any]:
    """What was given for the fields of a dataclass of settings; lists become tuples, which are hashable."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name in settings.__dataclass_fields__  # type: ignore[attr-defined]
    }

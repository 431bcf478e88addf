"""Options of commands, each declared once as a field of frozen settings; no heavy import, so that help is instant.

    @dataclass(frozen=True, kw_only=True)
    class SomeSettings(Settings):
        row_length: int = option(256, count(2), "tokens per row", group="how to measure it", fixed=True)

is the option ``--row-length``, in the help with its default, and part of what a resumed run must share.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run import values
from fisher_jax.cli.run.texts import text_source

S = TypeVar("S", bound="Settings")

# Tokens of a row, where the model has the positions and no length was given.
ROW_LENGTH = 256
CHECKPOINT_EVERY = 30.0  # seconds
DTYPES = ("float32", "bfloat16")


def option(
    default: Any = MISSING,
    type: Callable[[str], Any] | None = None,
    help: str = "",
    *,
    group: str | tuple[str, str] = "",
    fixed: bool = False,
    positional: bool = False,
    **more: Any,
) -> Any:
    """A field of settings that is an option of the same name; ``False`` as default makes it a switch.

    Args:
        default: its value where it is not given; without one it has to be given.
        help: what it is; its default is added, unless the words speak of the default themselves.
        group: the heading, and what else is said there, of the options from this one on.
        fixed: whether it decides the numbers, so that a resumed run must share it.
        positional: the words that stand behind no option.
        more: for ``ArgumentParser.add_argument``: ``choices``, ``nargs``, ``metavar``, ...
    """
    if default is False:
        more["action"] = "store_true"
    elif "choices" not in more:
        more = {"metavar": "N", "type": type, **more}
    told = "default" in help or default is False or default in (MISSING, None, ())
    more["help"] = help if told else f"{help} (default {_shown(default)})"
    if not positional:
        more |= {"required": default is MISSING, "default": argparse.SUPPRESS}
    about = {"group": (group,) if isinstance(group, str) else group, "fixed": fixed, "positional": positional}
    return field(default=default, metadata={**about, "argument": more})


def _shown(default: Any) -> str:
    form = {int: "{:,}", float: "{:g}"}.get(type(default), "{}/" if isinstance(default, Path) else "{}")
    return form.format(default)


class Settings:
    """What one call of a command was asked to do: a frozen dataclass whose fields are its options."""

    def checked(self) -> Self:
        """The same with defaults that depend on other options.

        Raises:
            InputError: options that do not go together.
        """
        return self

    def fixed(self) -> dict[str, Any]:
        """What decides the numbers, and so what a resumed run must share, by option."""
        return {_flag(x.name): getattr(self, x.name) for x in _options(type(self)) if x.metadata["fixed"]}


def _options(settings: type[Settings]) -> Sequence[Any]:
    return fields(settings)  # type: ignore[arg-type]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """The options in the order of the fields, in their groups."""
    group: Any = parser
    for x in _options(settings):
        if any(x.metadata["group"]):
            group = parser.add_argument_group(*x.metadata["group"])
        group.add_argument(x.name if x.metadata["positional"] else _flag(x.name), **x.metadata["argument"])


def settings_from(settings: type[S], options: argparse.Namespace) -> S:
    """Checked settings; lists become tuples, which are hashable.

    Raises:
        InputError: options that do not go together.
    """
    given = {x.name: _hashable(getattr(options, x.name)) for x in _options(settings) if x.name in options}
    if given.get("resume") and given.get("overwrite"):
        raise InputError("--resume goes on with a run and --overwrite drops it; give one of them.")
    return settings(**given).checked()


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def model(**more: Any) -> Any:
    return option(
        "smollm2", values.file_or_folder, "the shipped SmolLM2-135M (default), a GGUF file, a Hugging Face folder "
        "(config.json, *.safetensors, tokenizer.json), or a hub name; docs/families.md lists the families",
        metavar="M", **more,
    )  # fmt: skip


def text(**more: Any) -> Any:
    return option(
        ("wikipedia",), text_source, "UTF-8 text files, one document each; - for standard input; or a shipped "
        "corpus: wikipedia (default), news, pubmed", metavar="FILE", nargs="+", **more,
    )  # fmt: skip


def split_documents() -> Any:
    return option(
        "none", None, "blank-line: each paragraph of a file is a document of its own (default: a file is one "
        "document)", choices=("none", "blank-line"),
    )  # fmt: skip


def row_length(default: str = "", least: int = 2) -> Any:
    """0 where it was not given; see `row_length`."""
    help = f"tokens per row (default {default}{ROW_LENGTH}, or all positions of a model that has fewer)"
    return option(0, values.count(least, values.LONGEST_ROW), help, fixed=True)


def dtype(help: str = "of the model", *, default: str = "auto", fixed: bool = True) -> Any:
    auto = "auto is that of its files, and bfloat16 for quantised ones"
    return option(default, None, f"{help}; {auto} (default {default})", choices=("auto", *DTYPES), fixed=fixed)


def seed(help: str, *, fixed: bool = True) -> Any:
    return option(0, values.seed, help, fixed=fixed)


def out(name: str, help: str = "folder to write", **more: Any) -> Any:
    return option(Path(name), values.folder, help, metavar="DIR", **more)


def overwrite(help: str = "replace a model that is there") -> Any:
    return option(False, help=help)


def resume() -> Any:
    return option(False, help="go on with an interrupted run, to the same bits")


def checkpoint_every(default: float | None = CHECKPOINT_EVERY, more: str = "") -> Any:
    return option(default, values.seconds, f"at most this much work is lost by a crash{more}", metavar="SECONDS")


def documents() -> Any:
    """How much text bits per byte are measured on."""
    return option(32, values.count(2), "documents to read", fixed=True)


def characters() -> Any:
    return option(1_200, values.count(16), "of each document, at most", fixed=True)


def refuse_model_there(settings: Any, sources: Sequence[str | Path], result: str) -> None:
    """What is read is never written over, and a model that is there only if asked to.

    One that the command wrote itself, with its ``result`` beside it, is told again by the command.
    """
    place = Path(os.path.realpath(settings.out))
    for source in map(Path, sources):
        if source.is_dir() and place.is_relative_to(os.path.realpath(source)):
            raise InputError(f"--out {settings.out} lies in {source}, which is read; choose another --out.")
    there = (settings.out / "config.json").exists() and not (settings.out / result).exists()
    if there and not settings.overwrite:
        raise InputError(f"{settings.out} holds a model; choose another --out, or --overwrite.")

"""A model that a command made from another one, as a Hugging Face folder with what the other one's files say."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fisher_jax.cli.run.folder import disk_error
from fisher_jax.cli.run.temporary import temporary_beside
from fisher_jax.cli.run.terminal import Terminal
from fisher_jax.models import DecoderConfig, Tokenizer, save
from fisher_jax.models.beside_weights import Origin
from fisher_jax.models.saving import hf_settings

_CONFIG = "config.json"  # without it no folder is taken for a model
_OF_AN_EARLIER_MODEL = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja", "trim.json",
    "merge.json",
)  # fmt: skip


@contextmanager
def model_folder(out: Path) -> Iterator[Path]:
    """An empty folder for the files of a model, which get to `out` when all of them are there.

    An error or an interruption leaves `out` as it was. A process killed while the files move leaves a folder without
    ``config.json``, which is not a model.
    """
    incoming = temporary_beside(out / _CONFIG)
    incoming.mkdir(parents=True)
    try:
        yield incoming
        for path in incoming.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        _move(incoming, out)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _move(incoming: Path, out: Path) -> None:
    """An earlier model goes aside first, and comes back where the new one cannot take its place."""
    aside, arrived = temporary_beside(out / _CONFIG), []
    aside.mkdir()
    try:
        for pattern in (_CONFIG, *_OF_AN_EARLIER_MODEL):
            for path in out.glob(pattern):
                if not path.is_dir():
                    os.rename(path, aside / path.name)
        for path in sorted(incoming.iterdir(), key=_config_last):
            os.replace(path, out / path.name)
            arrived.append(out / path.name)
    except BaseException:
        for path in reversed(arrived):
            path.unlink(missing_ok=True)
        for path in sorted(aside.iterdir(), key=_config_last):
            os.replace(path, out / path.name)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _config_last(path: Path) -> bool:
    return path.name == _CONFIG


def say_written(console: Terminal, out: Path) -> None:
    """The last line of a command that wrote a model."""
    where = f"It loads with fisher_jax.models.load({str(out)!r}), with --model {out} in every command"
    console.say("written", f"{out}. {where}, and in Hugging Face transformers.")


def save_model(folder: Path, config: DecoderConfig, params: Any, tokenizer: Tokenizer, origin: Origin) -> None:
    """Weights, tokenizer, special tokens, chat template and generation settings.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        save(
            folder,
            config,
            params,
            tokenizer,
            settings=origin.settings,
            tokenizer_settings=origin.tokenizer_settings,
            generation=origin.generation,
        )
    except OSError as error:
        raise disk_error(error, folder) from error


def check_can_be_written(config: DecoderConfig, origin: Origin) -> None:
    """Raises InputError for what `save_model` would refuse, before hours of work."""
    hf_settings(config, origin.settings)

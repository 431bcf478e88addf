"""A model that a command made from another one, as a Hugging Face folder with what the other one's files say."""

import json
from pathlib import Path
from typing import Any

from fisher_jax.cli.folder import disk_error, write_atomically
from fisher_jax.models import DecoderConfig, Tokenizer, save
from fisher_jax.models.origin import Origin

__all__ = ["save_model"]


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
        )
        if origin.generation:
            write_atomically(folder / "generation_config.json", json.dumps(origin.generation, indent=2) + "\n")
    except OSError as error:
        raise disk_error(error, folder) from error

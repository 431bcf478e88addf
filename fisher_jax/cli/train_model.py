"""The model of a training run: a small Llama, so that every other command opens it afterwards."""

import math
import shutil
from pathlib import Path
from typing import Any

import jax

from fisher_jax import models
from fisher_jax.cli.train_settings import TrainSettings
from fisher_jax.models import DecoderConfig, Tokenizer

__all__ = ["config_for", "first_params", "write_model"]

_MULTIPLE = 16  # of the MLP's size


def config_for(settings: TrainSettings, tokenizer: Tokenizer) -> DecoderConfig:
    """A decoder with an MLP of 8/3 of its width, its head tied to the embedding."""
    return DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        width=settings.width,
        num_layers=settings.layers,
        num_heads=settings.heads,
        num_kv_heads=settings.heads,
        head_size=settings.width // settings.heads,
        mlp_size=_MULTIPLE * math.ceil(8 * settings.width / 3 / _MULTIPLE),
        max_positions=settings.seq_len,
    )


def first_params(config: DecoderConfig, seed: int) -> Any:
    """Random parameters; kernels have the standard deviation `1 / sqrt(inputs)`: 0.02 is for wide models."""

    def leaf(path: tuple, x: jax.Array) -> jax.Array:
        return x * (50 / math.sqrt(x.shape[-2])) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(leaf, models.init_params(config, jax.random.key(seed)))


def write_model(folder: Path, config: DecoderConfig, params: Any, tokenizer: Tokenizer) -> None:
    """A Hugging Face folder, complete before an earlier one goes."""
    incoming = folder.with_name(f".{folder.name}-incoming")
    shutil.rmtree(incoming, ignore_errors=True)
    models.save(incoming, config, params, tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    incoming.replace(folder)

"""The model of a training run: a small Llama of random weights, or any model that `load` reads, to go on with."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fisher_jax import models
from fisher_jax.cli.run.model_folder import model_folder, save_model
from fisher_jax.cli.run.tools import Tools
from fisher_jax.cli.train.data import tokenizer_for
from fisher_jax.cli.train.settings import TrainSettings
from fisher_jax.models import DecoderConfig, Tokenizer
from fisher_jax.models.beside_weights import Origin, read_origin

_MULTIPLE = 16  # of the MLP's size


class Start(NamedTuple):
    """What a run begins with."""

    config: DecoderConfig
    tokenizer: Tokenizer
    origin: Origin  # what the files of a model to go on from say beside its weights
    params: Any | None = None  # None: random ones, of the seed
    model: str | None = None  # name and fingerprint of the model to go on from

    def fresh_params(self, seed: int) -> Any:
        """The first parameters, in buffers of their own: a step gives its buffers away."""
        if self.params is None:
            return first_params(self.config, seed)
        return jax.tree.map(lambda x: x.copy(), self.params)


def start_of(settings: TrainSettings, tools: Tools) -> Start:
    """The model that was asked for.

    Raises:
        InputError: a model that cannot be loaded.
    """
    if settings.init is None:
        tokenizer = tokenizer_for(settings.tokenizer)
        return Start(config_for(settings, tokenizer), tokenizer, Origin({}, {}, {}))
    model = tools.load(settings.init)
    named = f"{model.name} ({model.fingerprint})"
    return Start(model.config, model.tokenizer, read_origin(settings.init), model.params, named)


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
        max_positions=settings.row_length,
    )


def first_params(config: DecoderConfig, seed: int) -> Any:
    """Random parameters; kernels have the standard deviation `1 / sqrt(inputs)`: 0.02 is for wide models."""

    def leaf(path: tuple, x: jax.Array) -> jax.Array:
        return x * (50 / math.sqrt(x.shape[-2])) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(leaf, models.init_params(config, jax.random.key(seed)))


def write_model(folder: Path, start: Start, params: Any) -> None:
    """A Hugging Face folder, complete before an earlier one goes."""
    with model_folder(folder) as incoming:
        save_model(incoming, start.config, params, start.tokenizer, start.origin)

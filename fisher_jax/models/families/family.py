"""A family of models: how its ``config.json`` and its tensors are read and written."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.layout import Layout

__all__ = ["Family"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family apart. `families` holds all of them.

    Attributes:
        kind: the ``model_type`` of its ``config.json``.
        architecture: its causal language model in transformers.
        read: ``(settings, tied)`` to the decoder's shape: each setting that changes the computation is honoured or
            refused. ``tied`` is whether the head is the embedding.
        write: the decoder's shape to settings, without what all families share. It may leave out what the family
            cannot say: what is written is read back and compared.
        layout: names, orientation and order of the tensors.
        tied: what ``tie_word_embeddings`` is where it is not said; ``None``: the files say it by their head.
    """

    kind: str
    architecture: str
    read: Callable[[Settings, bool], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    layout: Layout
    tied: bool | None = None

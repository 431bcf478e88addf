"""Causal language models: a Flax decoder, readers for weight files, tokenizers.

`load` gives a `LanguageModel` and `save` writes one; `from_config` and `init_params` give a decoder of any shape
without files.
"""

from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.decoder import Decoder
from fisher_jax.models.functions import DecoderFunctions, abstract_params, from_config, init_params
from fisher_jax.models.loading import LanguageModel, load
from fisher_jax.models.saving import save
from fisher_jax.models.shardings import sharding_rules
from fisher_jax.models.tokenizer import Tokenizer

__all__ = [
    "Decoder",
    "DecoderConfig",
    "DecoderFunctions",
    "LanguageModel",
    "Tokenizer",
    "abstract_params",
    "from_config",
    "init_params",
    "load",
    "save",
    "sharding_rules",
]

"""``config.json`` of Hugging Face models: what changes the computation is honoured or refused."""

from typing import Any

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families import FAMILIES, Family

__all__ = ["config_from_hf", "family_of"]

# By quantization_config.quant_method, as people call them.
QUANTIZATIONS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes"}


def family_of(settings: Any, label: str) -> Family:
    """The family that a ``config.json`` names; an ``InputError`` for others and for other tasks than text."""
    read = Settings(settings, f"the config.json of {label}")
    family = FAMILIES.get(read.text("model_type", ""))
    told = read.texts("architectures", None) or ([family.architecture] if family else [])
    if family is None or told != [family.architecture]:
        found = shown(told[0] if told else settings.get("model_type"))
        supported = ", ".join(family.architecture for family in FAMILIES.values())
        raise InputError(f"{label} is a {found}; supported: {supported}")
    return family


def config_from_hf(settings: Any, label: str, *, has_head: bool) -> DecoderConfig:
    """The decoder's shape from the content of a ``config.json``.

    ``has_head`` (the files hold a head beside the embedding) decides about tying where neither the settings nor the
    family do.
    """
    family = family_of(settings, label)
    read = Settings(settings, f"the config.json of {label}")
    refuse_quantized(read, label)
    read.must("add_cross_attention", False)
    tied = read.boolean("tie_word_embeddings", not has_head if family.tied is None else family.tied)
    return family.read(read, tied)


def refuse_quantized(read: Settings, label: str) -> None:
    """Weights of a few bits are called by the name of their method."""
    method = None
    if (found := read.inner("quantization_config")) is not None:
        by_bits = any(found.values.get(f"load_in_{bits}bit") for bits in (4, 8))
        name = found.text("quant_method", "bitsandbytes" if by_bits else "an unknown method")
        method = QUANTIZATIONS.get(name, name)
    elif read.get("quantization", None) is not None:
        method = "MLX"
    if method is not None:
        raise InputError(
            f"{label} is quantized with {shown(method)[1:-1]} (quantization_config), which is not read; load the "
            "model from which it was made, or a GGUF file of it"
        )

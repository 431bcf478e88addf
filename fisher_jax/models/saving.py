"""Write a model as a Hugging Face folder: ``config.json``, ``model.safetensors``, ``tokenizer.json``."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fisher_jax._support.errors import InputError
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families import FAMILIES, Family
from fisher_jax.models.hf_config import config_from_hf, family_of
from fisher_jax.models.optional_packages import optional
from fisher_jax.models.rotary_scaling import TOLERANCE
from fisher_jax.models.tokenizer import Tokenizer

__all__ = ["hf_settings", "hf_tensors", "save"]

SCALING = ("rope_scaling", "rope_parameters", "original_max_position_embeddings")


def save(
    folder: Path,
    config: DecoderConfig,
    params: Any,
    tokenizer: Tokenizer,
    *,
    settings: Mapping[str, Any] | None = None,
    tokenizer_settings: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `load` and Hugging Face transformers read; weights keep their dtype.

    All files are written under other names first, and renamed when the last one is complete.

    Args:
        folder: created where it is missing; files of these names are replaced.
        settings: further entries of ``config.json``, such as ``bos_token_id``; they win over those of ``config``.
        tokenizer_settings: entries of ``tokenizer_config.json``, such as ``{"eos_token": "<|endoftext|>"}``.
        generation: entries of ``generation_config.json``, which is written where there are any.

    Raises:
        InputError: the configuration has no counterpart in Hugging Face's families, or a weight is not finite.

    Example:
        >>> import fisher_jax as fj, jax, pathlib, tempfile, tokenizers
        >>> config = fj.models.DecoderConfig(vocab_size=3, width=8, num_layers=2, num_heads=2, num_kv_heads=1,
        ...     head_size=4, mlp_size=16, max_positions=6)
        >>> params = fj.models.init_params(config, jax.random.key(0))
        >>> words = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
        >>> tokenizer = fj.models.Tokenizer(tokenizers.Tokenizer(words))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fj.models.save(pathlib.Path(folder), config, params, tokenizer)
        ...     model = fj.models.load(folder)
        >>> model.config == config, model.tokenizer.encode("b")
        (True, [1])
    """
    safetensors = optional("safetensors.numpy", "writing a model")
    written = hf_settings(config, settings) | {"dtype": np.dtype(params["embedding"].dtype).name}
    tensors = hf_tensors(config, params, family_of(written, "this model"))
    for name, tensor in tensors.items():
        if not np.all(np.isfinite(tensor)):
            raise InputError(f"{name} has values that are NaN or infinite in {tensor.dtype}, so nothing was written")
    frame = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_positions}
    texts = {
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": json_text(frame | dict(tokenizer_settings or {})),
        **({"generation_config.json": json_text(generation)} if generation else {}),
        "config.json": json_text(written),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as aside:
        # Metadata that transformers asks for before it reads a file.
        safetensors.save_file(tensors, Path(aside) / "model.safetensors", metadata={"format": "pt"})
        for name, text in texts.items():
            (Path(aside) / name).write_text(text, "utf-8")
        for name in ("model.safetensors", *texts):
            os.replace(Path(aside) / name, folder / name)


def json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def hf_settings(config: DecoderConfig, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of a ``config.json`` for this decoder; ``settings`` win.

    The family is the one that ``model_type`` in ``settings`` names, else the first one that computes what this
    decoder does. What is written is read back: it must say this decoder again.
    """
    given = dict(settings or {})
    kind = given.get("model_type")
    families = FAMILIES.values() if kind is None else [family_of(given, "what is to be written")]
    reasons = []
    for family in families:
        written = family_settings(family, config)
        if given.keys() & {"rope_scaling", "rope_parameters"}:  # the caller says all of it
            written = {key: value for key, value in written.items() if key not in SCALING}
        written |= given
        try:
            again = config_from_hf(written, "this model", has_head=not config.tied)
        except InputError as error:
            reasons.append(str(error))
            continue
        if not (different := differences(config, again)):
            return written
        reasons.append(f"{family.architecture} differs in {', '.join(different)}")
    told = f"{reasons[0]}" if len(reasons) == 1 else f"switches: {switches(config)}"
    raise InputError(f"no family of models that is written computes this decoder, so nothing was written ({told})")


def family_settings(family: Family, config: DecoderConfig) -> dict[str, Any]:
    """Without what the caller knows better."""
    return {
        "model_type": family.kind,
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **family.write(config),
    }


def differences(config: DecoderConfig, again: DecoderConfig) -> list[str]:
    """Fields in which the decoders differ; divisors count as equal to the rounding of float32, in which GGUF files
    keep them, and the attention scale counts by its value."""

    def value(of: DecoderConfig, name: str) -> Any:
        found = getattr(of, name)
        return of.head_size**-0.5 if name == "attention_scale" and found is None else found

    def same(one: Any, two: Any) -> bool:
        divisors = all(isinstance(x, tuple) and isinstance(x[0], float) for x in (one, two))
        return one == two or (divisors and len(one) == len(two) and np.allclose(one, two, rtol=TOLERANCE, atol=0))

    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if not same(value(config, name), value(again, name))]


def switches(config: DecoderConfig) -> str:
    """What is not as in Llama."""
    fields = [field for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING]
    told = [f"{f.name}={getattr(config, f.name)!r}" for f in fields if getattr(config, f.name) != f.default]
    return ", ".join(told) or "none"


def hf_tensors(config: DecoderConfig, params: Any, family: Family) -> dict[str, np.ndarray]:
    """The weights under the family's names and in its orientation, one tensor for each layer."""
    return family.layout.tensors(config, params)

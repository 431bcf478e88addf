"""Write a model as a Hugging Face folder: ``config.json``, ``model.safetensors``, ``tokenizer.json``."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fisher_jax._support.errors import InputError
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.hf_config import ARCHITECTURES
from fisher_jax.models.optional_packages import optional
from fisher_jax.models.rotary_scaling import linear_scaling, llama3_scaling
from fisher_jax.models.tokenizer import Tokenizer
from fisher_jax.models.weight_names import GPT2_NAMES, HF_NAMES, flatten

__all__ = ["hf_settings", "hf_tensors", "save"]


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
    tensors = hf_tensors(config, params)
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
    """The content of a ``config.json`` for this decoder; ``settings`` win."""
    given = dict(settings or {})
    if config.logit_soft_cap is not None:
        raise InputError(
            "a model with a soft cap on its logits has no counterpart among the families that are written"
        )
    kind = family(config)
    shared = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "gpt2":
        return (
            shared
            | {
                "n_embd": config.width,
                "n_layer": config.num_layers,
                "n_head": config.num_heads,
                "n_inner": config.mlp_size,
                "n_positions": config.max_positions,
                "layer_norm_epsilon": config.norm_eps,
                "activation_function": "gelu_new",
            }
            | given
        )
    attention_bias = {} if kind == "qwen2" else {"attention_bias": config.qkv_bias}
    scaled = {"rope_scaling", "rope_parameters"} & given.keys()
    rotary = {"rope_theta": config.rope_base} if scaled else rotary_settings(config)
    return shared | attention_bias | rotary | {
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        **({"mlp_bias": config.mlp_bias} if kind == "llama" else {}),
    } | given  # fmt: skip


def family(config: DecoderConfig) -> str:
    """The family that computes what this decoder does; Mistral is Llama within its window."""
    style = (config.norm, config.positions, config.activation, config.gated)
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    plain = config.num_kv_heads * config.head_size == config.width and not config.qk_norm
    if style == ("layer", "learned", "gelu_tanh", False) and all(biases) and plain:
        return "gpt2"
    if style == ("rms", "rotary", "silu", True):
        if config.qk_norm and config.qkv_bias == config.out_bias and not config.mlp_bias:
            return "qwen3"
        if not config.qk_norm and config.qkv_bias == config.out_bias:
            return "llama"
        if not config.qk_norm and biases == (True, False, False):
            return "qwen2"
    raise InputError(f"no family that is written computes this decoder: {config.to_json()}")


def rotary_settings(config: DecoderConfig) -> dict[str, Any]:
    base, divisors = {"rope_theta": config.rope_base}, config.rope_divisors
    if divisors is None:
        return base
    scaling = linear_scaling(divisors) or llama3_scaling(divisors, config.rope_base)
    if scaling is None:
        raise InputError(
            "this model divides its rotary frequencies neither by one number nor as Llama 3 does; no config.json of "
            "Hugging Face's families can say that, so nothing was written; a rope_scaling in settings= would win"
        )
    return base | {"rope_scaling": scaling}


def hf_tensors(config: DecoderConfig, params: Any) -> dict[str, np.ndarray]:
    """The weights under Hugging Face's names and in their orientation, one tensor for each layer."""
    gpt2 = family(config) == "gpt2"
    names, flat = (GPT2_NAMES if gpt2 else HF_NAMES), flatten(params)
    tensors: dict[str, np.ndarray] = {}
    for path in [path for path in names if path in flat]:  # in the order of the names, q before k before v
        values = np.asarray(flat[path])
        for i, tensor in enumerate(values if path.startswith("layers/") else values[None]):
            name = names[path].format(i)
            turned = tensor.T if path.endswith("/kernel") and not gpt2 else tensor
            # GPT-2 keeps q, k and v side by side in one tensor.
            tensors[name] = np.concatenate([tensors[name], turned], axis=-1) if name in tensors else turned
    if left := flat.keys() - names.keys():
        raise InputError(f"no name is known for {', '.join(sorted(left))}")
    prefix = "transformer." if gpt2 else ""
    return {
        (name if name == "lm_head.weight" else prefix + name): np.ascontiguousarray(tensor)
        for name, tensor in tensors.items()
    }

"""Settings that many families share, read and written."""

from collections.abc import Callable
from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax.models.checked_settings import MOST_HEAD, MOST_INDEX, MOST_LAYERS, Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.number_ranges import EPSILON, MULTIPLIER

__all__ = [
    "ACTIVATIONS", "activation", "epsilon", "inverse", "or_none", "share", "sizes", "soft_cap", "window",
    "window_layers", "windows", "write_activation", "write_layer_types", "write_sizes",
]  # fmt: skip

# By the names of transformers; the first name of each is written.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip


def sizes(read: Settings, *, num_kv_heads: int | None = None, head_size: int | None = None) -> dict[str, Any]:
    """The sizes of a decoder under Llama's names.

    ``num_kv_heads`` and ``head_size`` are what transformers takes where the settings are absent (``None``: it follows
    from the query heads). A ``num_key_value_heads`` of ``null`` is not absent: it stands for the query heads.
    """
    num_heads, width = read.size("num_attention_heads"), read.size("hidden_size")
    num_layers = read.integer("num_hidden_layers", 1, MOST_LAYERS)
    head_size = read.integer("head_dim", 1, MOST_HEAD, head_size) or share(
        read, "hidden_size", width, "num_attention_heads", num_heads
    )
    default = num_heads if "num_key_value_heads" in read.values else num_kv_heads or num_heads
    return {
        "vocab_size": read.size("vocab_size"),
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": read.size("num_key_value_heads", default),
        "head_size": head_size,
        "mlp_size": read.size("intermediate_size"),
        "max_positions": read.integer("max_position_embeddings", 1, MOST_INDEX),
    }


def write_sizes(config: DecoderConfig) -> dict[str, Any]:
    """The settings that `sizes` reads."""
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_positions,
    }


def share(read: Settings, of: str, width: int, among: str, num_heads: int) -> int:
    if width % num_heads:
        raise InputError(f"{read.label} has {of} {width}, which is not a multiple of its {among} {num_heads}")
    return width // num_heads


def epsilon(read: Settings, key: str = "rms_norm_eps", default: float = 1e-6) -> float:
    return read.number(key, default, **EPSILON)


def activation(read: Settings, key: str, default: str) -> str:
    """The decoder's name of an activation."""
    read.must(key, default, *(name for name in ACTIVATIONS if name != default))
    return ACTIVATIONS[read.text(key, default)]


def write_activation(config: DecoderConfig, default: str = "silu") -> str:
    """By the name that the family uses, where that is the activation."""
    return next(name for name in (default, *ACTIVATIONS) if ACTIVATIONS[name] == config.activation)


def or_none(read: Settings, key: str, default: Any, take: Callable[..., Any], **limits: float) -> Any:
    """A setting whose ``null`` means none, and is not the same as its absence: ``take(key, default=...)``."""
    return take(key, default=None if key in read.values else default, **limits)


def window(read: Settings, default: int | None = None) -> int | None:
    """``sliding_window``, where ``null`` means none."""
    return or_none(read, "sliding_window", default, read.integer, low=1, high=MOST_INDEX)


def soft_cap(read: Settings, key: str, default: float | None) -> float | None:
    return or_none(read, key, default, read.number, **MULTIPLIER)


def inverse(number: float) -> float:
    """``1 / number`` as a file would say it, such that its own inverse is the number again where possible."""
    neat = round(1 / number, 10)
    return neat if neat and 1 / neat == number else 1 / number


def window_layers(read: Settings, num_layers: int, default: list[bool]) -> tuple[bool, ...]:
    """Which layers have a window, by ``layer_types`` where there are any."""
    types = read.texts("layer_types", None)
    if types is None:
        return tuple(default)
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        read.refuse("layer_types", f"{num_layers} times full_attention or sliding_attention")
    return tuple(kind == "sliding_attention" for kind in types)


def windows(size: int | None, layers: tuple[bool, ...], max_positions: int) -> dict[str, Any]:
    """The decoder's windows; one that no layer has, or no row exceeds, is none."""
    if size is None or not any(layers) or size >= max_positions:
        return {}
    return {"window": size, "window_layers": None if all(layers) else layers}


def write_layer_types(config: DecoderConfig) -> list[str]:
    """``layer_types`` of the decoder's windows."""
    layers = config.window_layers or (config.window is not None,) * config.num_layers
    return ["sliding_attention" if local else "full_attention" for local in layers]

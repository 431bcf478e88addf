"""SmolLM3: Llama, of whose layers some do not turn queries and keys."""

from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout
from fisher_jax.models.families.llama import llama_switches, write_switches
from fisher_jax.models.families.reading import sizes, window, window_layers, windows, write_layer_types

__all__ = ["SMOLLM3"]


def read_smollm3(read: Settings, tied: bool) -> DecoderConfig:
    size = sizes(read, num_kv_heads=4)
    bias, turned = read.boolean("attention_bias", False), rope_layers(read, size["num_layers"])
    return DecoderConfig(
        **size,
        **llama_switches(read, size, base=2e6),
        **local(read, turned, size["max_positions"]),
        rope_layers=None if all(turned) else turned,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=read.boolean("mlp_bias", False),
        tied=tied,
    )


def rope_layers(read: Settings, num_layers: int) -> tuple[bool, ...]:
    """``no_rope_layers`` is 1 where a layer turns, else every so many layers one does not."""

    def fits(x: Any) -> bool:
        return isinstance(x, list) and len(x) >= num_layers and all(type(n) is int and n in (0, 1) for n in x)

    turned = read.checked("no_rope_layers", None, fits, f"a list of at least {num_layers} zeros and ones")
    every = read.size("no_rope_layer_interval", 4)
    if turned is None:
        return tuple((i + 1) % every != 0 for i in range(num_layers))
    return tuple(n == 1 for n in turned[:num_layers])


def local(read: Settings, turned: tuple[bool, ...], max_positions: int) -> dict[str, Any]:
    """Windows, where they are switched on; without ``layer_types`` in the layers that do not turn."""
    used, size = read.boolean("use_sliding_window", False), window(read)
    layers = window_layers(read, len(turned), [used and not turns for turns in turned])
    if any(layers) and not (used and size):
        raise InputError(f"{read.label} has layers with a window, but no sliding_window with use_sliding_window")
    return windows(size, layers, max_positions)


def write_smollm3(config: DecoderConfig) -> dict[str, Any]:
    return write_switches(config) | {
        "no_rope_layers": [int(turns) for turns in config.rope_layers or (True,) * config.num_layers],
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": write_layer_types(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


SMOLLM3 = Family(
    kind="smollm3",
    architecture="SmolLM3ForCausalLM",
    read=read_smollm3,
    write=write_smollm3,
    layout=Layout(names=LLAMA_NAMES),
    tied=True,
)

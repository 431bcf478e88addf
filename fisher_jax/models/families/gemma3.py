"""Gemma 3 (text): Gemma 2 with norms of queries and keys, and a rotary base of its own in layers with a window."""

from typing import Any

from fisher_jax.models.checked_settings import Settings
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.gemma import AROUND_NAMES, gemma_switches, query_scale, write_gemma2
from fisher_jax.models.families.layout import Layout
from fisher_jax.models.families.reading import sizes, soft_cap, window, window_layers
from fisher_jax.models.families.rotary import scaled, written_scaling
from fisher_jax.models.number_ranges import ROPE_BASE

__all__ = ["GEMMA3"]

GLOBAL, LOCAL = "full_attention", "sliding_attention"


def read_gemma3(read: Settings, tied: bool) -> DecoderConfig:
    read.must("hidden_activation", "gelu_pytorch_tanh")
    size = sizes(read, num_kv_heads=4, head_size=256)
    every, number = read.size("sliding_window_pattern", 6), size["num_layers"]
    layers = window_layers(read, number, [(i + 1) % every != 0 for i in range(number)])
    return DecoderConfig(
        **size,
        **gemma_switches(read, size),
        **tables(read, size, layers),
        attention_scale=query_scale(read, size["head_size"]),
        attention_soft_cap=soft_cap(read, "attn_logit_softcapping", None),
        logit_soft_cap=soft_cap(read, "final_logit_softcapping", None),
        norm_placement="around",
        qk_norm=True,
        tied=tied,
    )


def tables(read: Settings, size: dict[str, Any], layers: tuple[bool, ...]) -> dict[str, Any]:
    """Windows and rotary positions: ``rope_parameters`` by kind of layer (transformers 5), or Gemma's own names."""
    nested = read.inner("rope_parameters")
    if nested is None:
        base, local = (
            read.number("rope_theta", 1e6, **ROPE_BASE),
            read.number("rope_local_base_freq", 1e4, **ROPE_BASE),
        )
        main = read.inner("rope_scaling") or Settings({}, read.label)
    else:
        if not nested.values.keys() & {GLOBAL, LOCAL}:
            read.refuse("rope_parameters", f"settings of {GLOBAL} and {LOCAL}")
        main, other = (nested.inner(kind) or Settings({}, nested.label) for kind in (GLOBAL, LOCAL))
        base = main.number("rope_theta", 1e6, **ROPE_BASE)
        local = other.number("rope_theta", 1e4, **ROPE_BASE)
        other.must("rope_type", "default")
    turns = {"rope_base": base, **scaled(read, main, base, size["head_size"], size["max_positions"])}
    width = window(read, 4096)
    if not any(layers) or width is None:
        return turns
    return turns | {"local_rope_base": local, "window": width, "window_layers": None if all(layers) else layers}


def write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    main = written_scaling(config).get("rope_scaling", {"rope_type": "default"})
    rope = {
        GLOBAL: main | {"rope_theta": config.rope_base},
        LOCAL: {"rope_type": "default", "rope_theta": config.local_rope_base or 1e4},
    }
    shared = {k: v for k, v in write_gemma2(config).items() if k not in ("rope_theta", "rope_scaling", "hidden_act")}
    return shared | {"rope_parameters": rope}


GEMMA3 = Family(
    kind="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=read_gemma3,
    write=write_gemma3,
    layout=Layout(names=AROUND_NAMES),
    tied=True,
)

"""Architectures of GGUF files: names and order of tensors, and what the metadata say beside the sizes.

llama.cpp fixes some switches in its program, such as which layers have a window; they are fixed here too.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from fisher_jax.models.checked_settings import MOST_INDEX, Settings
from fisher_jax.models.families.layout import KERNELS, NORMS, Layout, each
from fisher_jax.models.families.reading import windows
from fisher_jax.models.number_ranges import MULTIPLIER, ROPE_BASE

__all__ = ["ARCHITECTURES", "Architecture"]

NAMES = {
    "embedding": "token_embd.weight",
    "head": "output.weight",
    **each(NORMS, {
        "final_norm": "output_norm",
        "layers/attention_norm": "blk.{}.attn_norm",
        "layers/attention_post_norm": "blk.{}.post_attention_norm",
        "layers/attention/q_norm": "blk.{}.attn_q_norm",
        "layers/attention/k_norm": "blk.{}.attn_k_norm",
        "layers/mlp_norm": "blk.{}.ffn_norm",
        "layers/mlp_post_norm": "blk.{}.post_ffw_norm",
    }),
    **each(KERNELS, {
        "layers/attention/q": "blk.{}.attn_q",
        "layers/attention/k": "blk.{}.attn_k",
        "layers/attention/v": "blk.{}.attn_v",
        "layers/attention/o": "blk.{}.attn_output",
        "layers/mlp/gate": "blk.{}.ffn_gate",
        "layers/mlp/up": "blk.{}.ffn_up",
        "layers/mlp/down": "blk.{}.ffn_down",
        # Of experts a tensor holds those of a layer.
        "layers/mlp/router": "blk.{}.ffn_gate_inp",
        "layers/mlp/experts/gate": "blk.{}.ffn_gate_exps",
        "layers/mlp/experts/up": "blk.{}.ffn_up_exps",
        "layers/mlp/experts/down": "blk.{}.ffn_down_exps",
    }),
}  # fmt: skip
FUSED = NAMES | each(KERNELS, {f"layers/attention/{part}": "blk.{}.attn_qkv" for part in "qkv"})
Sizes = Mapping[str, Any]


def same_window(read: Settings, size: Sizes) -> dict[str, Any]:
    """One in every layer; zero is none."""
    window = read.integer("attention.sliding_window", 0, MOST_INDEX, 0)
    return windows(window or None, (True,) * size["num_layers"], size["max_positions"])


def gemma(read: Settings, size: Sizes) -> dict[str, Any]:
    # Only the largest ones scale by the width of a head in the residual stream.
    largest = size["num_layers"] in (46, 62)
    scale = (size["width"] / size["num_heads"]) ** -0.5
    return {
        "norm_plus_one": True,
        "norm_placement": "around",
        "embedding_multiplier": math.sqrt(size["width"]),
        "activation": "gelu_tanh",
        "attention_scale": scale if largest and scale != size["head_size"] ** -0.5 else None,
        "attention_soft_cap": read.number("attn_logit_softcapping", None, **MULTIPLIER),
        "logit_soft_cap": read.number("final_logit_softcapping", None, **MULTIPLIER),
    }


def gemma2(read: Settings, size: Sizes) -> dict[str, Any]:
    window = read.integer("attention.sliding_window", 1, MOST_INDEX, 4096)
    local = tuple(i % 2 == 0 for i in range(size["num_layers"]))
    found = gemma(read, size) | windows(window, local, size["max_positions"])
    return {**found, "attention_soft_cap": found["attention_soft_cap"] or 50.0} | {
        "logit_soft_cap": found["logit_soft_cap"] or 30.0
    }


def gemma3(read: Settings, size: Sizes) -> dict[str, Any]:
    window = read.integer("attention.sliding_window", 0, MOST_INDEX, 0)
    local = tuple((i + 1) % 6 != 0 for i in range(size["num_layers"]))
    turns = {
        "window": window,
        "window_layers": None if all(local) else local,
        "local_rope_base": read.number("rope.freq_base_swa", 10_000.0, **ROPE_BASE),
    }
    return gemma(read, size) | (turns if window else {})


def olmo2(read: Settings, size: Sizes) -> dict[str, Any]:
    read.must("attention.sliding_window", 0)  # OLMo 3 is stored as OLMo 2 with windows
    return {"norm_placement": "after", "qk_norm_scope": "width"}


def smollm3(read: Settings, size: Sizes) -> dict[str, Any]:
    turned = tuple((i + 1) % 4 != 0 for i in range(size["num_layers"]))
    return {"rope_layers": None if all(turned) else turned}


def granite(read: Settings, size: Sizes) -> dict[str, Any]:
    scale = read.number("attention.scale", None, **MULTIPLIER)
    return {
        "embedding_multiplier": read.number("embedding_scale", 1.0, **MULTIPLIER),
        "residual_multiplier": read.number("residual_scale", 1.0, **MULTIPLIER),
        "logit_multiplier": 1.0 / read.number("logit_scale", 1.0, **MULTIPLIER),
        "attention_scale": None if scale == size["head_size"] ** -0.5 else scale,
    }


def gpt_neox(read: Settings, size: Sizes) -> dict[str, Any]:
    parallel = read.boolean("use_parallel_residual", True)
    return {
        "norm": "layer",
        "residual": "parallel" if parallel else "sequential",
        "activation": "gelu",
        "gated": False,
    }


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How the files of one ``general.architecture`` are read.

    Attributes:
        layout: names and order of tensors.
        switches: ``(metadata, sizes)`` to what the decoder has beside sizes, biases and rotary positions.
        keys: the metadata that ``switches`` and ``part`` read.
        epsilon: the metadata of the norms' epsilon.
        rope_base: what it is where the metadata do not say.
        part: a part of each head may turn.
        plus_one: scales of norms are stored with the one that is added to them.
    """

    layout: Layout
    switches: Callable[[Settings, Sizes], dict[str, Any]] = same_window
    keys: tuple[str, ...] = ("attention.sliding_window",)
    epsilon: str = "attention.layer_norm_rms_epsilon"
    rope_base: float = 10_000.0
    part: bool = False
    plus_one: bool = False


PLAIN, PAIRS = Layout(names=NAMES), Layout(names=NAMES, interleaved=True)
CAPS = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
ARCHITECTURES = {
    "llama": Architecture(PAIRS),
    "qwen2": Architecture(PLAIN),
    "qwen3": Architecture(PLAIN),
    "qwen3moe": Architecture(PLAIN),
    "gemma2": Architecture(PLAIN, gemma2, CAPS, plus_one=True),
    "gemma3": Architecture(PLAIN, gemma3, (*CAPS, "rope.freq_base_swa"), rope_base=1e6, plus_one=True),
    "olmo2": Architecture(PLAIN, olmo2),
    "phi3": Architecture(
        Layout(names=FUSED | each(KERNELS, {f"layers/mlp/{part}": "blk.{}.ffn_up" for part in ("gate", "up")})),
        keys=("attention.sliding_window", "rope.scaling.attn_factor"),
        part=True,
    ),
    "smollm3": Architecture(PAIRS, smollm3, ()),
    "granite": Architecture(PAIRS, granite, ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")),
    "gptneox": Architecture(
        Layout(names=FUSED),
        gpt_neox,
        ("use_parallel_residual",),
        epsilon="attention.layer_norm_epsilon",
        part=True,
    ),
}

"""GGUF files: configuration and weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.checked_settings import MOST_EXPERTS, MOST_HEAD, MOST_INDEX, MOST_LAYERS, REQUIRED, Settings
from fisher_jax.models.config import DecoderConfig, linear_divisors
from fisher_jax.models.families.gguf_layouts import GGUF_LAYOUTS
from fisher_jax.models.families.reading import windows
from fisher_jax.models.gguf_header import read_header
from fisher_jax.models.number_ranges import EPSILON, ROPE_BASE, ROPE_FACTOR
from fisher_jax.models.optional_packages import optional
from fisher_jax.models.weight_names import assemble, check_entries

__all__ = ["GgufFile"]

# What may stand under "llama." without changing the computation, beside what `GgufFile.config` reads.
READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "expert_count", "expert_used_count", "expert_feed_forward_length",
}  # fmt: skip
FLOATS = {
    kind: np.dtype(dtype)
    for kind, dtype in {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}.items()
}
HARMLESS = {"rope.scaling.original_context_length", "rope.scaling.finetuned"}


class GgufFile:
    """An open GGUF file; ``settings`` are its metadata, ``read(tensor)`` reads on demand.

    Raises ``InputError`` for files that are not GGUF, that are cut off or contradict themselves, or whose
    architecture, rotary scaling or tensor types are not supported.
    """

    def __init__(self, path: Path):
        gguf = optional("gguf", f"reading {path.name}")
        self.path, self.label = path, path.name
        self.kinds, self.dequantize = gguf.GGMLQuantizationType, gguf.quants.dequantize
        sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
        header = read_header(path, sizes)
        self.tensors = header.tensors
        self.shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        self.names = frozenset(self.tensors)
        self.settings = GgufSettings(header.metadata, self.label)
        self.architecture = self.settings.text("general.architecture")
        if self.architecture not in GGUF_LAYOUTS:
            raise InputError(
                f"{path.name} has the architecture {shown(self.architecture)}; "
                f"supported from GGUF files: {', '.join(GGUF_LAYOUTS)}"
            )
        if self.settings.integer("split.count", 0, MOST_INDEX, 1) > 1:
            raise InputError(f"{path.name} is one part of a split GGUF file; join the parts first")

    def config(self) -> DecoderConfig:
        """The decoder's shape; an ``InputError`` for entries that would change it in unknown ways."""
        prefix = f"{self.architecture}."
        own = {k.removeprefix(prefix): v for k, v in self.settings.values.items() if k.startswith(prefix)}
        if unknown := own.keys() - READ - HARMLESS:
            raise InputError(
                f"{self.label} has settings that are not supported: {shown(', '.join(sorted(unknown)))[1:-1]}"
            )
        read = GgufSettings(own, self.label)
        width, num_heads = read.size("embedding_length"), read.size("attention.head_count")
        head_size = read.integer("attention.key_length", 1, MOST_HEAD, None) or share(self.label, width, num_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (found := read.size(key, head_size)) != head_size:
                raise InputError(f"{self.label} has {key} {found}, but only the head size {head_size} is supported")
        max_positions = read.integer("context_length", 1, MOST_INDEX)
        num_layers = read.integer("block_count", 1, MOST_LAYERS)
        window = read.integer("attention.sliding_window", 0, MOST_INDEX, 0)
        bias = {part: f"blk.0.{part}.bias" in self.names for part in ("attn_q", "attn_output", "ffn_down")}
        config = DecoderConfig(
            vocab_size=read.size("vocab_size", self.shape("token_embd.weight")[0]),
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=read.size("attention.head_count_kv", num_heads),
            head_size=head_size,
            **mlp(read),
            max_positions=max_positions,
            **windows(window or None, (True,) * num_layers, max_positions),
            norm_eps=read.number("attention.layer_norm_rms_epsilon", **EPSILON),
            rope_base=read.number("rope.freq_base", 10_000.0, **ROPE_BASE),
            rope_divisors=self.rope_divisors(read, head_size),
            qkv_bias=bias["attn_q"],
            out_bias=bias["attn_output"],
            mlp_bias=bias["ffn_down"],
            qk_norm="blk.0.attn_q_norm.weight" in self.names,
            tied="output.weight" not in self.names,
        )
        check_entries(self, config)
        return config

    def rope_divisors(self, read: Settings, head_size: int) -> tuple[float, ...] | None:
        """Linear scaling from the metadata times Llama 3's divisors, which GGUF keeps as a tensor."""
        kind = read.text("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise InputError(f"{self.label} has rotary scaling {shown(kind)}; supported: none, linear and llama3")
        factor = read.number("rope.scaling.factor", **ROPE_FACTOR) if kind == "linear" else 1.0
        if "rope_freqs.weight" not in self.names:
            return None if kind == "none" else linear_divisors(factor, head_size)
        if (shape := self.shapes["rope_freqs.weight"]) != (head_size // 2,):
            raise InputError(
                f"rope_freqs.weight in {self.label} has the sizes {list(shape)}, but heads of {head_size} have "
                f"{head_size // 2} frequencies"
            )
        divisors = self.read("rope_freqs.weight")
        if not np.all(np.isfinite(divisors) & (divisors > 0)):
            raise InputError(f"rope_freqs.weight in {self.label} has values that are not positive; fetch it again")
        return tuple(float(x) * factor for x in divisors)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise InputError(f"{self.label} lacks the tensor {name}")
        return self.shapes[name]

    def read(self, name: str) -> np.ndarray:
        """A tensor as numbers, dequantised to float32."""
        return self.values(name, self.stored(name))

    def stored(self, name: str) -> np.ndarray:
        """A tensor as it lies in the file: numbers, or the bytes of each row."""
        tensor = self.tensors[name]
        try:
            raw = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.size,)).view(np.ndarray)
        except ValueError as error:
            raise InputError(
                f"{name} in {self.label} ends early; the file became shorter while it was read"
            ) from error
        dtype = FLOATS.get(self.kinds(tensor.kind).name)
        return raw.reshape(*tensor.shape[:-1], -1) if dtype is None else raw.view(dtype).reshape(tensor.shape)

    def values(self, name: str, rows: np.ndarray) -> np.ndarray:
        if rows.dtype != np.uint8:
            return rows
        kind = self.kinds(self.tensors[name].kind)
        try:
            return self.dequantize(rows, kind)
        except NotImplementedError as error:
            raise InputError(
                f"{shown(name)} in {self.label} is stored as {kind.name}, which cannot be read"
            ) from error

    def params(self, config: DecoderConfig, dtype) -> dict:
        """The decoder's parameters as NumPy arrays, layers stacked."""

        layout = GGUF_LAYOUTS[self.architecture]

        def select(path: str, stored: np.ndarray) -> np.ndarray:
            return layout.selected(config, path, stored)

        return assemble(self, config, layout.names, dtype, select, ignored={"rope_freqs.weight"})


class GgufSettings(Settings):
    """Metadata, in which a whole number is never a float: its type is in the file."""

    def __init__(self, values: Mapping[str, Any], label: str):
        super().__init__(values, label)

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        if isinstance(self.values.get(key), list | np.ndarray) and not key.startswith("tokenizer."):
            raise InputError(f"{self.label} has a different {key} per layer, which is not supported")
        if key not in self.values and default is REQUIRED:
            raise InputError(f"{self.label} lacks the metadata entry {key!r}")
        return super().get(key, default)

    def number(self, key: str, default: Any = REQUIRED, **limits: float) -> Any:
        if isinstance(self.values.get(key), int):
            self.refuse(key, "stored as a float")
        return super().number(key, default, **limits)


def mlp(read: Settings) -> dict[str, Any]:
    """The size of an MLP, and how many of them there are; the weights of experts add up to one in llama.cpp."""
    size = read.size("feed_forward_length")
    if not (number := read.integer("expert_count", 0, MOST_EXPERTS, 0)):
        return {"mlp_size": size}
    return {
        "mlp_size": read.size("expert_feed_forward_length", size),
        "num_experts": number,
        "experts_per_token": read.integer("expert_used_count", 1, MOST_EXPERTS),
    }


def share(label: str, width: int, num_heads: int) -> int:
    if width % num_heads:
        raise InputError(f"{label} has a width of {width:,}, which its {num_heads:,} heads cannot share evenly")
    return width // num_heads

"""GGUF files: configuration and weights."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.checked_settings import MOST_EXPERTS, MOST_HEAD, MOST_INDEX, MOST_LAYERS, REQUIRED, Settings
from fisher_jax.models.config import DecoderConfig, linear_divisors, yarn_divisors
from fisher_jax.models.families.gguf_architectures import ARCHITECTURES
from fisher_jax.models.gguf_parts import parts_of
from fisher_jax.models.number_ranges import EPSILON, ROPE_BASE, ROPE_FACTOR, ROPE_PART
from fisher_jax.models.optional_packages import optional
from fisher_jax.models.weight_names import assemble, check_entries
from fisher_jax.models.weight_rows import Rows

__all__ = ["GgufFile"]

# What `GgufFile.config` reads of every architecture, and what may stand beside it without changing the computation.
READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "expert_count",
    "expert_used_count", "expert_feed_forward_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor",
}  # fmt: skip
FLOATS = {
    kind: np.dtype(dtype)
    for kind, dtype in {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}.items()
}
BIASED = ("attention/q", "attention/o", "mlp/down")
FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
HARMLESS = {"rope.scaling.original_context_length", "rope.scaling.finetuned"}


class GgufFile:
    """An open GGUF file, whole or in parts; ``settings`` are its metadata, tensors are read on demand.

    Raises ``InputError`` for files that are not GGUF, that are cut off or contradict themselves, or whose
    architecture, rotary scaling or tensor types are not supported.
    """

    def __init__(self, path: Path):
        gguf = optional("gguf", f"reading {path.name}")
        self.path, self.label = path, path.name
        self.kinds, self.dequantize = gguf.GGMLQuantizationType, gguf.quants.dequantize
        self.units = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
        self.parts = parts_of(path, self.units)
        self.tensors = {name: tensor for header in self.parts.values() for name, tensor in header.tensors.items()}
        self.places = {name: part for part, header in self.parts.items() for name in header.tensors}
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.names = frozenset(self.tensors)
        self.settings = GgufSettings(next(iter(self.parts.values())).metadata, self.label)
        self.architecture = self.settings.text("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{path.name} has the architecture {shown(self.architecture)}; "
                f"supported from GGUF files: {', '.join(ARCHITECTURES)}"
            )

    def config(self) -> DecoderConfig:
        """The decoder's shape; an ``InputError`` for entries that would change it in unknown ways."""
        prefix = f"{self.architecture}."
        own = {k.removeprefix(prefix): v for k, v in self.settings.values.items() if k.startswith(prefix)}
        kind = ARCHITECTURES[self.architecture]
        if unknown := own.keys() - READ - HARMLESS - {kind.epsilon, *kind.keys}:
            raise InputError(
                f"{self.label} has settings that are not supported: {shown(', '.join(sorted(unknown)))[1:-1]}"
            )
        read = GgufSettings(own, self.label)
        width, num_heads = read.size("embedding_length"), read.size("attention.head_count")
        head_size = read.integer("attention.key_length", 1, MOST_HEAD, None) or share(self.label, width, num_heads)
        turned = read.size("rope.dimension_count", head_size)
        for key, found in {
            "attention.value_length": read.size("attention.value_length", head_size),
            **({} if kind.part else {"rope.dimension_count": turned}),
        }.items():
            if found != head_size:
                raise InputError(f"{self.label} has {key} {found}, but only the head size {head_size} is supported")
        sizes = {
            "vocab_size": read.size("vocab_size", self.shape("token_embd.weight")[0]),
            "width": width,
            "num_layers": read.integer("block_count", 1, MOST_LAYERS),
            "num_heads": num_heads,
            "num_kv_heads": read.size("attention.head_count_kv", num_heads),
            "head_size": head_size,
            **mlp(read),
            "max_positions": read.integer("context_length", 1, MOST_INDEX),
        }
        names = kind.layout.names
        bias = {part: names[f"layers/{part}/bias"].format(0) in self.names for part in BIASED}
        config = DecoderConfig(
            **sizes,
            norm_eps=read.number(kind.epsilon, **EPSILON),
            rope_base=read.number("rope.freq_base", kind.rope_base, **ROPE_BASE),
            rope_size=None if turned == head_size else turned,
            **self.divisors(read, turned, sizes["max_positions"]),
            qkv_bias=bias["attention/q"],
            out_bias=bias["attention/o"],
            mlp_bias=bias["mlp/down"],
            qk_norm="blk.0.attn_q_norm.weight" in self.names,
            tied="output.weight" not in self.names,
            **kind.switches(read, sizes),
        )
        check_entries(self, config)
        return config

    def divisors(self, read: Settings, rope_size: int, max_positions: int) -> dict[str, Any]:
        """Linear scaling from the metadata times Llama 3's divisors, which GGUF keeps as a tensor, or those of
        LongRoPE, which it keeps as two."""
        kind = read.text("rope.scaling.type", "none")
        if SHORT in self.names:
            if kind not in ("none", "longrope"):
                raise InputError(f"{self.label} has rotary scaling {shown(kind)} beside {SHORT}")
            original = read.integer("rope.scaling.original_context_length", 1, MOST_INDEX, max_positions)
            short, long = (self.factors(name, rope_size) for name in (SHORT, LONG))
            dual = {} if short == long else {"rope_divisors_long": long, "rope_original_positions": original}
            amplitude = read.number("rope.scaling.attn_factor", 1.0, **ROPE_PART)
            return {"rope_divisors": short, **dual, "rope_amplitude": amplitude}
        if kind == "yarn" and FREQUENCIES not in self.names:
            return self.yarn(read, rope_size, max_positions)
        if kind not in ("none", "linear"):
            beside = f" beside {FREQUENCIES}" if kind == "yarn" else ""
            raise InputError(
                f"{self.label} has rotary scaling {shown(kind)}{beside}; supported: none, linear, llama3 and yarn"
            )
        read.must("rope.scaling.attn_factor", 1.0)
        factor = read.number("rope.scaling.factor", **ROPE_FACTOR) if kind == "linear" else 1.0
        if FREQUENCIES in self.names:
            return {"rope_divisors": tuple(x * factor for x in self.factors(FREQUENCIES, rope_size))}
        return {} if kind == "none" else {"rope_divisors": linear_divisors(factor, rope_size)}

    def yarn(self, read: Settings, rope_size: int, max_positions: int) -> dict[str, Any]:
        """YaRN as llama.cpp computes it: its range is rounded outwards, and its amplitude is
        ``attn_factor * (1 + 0.1 log(factor))``."""
        read.must("rope.scaling.yarn_ext_factor", 1.0)
        factor = read.number("rope.scaling.factor", **ROPE_FACTOR)
        names = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
        amplitude = math.prod(read.number(name, 1.0, **ROPE_PART) for name in names)
        fast, slow = (
            read.number(f"rope.scaling.yarn_beta_{end}", told, **ROPE_PART)
            for end, told in (("fast", 32.0), ("slow", 1.0))
        )
        base = read.number("rope.freq_base", ARCHITECTURES[self.architecture].rope_base, **ROPE_BASE)
        if fast <= slow or base == 1:
            raise InputError(
                f"{self.label} asks for yarn with beta_fast {fast:g}, beta_slow {slow:g} and freq_base {base:g}: the "
                "first must be above the second, and the last above 1"
            )
        original = read.integer("rope.scaling.original_context_length", 1, MOST_INDEX, max_positions)
        return {
            "rope_divisors": yarn_divisors(
                factor=factor, beta_fast=fast, beta_slow=slow, original_positions=original, base=base,
                rope_size=rope_size,
            ),
            "rope_amplitude": amplitude * (1 + 0.1 * math.log(max(factor, 1.0))),
        }  # fmt: skip

    def factors(self, name: str, rope_size: int) -> tuple[float, ...]:
        """A tensor of one positive number for each rotary frequency."""
        if (shape := self.shape(name)) != (rope_size // 2,):
            raise InputError(
                f"{name} in {self.label} has the sizes {list(shape)}, but heads of {rope_size} have "
                f"{rope_size // 2} frequencies"
            )
        found = self.read(name)
        if not np.all(np.isfinite(found) & (found > 0)):
            raise InputError(f"{name} in {self.label} has values that are not positive; fetch it again")
        return tuple(map(float, found))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise InputError(f"{self.label} lacks the tensor {name}")
        return self.shapes[name]

    def kinds_of_matrices(self) -> set[str]:
        """ggml's names of the types that its matrices are stored in."""
        return {self.kinds(tensor.kind).name for tensor in self.tensors.values() if len(tensor.shape) > 1}

    def read(self, name: str) -> np.ndarray:
        """A tensor as numbers, dequantised to float32."""
        return self.values(name, self.stored(name))

    def stored(self, name: str) -> np.ndarray:
        """A tensor as it lies in the file: numbers, or the bytes of each row."""
        tensor = self.tensors[name]
        try:
            raw = np.memmap(self.places[name], np.uint8, "r", tensor.start, (tensor.size,)).view(np.ndarray)
        except ValueError as error:
            raise InputError(
                f"{name} in {self.label} ends early; the file became shorter while it was read"
            ) from error
        dtype = FLOATS.get(self.kinds(tensor.kind).name)
        return raw.reshape(*tensor.shape[:-1], -1) if dtype is None else raw.view(dtype).reshape(tensor.shape)

    def values(self, name: str, rows: np.ndarray) -> np.ndarray:
        kind = self.kinds(self.tensors[name].kind)
        try:
            numbers = rows if rows.dtype != np.uint8 else self.dequantize(rows, kind)
        except NotImplementedError as error:
            raise InputError(
                f"{shown(name)} in {self.label} is stored as {kind.name}, which cannot be read"
            ) from error
        if ARCHITECTURES[self.architecture].plus_one and name.endswith("norm.weight"):
            return numbers.astype(np.float32) - np.float32(1)
        return numbers

    def unit(self, name: str) -> tuple[int, int]:
        return self.units[self.tensors[name].kind]

    def params(self, config: DecoderConfig, dtype, shardings: Mapping[str, Sharding] | None = None) -> dict:
        """The decoder's parameters, layers stacked: NumPy arrays, or, with the sharding of every path, on devices."""
        layout = ARCHITECTURES[self.architecture].layout

        def select(path: str, stored: np.ndarray) -> Rows:
            return layout.selected(config, path, stored)

        used = {SHORT, LONG} if SHORT in self.names else {FREQUENCIES}
        return assemble(self, config, layout.names, dtype, select, used, shardings)


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

"""GGUF files: configuration and weights."""

from pathlib import Path
from typing import Any

import numpy as np

from fisher_jax.errors import InputError
from fisher_jax.models.config import DecoderConfig, linear_divisors
from fisher_jax.models.layout import GGUF_NAMES, assemble, undo_interleaving
from fisher_jax.models.optional import optional

__all__ = ["GgufFile"]

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# What may stand under "llama." without changing the computation, beside what `GgufFile.config` reads.
READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "expert_count", "expert_used_count",
}  # fmt: skip
HARMLESS = {"rope.scaling.original_context_length", "rope.scaling.finetuned"}


class GgufFile:
    """An open GGUF file; ``metadata(key)`` and ``read(tensor)`` are read on demand.

    Raises ``InputError`` for files that are not GGUF, that are cut off, or whose architecture, rotary scaling
    or tensor types are not supported.
    """

    def __init__(self, path: Path):
        gguf = optional("gguf", f"reading {path.name}")
        self.label = path.name
        with path.open("rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                raise InputError(f"{path} is not a GGUF file: it begins with {magic!r} instead of b'GGUF'")
        try:
            self.reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is cut off or damaged ({error}); fetch the file again") from error
        self.dequantize = gguf.quants.dequantize
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.names = frozenset(self.tensors)
        self.architecture = self.metadata("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{path.name} has the architecture {self.architecture!r}; "
                f"supported from GGUF files: {', '.join(ARCHITECTURES)}"
            )
        if self.metadata("split.count", 1) > 1:
            raise InputError(f"{path.name} is one part of a split GGUF file; join the parts first")

    def metadata(self, key: str, default: Any = ...) -> Any:
        """A metadata value; without a default, an ``InputError`` where the file has none."""
        field = self.reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is ...:
            raise InputError(f"{self.label} lacks the metadata entry {key!r}")
        return default

    def number(self, key: str, default: Any = ...) -> Any:
        """A number under the architecture's own prefix, floats as their shortest decimal (1e-05)."""
        value = self.metadata(f"{self.architecture}.{key}", default)
        if isinstance(value, list):
            raise InputError(f"{self.label} has a different {key} per layer, which is not supported")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def config(self) -> DecoderConfig:
        """The decoder's shape; an ``InputError`` for entries that would change it in unknown ways."""
        prefix = f"{self.architecture}."
        keys = {key.removeprefix(prefix) for key in self.reader.fields if key.startswith(prefix)}
        if unknown := keys - READ - HARMLESS:
            raise InputError(f"{self.label} has settings that are not supported: {', '.join(sorted(unknown))}")
        if self.number("expert_count", 0):
            raise InputError(f"{self.label} is a mixture of experts, which is not supported")
        width, num_heads = self.number("embedding_length"), self.number("attention.head_count")
        head_size = self.number("attention.key_length", width // num_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (found := self.number(key, head_size)) != head_size:
                raise InputError(f"{self.label} has {key} {found}, but only the head size {head_size} is supported")
        max_positions = self.number("context_length")
        bias = {part: f"blk.0.{part}.bias" in self.names for part in ("attn_q", "attn_output", "ffn_down")}
        return DecoderConfig(
            vocab_size=self.number("vocab_size", int(self.shape("token_embd.weight")[0])),
            width=width,
            num_layers=self.number("block_count"),
            num_heads=num_heads,
            num_kv_heads=self.number("attention.head_count_kv", num_heads),
            head_size=head_size,
            mlp_size=self.number("feed_forward_length"),
            max_positions=min(max_positions, self.number("attention.sliding_window", 0) or max_positions),
            norm_eps=self.number("attention.layer_norm_rms_epsilon"),
            rope_base=self.number("rope.freq_base", 10_000.0),
            rope_divisors=self.rope_divisors(head_size),
            qkv_bias=bias["attn_q"],
            out_bias=bias["attn_output"],
            mlp_bias=bias["ffn_down"],
            qk_norm="blk.0.attn_q_norm.weight" in self.names,
            tied="output.weight" not in self.names,
        )

    def rope_divisors(self, head_size: int) -> tuple[float, ...] | None:
        """Linear scaling from the metadata times Llama 3's divisors, which GGUF keeps as a tensor."""
        kind = self.number("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise InputError(f"{self.label} has rotary scaling {kind!r}; supported: none, linear and llama3")
        divisors = None
        if kind == "linear":
            divisors = linear_divisors(self.number("rope.scaling.factor"), head_size)
        if "rope_freqs.weight" in self.names:
            factors = tuple(float(x) for x in self.read("rope_freqs.weight"))
            divisors = factors if divisors is None else tuple(a * b for a, b in zip(factors, divisors, strict=True))
        return divisors

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise InputError(f"{self.label} lacks the tensor {name}")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32, dequantised."""
        tensor = self.tensors[name]
        try:
            values = self.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise InputError(f"{name} in {self.label} is stored as {kind}, which cannot be read") from error
        return values.reshape(self.shape(name))

    def params(self, config: DecoderConfig, dtype) -> dict:
        """The decoder's parameters as NumPy arrays, layers stacked."""

        def orient(path: str, tensor: np.ndarray) -> np.ndarray:
            if self.architecture == "llama" and path.startswith("layers/attention/q/"):
                tensor = undo_interleaving(tensor, config.num_heads)
            if self.architecture == "llama" and path.startswith("layers/attention/k/"):
                tensor = undo_interleaving(tensor, config.num_kv_heads)
            return tensor.T if path.endswith("/kernel") else tensor

        return assemble(self, config, GGUF_NAMES, dtype, orient, ignored={"rope_freqs.weight"})

"""How a family stores parameters: names of tensors, their orientation, what is fused or ordered otherwise."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fisher_jax._support.errors import InputError
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.weight_names import flatten
from fisher_jax.models.weight_rows import Rows

__all__ = ["LLAMA_NAMES", "Layout", "each", "interleave", "undo_interleaving"]

KERNELS, NORMS = {"kernel": "weight", "bias": "bias"}, {"scale": "weight", "bias": "bias"}
# Parts that rotary positions turn, hence ordered by pairs of coordinates.
NORMS_OF_HEADS = ("q_norm", "k_norm")
TURNED = ("q", "k", *NORMS_OF_HEADS)


def each(ends: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Names of tensors by path, from ours and theirs without their ends."""
    return {f"{ours}/{leaf}": f"{theirs}.{end}" for ours, theirs in names.items() for leaf, end in ends.items()}


LLAMA_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    **each(NORMS, {
        "final_norm": "model.norm",
        "layers/attention_norm": "model.layers.{}.input_layernorm",
        "layers/attention/q_norm": "model.layers.{}.self_attn.q_norm",
        "layers/attention/k_norm": "model.layers.{}.self_attn.k_norm",
        "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
    }),
    **each(KERNELS, {
        "layers/attention/q": "model.layers.{}.self_attn.q_proj",
        "layers/attention/k": "model.layers.{}.self_attn.k_proj",
        "layers/attention/v": "model.layers.{}.self_attn.v_proj",
        "layers/attention/o": "model.layers.{}.self_attn.o_proj",
        "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
        "layers/mlp/up": "model.layers.{}.mlp.up_proj",
        "layers/mlp/down": "model.layers.{}.mlp.down_proj",
    }),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """From tensors of files to parameters, and back.

    Attributes:
        names: the tensor of every path that the family may have, with one ``{}`` for each stacked axis (layers).
            Paths of one name are fused: side by side along the outputs, in this order.
        turned: kernels are stored as ``[out, in]``.
        by_head: fused tensors hold the parts of the first head, then those of the second one, and so on.
        interleaved: coordinates ``2 i`` and ``2 i + 1`` of a head turn by one angle, where the decoder has ``i`` and
            ``i + rope_size / 2``.
        prefix: may stand before every name but the head's; it does in what is written.
        buffers: endings of tensors that follow from the configuration, and are not read.
    """

    names: Mapping[str, str]
    turned: bool = True
    by_head: bool = False
    interleaved: bool = False
    prefix: str = ""
    buffers: tuple[str, ...] = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")

    def selected(self, config: DecoderConfig, path: str, tensor: np.ndarray) -> Rows:
        """The rows ``[out, ...]`` of the parameter of one layer in a file's tensor; what does not fit comes back in a
        shape of its own."""
        turn = path.endswith("/kernel") and not self.turned
        if tensor.ndim > 2:  # experts side by side
            return Rows(np.swapaxes(tensor, -1, -2) if turn else tensor)
        rows = tensor.T if turn else tensor
        fused = [other for other in self.names if self.names[other] == self.names[path]]
        turned = self.interleaved and part_of(path) in TURNED
        if turned and part_of(path) in NORMS_OF_HEADS:
            return Rows(in_heads(undo_interleaving, config, path, rows))
        if len(fused) == 1 and not turned:
            return Rows(rows)
        order = np.arange(len(rows))
        if len(fused) > 1:
            order = self.part(config, order, [outputs(config, other) for other in fused], fused.index(path))
        if turned:
            order = in_heads(undo_interleaving, config, path, order)
        return in_order(rows, order)

    def part(self, config: DecoderConfig, rows: np.ndarray, sizes: list[int], index: int) -> np.ndarray:
        """Of a fused tensor, which is refused by its shape where the parts do not fill it."""
        if len(rows) != sum(sizes):
            return rows
        if self.by_head:
            return rows.reshape(config.num_heads, len(sizes), config.head_size)[:, index].reshape(-1)
        start = sum(sizes[:index])
        return rows[start : start + sizes[index]]

    def tensors(self, config: DecoderConfig, params: Any) -> dict[str, np.ndarray]:
        """Every tensor of a file that holds these parameters."""
        flat = flatten(params)
        if left := flat.keys() - self.names.keys():
            raise InputError(f"no name is known for {', '.join(sorted(left))}")
        paths: dict[str, list[str]] = {}  # of every tensor, in the order of the names
        for path in self.names:
            if path in flat:
                paths.setdefault(self.names[path], []).append(path)
        found = {}
        for template, fused in paths.items():
            values = {path: np.asarray(flat[path]) for path in fused}
            for index in places(template, values[fused[0]].shape):
                parts = [self.rows(config, path, values[path][index]) for path in fused]
                rows = parts[0] if len(parts) == 1 else self.joined(config, parts)
                kernel = fused[0].endswith("/kernel")
                name = template.format(*index)
                name = name if template.startswith("lm_head.") else self.prefix + name
                found[name] = np.ascontiguousarray(rows.T if kernel and not self.turned else rows)
        return found

    def rows(self, config: DecoderConfig, path: str, leaf: np.ndarray) -> np.ndarray:
        """A parameter as ``[out, ...]``, in the order of the file."""
        rows = leaf.T if path.endswith("/kernel") else leaf
        return in_heads(interleave, config, path, rows) if self.interleaved and part_of(path) in TURNED else rows

    def joined(self, config: DecoderConfig, parts: list[np.ndarray]) -> np.ndarray:
        if not self.by_head:
            return np.concatenate(parts)
        by_head = [part.reshape(config.num_heads, 1, config.head_size, *part.shape[1:]) for part in parts]
        return np.concatenate(by_head, axis=1).reshape(-1, *parts[0].shape[1:])


def in_order(rows: np.ndarray, order: np.ndarray) -> Rows:
    """Neighbours stay a view of the file."""
    if len(order) and np.all(np.diff(order) == 1):
        return Rows(rows[order[0] : order[-1] + 1])
    return Rows(rows, order)


def places(template: str, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The index of every tensor in a stacked parameter of this shape."""
    return itertools.product(*map(range, shape[: template.count("{}")]))


def part_of(path: str) -> str:
    """``q`` of ``layers/attention/q/kernel``."""
    return path.split("/")[-2] if "/" in path else path


def outputs(config: DecoderConfig, path: str) -> int:
    """Outputs of a kernel that families fuse with others."""
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    return {"q": queries, "k": keys, "v": keys}.get(part_of(path), config.mlp_size)


def in_heads(move: Callable[..., np.ndarray], config: DecoderConfig, path: str, rows: np.ndarray) -> np.ndarray:
    """Rows moved within each head; scales for each head have an axis of heads of their own."""
    units = rows.reshape(-1) if part_of(path) in NORMS_OF_HEADS else rows
    # Rows that the heads cannot share are refused by their shape.
    if len(units) % config.head_size:
        return rows
    return move(units, len(units) // config.head_size, config.rotary_size).reshape(rows.shape)


def undo_interleaving(rows: np.ndarray, num_heads: int, rope_size: int | None = None) -> np.ndarray:
    """Rows of queries or keys from the order ``(0, h/2, 1, h/2 + 1, ...)`` of neighbouring pairs back to the halves.

    The first ``rope_size`` of each head (all by default) move; works for kernels ``[out, in]`` and biases.
    """
    heads = rows.reshape(num_heads, -1, *rows.shape[1:])
    return heads[:, half_split(heads.shape[1], rope_size)].reshape(rows.shape)


def interleave(rows: np.ndarray, num_heads: int, rope_size: int | None = None) -> np.ndarray:
    """The inverse of `undo_interleaving`."""
    heads = rows.reshape(num_heads, -1, *rows.shape[1:])
    return heads[:, np.argsort(half_split(heads.shape[1], rope_size))].reshape(rows.shape)


def half_split(head_size: int, rope_size: int | None) -> np.ndarray:
    turned = head_size if rope_size is None else rope_size
    return np.concatenate([np.arange(0, turned, 2), np.arange(1, turned, 2), np.arange(turned, head_size)])

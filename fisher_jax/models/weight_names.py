"""From the tensors of a weight file to the decoder's parameters: names, orientations, completeness."""

import math
from collections.abc import Callable, Iterable, Set
from typing import Protocol

import jax
import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.functions import abstract_params

__all__ = [
    "GGUF_NAMES", "GPT2_NAMES", "HF_NAMES", "TensorFile", "assemble", "check_entries", "flatten", "undo_interleaving",
    "unflatten",
]  # fmt: skip

KERNELS, NORMS = {"kernel": "weight", "bias": "bias"}, {"scale": "weight", "bias": "bias"}
SCALES = {"scale": "weight"}


def each(ends: dict[str, str], names: dict[str, str]) -> dict[str, str]:
    """Names of tensors by path, from ours and theirs without their ends."""
    return {f"{ours}/{leaf}": f"{theirs}.{end}" for ours, theirs in names.items() for leaf, end in ends.items()}


GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "head": "output.weight",
    **each(SCALES, {
        "final_norm": "output_norm",
        "layers/attention_norm": "blk.{}.attn_norm",
        "layers/attention/q_norm": "blk.{}.attn_q_norm",
        "layers/attention/k_norm": "blk.{}.attn_k_norm",
        "layers/mlp_norm": "blk.{}.ffn_norm",
    }),
    **each(KERNELS, {
        "layers/attention/q": "blk.{}.attn_q",
        "layers/attention/k": "blk.{}.attn_k",
        "layers/attention/v": "blk.{}.attn_v",
        "layers/attention/o": "blk.{}.attn_output",
        "layers/mlp/gate": "blk.{}.ffn_gate",
        "layers/mlp/up": "blk.{}.ffn_up",
        "layers/mlp/down": "blk.{}.ffn_down",
    }),
}  # fmt: skip

HF_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    **each(SCALES, {
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

GPT2_NAMES = {
    "embedding": "wte.weight",
    "positions": "wpe.weight",
    "head": "lm_head.weight",
    **each(NORMS, {"final_norm": "ln_f", "layers/attention_norm": "h.{}.ln_1", "layers/mlp_norm": "h.{}.ln_2"}),
    **each(KERNELS, {
        "layers/attention/q": "h.{}.attn.c_attn",
        "layers/attention/k": "h.{}.attn.c_attn",
        "layers/attention/v": "h.{}.attn.c_attn",
        "layers/attention/o": "h.{}.attn.c_proj",
        "layers/mlp/up": "h.{}.mlp.c_fc",
        "layers/mlp/down": "h.{}.mlp.c_proj",
    }),
}  # fmt: skip


class TensorFile(Protocol):
    """One or several weight files: what is in them, and each tensor as a NumPy array."""

    label: str
    names: frozenset[str]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


def assemble(
    file: TensorFile,
    config: DecoderConfig,
    names: dict[str, str],
    dtype,
    orient: Callable[[str, np.ndarray], np.ndarray],
    ignored: Iterable[str] = (),
):
    """The decoder's parameters as a nested dict of NumPy arrays, layers stacked, cast once to ``dtype``.

    ``names`` maps a parameter path to a tensor name with ``{}`` for the layer; ``orient(path, tensor)``
    turns a file's tensor into the parameter of one layer. Raises ``InputError`` where tensors are
    missing, left over, of another shape than the configuration says, or not finite.
    """
    shapes = flatten(abstract_params(config, dtype))
    sources = {
        path: [names[path].format(i) for i in range(config.num_layers if path.startswith("layers/") else 1)]
        for path in shapes
    }
    wanted = {name for group in sources.values() for name in group}
    if missing := wanted - file.names:
        raise InputError(f"{file.label} lacks {listed(missing)}, which its configuration asks for")
    if unused := file.names - wanted - set(ignored):
        raise InputError(f"{file.label} holds {listed(unused)}, for which its configuration has no use")

    params = {}
    for path, leaf in shapes.items():
        stacked, out = path.startswith("layers/"), None
        shape = leaf.shape[1:] if stacked else leaf.shape
        for i, name in enumerate(sources[path]):
            tensor = file.read(name)
            # Of another rank it cannot even be turned.
            tensor = orient(path, tensor) if tensor.ndim == len(shape) else tensor
            if tensor.shape != shape:
                raise InputError(
                    f"{name} in {file.label} gives {path} the shape {list(tensor.shape)}, "
                    f"but the configuration wants {list(shape)}"
                )
            # Allocated when one tensor has the right shape, for as many as there are names.
            out = np.empty(leaf.shape, leaf.dtype) if out is None else out
            target = out[i] if stacked else out
            with np.errstate(over="ignore"):  # what becomes infinite is refused below
                target[...] = tensor
            check_finite(file, name, target)
        params[path] = out
    return unflatten(params)


def check_entries(file: TensorFile, config: DecoderConfig) -> None:
    """Raises InputError where the files cannot hold such a model, before a list of its tensors is made."""
    there = sum(map(math.prod, file.shapes.values()))
    if config.num_layers > len(file.names):
        raise InputError(
            f"{file.label} asks in its configuration for {config.num_layers:,} layers, but its files hold "
            f"{len(file.names):,} tensors in all"
        )
    if (wanted := config.vocab_size * config.width) > there:
        raise InputError(
            f"{file.label} asks in its configuration for {config.vocab_size:,} rows of {config.width:,}, which are "
            f"{wanted:,} numbers, but its files hold {there:,} in all"
        )


def check_finite(file: TensorFile, name: str, tensor: np.ndarray) -> None:
    bad = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
    if bad:
        raise InputError(f"{name} in {file.label} has {bad} values that are NaN or infinite; the file is damaged")


def undo_interleaving(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of Q or K from interleaved rotary order ``(0, h/2, 1, h/2 + 1, ...)`` back to the half-split one.

    GGUF files of the Llama architecture store them interleaved; works for kernels ``[out, in]`` and biases.
    """
    pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def listed(names: Set[str], most: int = 5) -> str:
    """Sorted names in a sentence, the first few and a count."""
    first = ", ".join(
        name if name.isprintable() and len(name) < 100 else shown(name) for name in sorted(names)[:most]
    )
    return first if len(names) <= most else f"{first} and {len(names) - most} more tensors"


def flatten(params) -> dict:
    """``{"layers/attention/q/kernel": leaf, ...}`` from a nested dict."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def unflatten(flat: dict) -> dict:
    """The inverse of `flatten`."""
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested

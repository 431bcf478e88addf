"""Families of models, one file each: settings and tensors, read and written.

`FAMILIES` holds them by their ``model_type``, in the order in which one is looked for that can write a decoder.
"""

from fisher_jax.models.families.family import Family
from fisher_jax.models.families.gpt2 import GPT2
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout, undo_interleaving
from fisher_jax.models.families.llama import LLAMA
from fisher_jax.models.families.mistral import MISTRAL
from fisher_jax.models.families.qwen import QWEN2, QWEN3

__all__ = ["FAMILIES", "LLAMA_NAMES", "Family", "Layout", "undo_interleaving"]

FAMILIES: dict[str, Family] = {family.kind: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)}

"""Families of models, one file each: settings and tensors, read and written.

`FAMILIES` holds them by their ``model_type``, in the order in which one is looked for that can write a decoder.
"""

from fisher_jax.models.families.cohere import COHERE
from fisher_jax.models.families.family import Family
from fisher_jax.models.families.gemma import GEMMA, GEMMA2
from fisher_jax.models.families.gemma3 import GEMMA3
from fisher_jax.models.families.gpt2 import GPT2
from fisher_jax.models.families.gpt_neox import GPT_NEOX
from fisher_jax.models.families.gptj import GPTJ
from fisher_jax.models.families.granite import GRANITE
from fisher_jax.models.families.layout import LLAMA_NAMES, Layout, undo_interleaving
from fisher_jax.models.families.llama import LLAMA
from fisher_jax.models.families.mistral import MISTRAL
from fisher_jax.models.families.mixtral import MIXTRAL
from fisher_jax.models.families.olmo import OLMO, OLMO2
from fisher_jax.models.families.phi import PHI
from fisher_jax.models.families.phi3 import PHI3
from fisher_jax.models.families.qwen import QWEN2, QWEN3
from fisher_jax.models.families.qwen3_moe import QWEN3_MOE
from fisher_jax.models.families.smollm3 import SMOLLM3
from fisher_jax.models.families.stablelm import STABLELM
from fisher_jax.models.families.starcoder2 import STARCODER2

__all__ = ["FAMILIES", "LLAMA_NAMES", "Family", "Layout", "undo_interleaving"]

FAMILIES: dict[str, Family] = {
    family.kind: family
    for family in (
        LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GEMMA, GEMMA2, GEMMA3, GPT_NEOX, OLMO2, PHI3, SMOLLM3, GRANITE, OLMO,
        STABLELM, COHERE, PHI, STARCODER2, GPTJ, MIXTRAL, QWEN3_MOE,
    )
}  # fmt: skip

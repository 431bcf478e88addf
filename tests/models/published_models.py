"""Folders and files as they are published, made small."""

import json

import numpy as np
import tiny_models as tiny

from fisher_jax.models import DecoderConfig
from fisher_jax.models.config import llama3_divisors

SCALING = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama_folder(folder, config=tiny.LLAMA, *, tensors=None, shards=1, **settings):
    found = {**tiny.hf_tensors(tiny.random_params(config)), **(tensors or {})}
    return tiny.write_hf(folder, tiny.llama_settings(config, **settings), found, shards=shards)


def write_json(file, content):
    file.write_text(json.dumps(content))


def llama3_config(**changes) -> DecoderConfig:
    """A decoder with Llama 3.2's scaling, whose frequencies fall in all of its three parts."""
    base, size = 500_000.0, 16
    divisors = llama3_divisors(**SCALING, original_positions=8192, base=base, head_size=size)
    return DecoderConfig(
        **{
            "vocab_size": len(tiny.TOKENS), "width": 12, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
            "head_size": size, "mlp_size": 10, "max_positions": 64, "rope_base": base, "rope_divisors": divisors,
            **changes,
        }
    )  # fmt: skip


def llama3_gguf(path, config, **options):
    """The divisors as a tensor of float32, as converters write them."""
    factors = np.asarray(config.rope_divisors, np.float32)
    return tiny.write_gguf(
        path, config, tiny.random_params(config), tensors={"rope_freqs.weight": factors}, **options
    )

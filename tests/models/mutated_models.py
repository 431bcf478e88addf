"""Files of tiny models, and what happens when a mutated one is loaded."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tiny_models as tiny
from published_models import llama_folder, write_json
from reference_models import told
from safetensors.numpy import load_file, save_file

from fisher_jax import models
from fisher_jax._support.errors import InputError
from fisher_jax.models.families import FAMILIES as FAMILIES_BY_KIND
from fisher_jax.models.hf_config import config_from_hf
from tests.mutations import Mutation, gguf_mutations, of_json, safetensors_mutations

SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "llama": {"rope_scaling": SCALING, "attention_bias": False, "mlp_bias": False, "pad_token_id": 0,
              "partial_rotary_factor": 1.0},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True,
              "sliding_window": 12, "max_window_layers": 2, "layer_types": ["full_attention"] * 2},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 12,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}, "rope_theta": None},
}  # fmt: skip
REFERENCES = ("gemma3_linear", "phi4_mini", "smollm3")
TEXT = "in the than 123 (the"
MOST_SECONDS, MOST_CHARACTERS = 8, 1_000


class Target(NamedTuple):
    """What is loaded, the file of it that is mutated, and by what."""

    load: Path
    file: Path
    mutations: Callable[[bytes, int], Iterator[Mutation]]


def settings_of(family: str, root: Path) -> Target:
    folder = root / f"settings-{family}"
    if family in REFERENCES:
        settings = told(family)["settings"] | {"vocab_size": len(tiny.TOKENS)}
        config = config_from_hf(settings, family, has_head=False)
        layout = FAMILIES_BY_KIND[settings["model_type"]].layout
        tiny.write_hf(folder, settings, layout.tensors(config, tiny.random_params(config)))
    elif family == "gpt2":
        extra = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        settings = tiny.gpt2_settings(tiny.GPT2, **extra)
        tiny.write_hf(folder, settings, tiny.gpt2_tensors(tiny.random_params(tiny.GPT2)))
    else:
        config = dataclasses.replace(tiny.LLAMA, qkv_bias=family == "qwen2")
        llama_folder(folder, config, **FAMILIES[family])
    return Target(folder, folder / "config.json", of_json)


def index(root: Path) -> Target:
    folder = llama_folder(root / "shards", shards=3)
    file = folder / "model.safetensors.index.json"
    write_json(file, json.loads(file.read_text()) | {"metadata": {"total_size": 1234}})
    return Target(folder, file, of_json)


def weights(root: Path) -> Target:
    folder = llama_folder(root / "weights")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt", "note": "a"})
    return Target(folder, folder / "model.safetensors", safetensors_mutations)


def words(root: Path) -> Target:
    folder = llama_folder(root / "words")
    content = json.loads(tiny.tokenizer().to_str())
    start = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [start, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    content["normalizer"] = {"type": "NFC"}
    content["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    write_json(folder / "tokenizer.json", content)
    return Target(folder, folder / "tokenizer.json", of_json)


def gguf(root: Path) -> Target:
    file = tiny.write_gguf(root / "tiny.gguf", tiny.LLAMA, tiny.random_params(tiny.LLAMA))
    return Target(file, file, gguf_mutations)


TARGETS: dict[str, Callable[[Path], Target]] = {
    **{
        f"config.json of {family}": lambda root, family=family: settings_of(family, root)
        for family in (*FAMILIES, "gpt2", *REFERENCES)
    },
    "model.safetensors.index.json": index,
    "header of model.safetensors": weights,
    "tokenizer.json": words,
    "header of a GGUF file": gguf,
}


class Outcome(NamedTuple):
    """``kind`` is refused, same or another for what may be; else it says what is wrong."""

    kind: str
    how: str
    seconds: float


GOOD = ("refused", "same", "another")


def outcomes(target: Target, seed: int, number: int) -> Iterator[Outcome]:
    """Of so many mutations: the first of a seed are the same on every machine."""
    original = target.file.read_bytes()
    before = results(models.load(target.load))
    try:
        for mutation in itertools.islice(target.mutations(original, seed), number):
            target.file.write_bytes(mutation.content)
            start = time.monotonic()
            kind = outcome(target.load, mutation, before)
            seconds = time.monotonic() - start
            yield Outcome(kind if seconds < MOST_SECONDS else f"took {seconds:.0f} s", mutation.how, seconds)
    finally:
        target.file.write_bytes(original)


def outcome(path: Path, mutation: Mutation, before) -> str:
    try:
        model = models.load(path)
    except InputError as error:
        text = str(error)
        return "refused" if text.isprintable() and len(text) < MOST_CHARACTERS else f"no sentence: {text[:300]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    after = results(model)
    if same(after, before):
        return "same"
    if mutation.malformed:
        return "accepted with another result"
    return "another" if equal_weights(after, before) else "accepted with other weights"


def results(model):
    """What a user gets: the decoder's shape, its weights, a text's tokens, every token's text."""
    texts = [model.tokenizer.token_text(i) for i in range(len(tiny.TOKENS))]
    return model.config, model.params, (model.tokenizer.encode(TEXT), texts)


def same(after, before) -> bool:
    # Positions that no text of the tests reaches change no result.
    config = dataclasses.replace(after[0], max_positions=before[0].max_positions)
    return config == before[0] and after[2] == before[2] and equal_weights(after, before)


def equal_weights(after, before) -> bool:
    one, two = (jax.tree.flatten(x[1]) for x in (after, before))
    return one[1] == two[1] and all(map(np.array_equal, one[0], two[0]))

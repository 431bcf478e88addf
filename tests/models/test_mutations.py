"""Mutated files of models: refused in one sentence, or read with the same result; never anything else."""

import collections
import json

import decoder_oracle as oracle
import mutated_models as mutated
import numpy as np
import pytest
import tiny_models as tiny
from published_models import llama_folder, write_json

from fisher_jax import models
from fisher_jax._support.errors import InputError

NUMBERS = {
    "tokenizer.json": 100, "header of a GGUF file": 200, "header of model.safetensors": 120,
    **{f"config.json of {family}": 30 for family in mutated.REFERENCES},
}  # fmt: skip


@pytest.mark.parametrize("kind", mutated.TARGETS)
def test_a_mutated_file_is_refused_or_changes_nothing(tmp_path, kind, capfd):
    target = mutated.TARGETS[kind](tmp_path)
    found = list(mutated.outcomes(target, seed=13, number=NUMBERS.get(kind, 80)))
    assert [x for x in found if x.kind not in mutated.GOOD] == []
    kinds = collections.Counter(x.kind for x in found)
    assert kinds["refused"] > len(found) / 3
    assert kinds["same"] > 0 or kind == "header of model.safetensors"  # in which every byte matters
    assert capfd.readouterr().err == ""  # no panic of a library beside our own sentence


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    folder, outside = (llama_folder(tmp_path / name, shards=3) for name in ("model", "outside"))
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    first = next(iter(content["weight_map"]))
    elsewhere = outside / "model-00000.safetensors"
    for name in (
        "../outside/model-00000.safetensors",
        str(elsewhere),
        "..",
        "",
        "./model-00000.safetensors",
        7,
        None,
    ):
        write_json(file, content | {"weight_map": content["weight_map"] | {first: name}})
        with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
            models.load(folder)


def test_a_mutation_that_matters_is_seen(tmp_path):
    """The comparison itself: another rotary base gives other logits, and is told from the first."""
    folder = llama_folder(tmp_path / "seen")
    before = mutated.results(models.load(folder))
    file = folder / "config.json"
    write_json(file, json.loads(file.read_text()) | {"rope_theta": 200.0})
    after = mutated.results(models.load(folder))
    assert not mutated.same(after, before)
    tokens = tiny.tokens(tiny.LLAMA)
    one, two = (oracle.logits(config, before[1], tokens) for config in (before[0], after[0]))
    assert np.abs(one - two).max() > 1e-3

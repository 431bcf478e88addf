"""The cache of dequantised weights: used when intact, rebuilt when not, never required."""

import os
import re

import jax
import numpy as np
import pytest
import tiny_models as tiny

from fisher_jax import models
from fisher_jax._support.errors import InputError
from fisher_jax.cli.main import main
from fisher_jax.models import weight_cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHER_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    return tiny.write_gguf(tmp_path / "tiny.gguf", tiny.LLAMA, tiny.random_params(tiny.LLAMA))


def assert_same(a, b):
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert (a.config, a.fingerprint, a.name) == (b.config, b.fingerprint, b.name)
    assert a.tokenizer.to_json() == b.tokenizer.to_json()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_load_comes_from_the_cache(folder, file, dtype):
    first = models.load(file, dtype=dtype)
    assert_same(first, models.load(file, dtype=dtype))
    assert [entry.suffix for entry in folder.iterdir()] == [".safetensors"]
    # A cache with other weights is believed, so the file's own were not read.
    entry = weight_cache.read(first.fingerprint, dtype)
    other = {path: -leaf for path, leaf in entry.params.items()}
    weight_cache.write(first.fingerprint, dtype, entry._replace(params=other), "tiny")
    second = models.load(file, dtype=dtype)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, -y), first.params, second.params)


def test_each_dtype_is_cached_for_itself_under_one_fingerprint(folder, file):
    full, half = models.load(file), models.load(file, dtype="bfloat16")
    assert full.fingerprint == half.fingerprint
    assert len(list(folder.iterdir())) == 2


def test_another_file_has_another_fingerprint(folder, file, tmp_path):
    changed = tiny.random_params(tiny.LLAMA)
    changed["final_norm"]["scale"] = changed["final_norm"]["scale"].at[3].add(1e-6)
    other = tiny.write_gguf(tmp_path / "other.gguf", tiny.LLAMA, changed)
    assert models.load(file).fingerprint != models.load(other).fingerprint
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "weight", "tokenizer", "foreign"])
def test_a_damaged_cache_file_is_rebuilt(folder, file, damage):
    first = models.load(file)
    (entry,) = folder.iterdir()
    content = bytearray(entry.read_bytes())
    if damage == "weight":
        content[-5] ^= 1
    if damage == "tokenizer":
        content[content.index(b"im_start")] ^= 1
    entry.write_bytes({"cut": content[:-100], "empty": b"", "foreign": b"not safetensors"}.get(damage, content))
    assert weight_cache.read(first.fingerprint, "float32") is None
    assert_same(models.load(file), first)
    assert weight_cache.read(first.fingerprint, "float32") is not None
    assert_same(models.load(file), first)


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch, file):
    (tmp_path / "occupied").write_text("a file where the cache folder should be")
    monkeypatch.setenv("FISHER_JAX_CACHE", str(tmp_path / "occupied"))
    assert_same(models.load(file), models.load(file))


def test_a_failed_write_leaves_nothing_behind(folder, file):
    first = models.load(file)
    (entry,) = folder.iterdir()
    entry.unlink()
    entry.mkdir()  # a file cannot take the place of a folder
    assert_same(models.load(file), first)
    assert list(folder.iterdir()) == [entry]


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FISHER_JAX_CACHE", str(tmp_path / "own"))
    assert weight_cache.folder() == tmp_path / "own"
    monkeypatch.delenv("FISHER_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weight_cache.folder() == tmp_path / "fisher_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weight_cache.folder() == tmp_path / ".cache" / "fisher_jax"


def stored(folder):
    return {file.name for file in folder.iterdir()}


def test_what_was_not_used_for_the_longest_time_goes(folder, file, monkeypatch):
    model = models.load(file)
    (whole,) = folder.iterdir()
    size = whole.stat().st_size
    monkeypatch.setenv("FISHER_JAX_CACHE_GIB", str(2.2 * size / 2**30))
    entry = weight_cache.read(model.fingerprint, "float32")
    (folder / "mine.safetensors").write_bytes(b"of somebody else")
    (folder / "0123-float32-v2abc.part").write_bytes(bytes(size))
    os.utime(folder / "0123-float32-v2abc.part", (1, 1))
    os.utime(whole, (2, 2))
    weight_cache.write("b" * 16, "float32", entry, "b.gguf")
    assert stored(folder) == {"mine.safetensors", whole.name, f"{'b' * 16}-float32-v3.safetensors"}
    models.load(file)  # used again, so the other one goes
    weight_cache.write("c" * 16, "float32", entry, "c.gguf")
    assert stored(folder) == {"mine.safetensors", whole.name, f"{'c' * 16}-float32-v3.safetensors"}
    assert [one.source for one in weight_cache.kept()] == ["tiny.gguf", "c.gguf"]


def test_what_is_larger_than_the_limit_is_not_kept(folder, file, monkeypatch):
    monkeypatch.setenv("FISHER_JAX_CACHE_GIB", "0")
    models.load(file)
    assert not folder.exists()
    for said in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("FISHER_JAX_CACHE_GIB", said)
        with pytest.raises(InputError, match=f"FISHER_JAX_CACHE_GIB is '{said}'.*number of GiB"):
            models.load(file)


def test_the_command_lists_the_cache_and_empties_it(folder, file, capsys):
    assert main(["cache"]) == 0
    assert "0.0 MiB of at most 16.00 GiB" in capsys.readouterr().out
    models.load(file)
    (folder / "mine.safetensors").write_bytes(b"of somebody else")
    (folder / "0123-bfloat16-v2.safetensors").write_bytes(b"cut off")
    assert main(["cache"]) == 0
    said = capsys.readouterr().out
    assert str(folder) in said.replace("\n", "")
    assert re.search(r"tiny\.gguf +float32 +0\.0 MiB +0\.\d s ago", said)
    assert re.search(r"incomplete +bfloat16", said)
    assert main(["cache", "--empty"]) == 0
    assert "removed: 2 files" in capsys.readouterr().out
    assert stored(folder) == {"mine.safetensors"}

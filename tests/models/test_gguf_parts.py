"""Split GGUF files, as gguf-py writes them: read as one, and refused where a part is missing or another's."""

import shutil

import gguf
import jax
import numpy as np
import pytest
import tiny_models as tiny

from fisher_jax import models
from fisher_jax._support.errors import InputError


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHER_JAX_CACHE", str(tmp_path / "cache"))
    tiny.write_gguf(tmp_path / "split.gguf", tiny.LLAMA, tiny.random_params(tiny.LLAMA), parts=7)
    files = sorted(tmp_path.glob("split-*.gguf"))
    assert [file.name for file in files] == [f"split-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    return files


def test_a_split_file_is_read_as_one(tmp_path, parts):
    whole = models.load(tiny.write_gguf(tmp_path / "whole.gguf", tiny.LLAMA, tiny.random_params(tiny.LLAMA)))
    for part in parts:
        model = models.load(part)
        assert (model.config, model.name) == (whole.config, "split")
        jax.tree.map(np.testing.assert_array_equal, model.params, whole.params)
        assert model.tokenizer.to_json() == whole.tokenizer.to_json()
    assert len(list((tmp_path / "cache").iterdir())) == 2  # whichever part is given, it is one model


def test_a_part_decides_the_fingerprint(tmp_path, parts):
    before = models.load(parts[0]).fingerprint
    raw = bytearray(parts[2].read_bytes())
    raw[-5] ^= 1
    parts[2].write_bytes(raw)
    assert models.load(parts[0]).fingerprint != before


def test_missing_and_foreign_parts_are_refused(tmp_path, parts):
    kept = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(InputError, match=r"split-00002-of-00003\.gguf is missing; all 3 parts"):
        models.load(parts[0])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(InputError, match=r"split-00002-of-00003\.gguf is not part 2"):
        models.load(parts[2])
    writer = gguf.GGUFWriter(parts[1], "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.add_int32("split.tensors.count", 21)
    writer.add_tensor("output_norm.weight", np.ones(12, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"00003\.gguf.*(not part|another part holds too|tensors; fetch)"):
        models.load(parts[0])
    parts[1].write_bytes(kept[: len(kept) // 2])
    with pytest.raises(InputError, match=r"split-00002-of-00003\.gguf is cut off"):
        models.load(parts[0])
    parts[1].write_bytes(kept)
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"renamed\.gguf is one of 3 parts.*NAME-00001-of-00003"):
        models.load(tmp_path / "renamed.gguf")

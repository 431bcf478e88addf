"""What all tests share: one cache folder for the session and one load of the shipped model."""

import shutil

import pytest

from fisher_jax import models


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """A cache of the session's own: a cache left by older code would hide what today's code reads wrongly."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FISHER_JAX_CACHE", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def shipped_model(cache_folder):
    """SmolLM2-135M-Instruct in float32."""
    return models.load()

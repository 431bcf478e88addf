"""What all tests share: how programs are compiled, a cache folder for the session, one load of the shipped model."""

import gc
import shutil

import jaxtyping
import pytest

from tests import annotations, compiling

compiled, mappings = pytest.StashKey[compiling.Kept](), compiling.Mappings()


def pytest_addoption(parser, pluginmanager):
    """Every call of the package has its arguments and its result checked against their annotations, shapes too.

    The hook stands before the conftest of any room can import the package; options are not yet parsed then.
    """
    parser.addoption("--no-types", action="store_true", help="do not check the annotations of the package")
    if "--no-types" not in pluginmanager.getplugin("pytestconfig").invocation_params.args:
        jaxtyping.jaxtyped = annotations.jaxtyped
        jaxtyping.install_import_hook("fisher_jax", f"{annotations.__name__}.check")


def pytest_configure(config):
    process = getattr(config, "workerinput", {"workerid": "main"})["workerid"]
    config.stash[compiled] = compiling.Kept(process)
    config.stash[compiled].open()
    compiling.optimized(False)  # what lives longer than a module is made before `machine_code`


def pytest_unconfigure(config):
    config.stash[compiled].close()


def pytest_collection_finish(session):
    """What was imported stays: nobody looks through it again, as JAX's check for leaks does many times."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item, nextitem):
    mappings.bound()


@pytest.fixture(scope="module", autouse=True)
def machine_code(request):
    """Optimised or not: see `compiling`."""
    compiling.optimized(request.node.get_closest_marker("optimized") is not None)


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
    from fisher_jax import models  # after the hook of types

    return models.load()

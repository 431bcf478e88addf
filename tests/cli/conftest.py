"""One tiny model, its texts and one finished report for all tests of the command."""

import jax
import numpy as np
import pytest
from running import main
from tiny import write_model, write_texts

import fisher_jax as fj

OPTIONS = ["--row-length", "32", "--batch-size", "4"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model") / "tiny-llama"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def report_arguments(tiny_model, texts):
    """Arguments of a run on the tiny model, to which a test adds its own."""

    def arguments(out, *more):
        return ["report", "--model", tiny_model, "--text", *texts, "--out", str(out), *OPTIONS, *more]

    return arguments


@pytest.fixture(scope="session")
def finished_report(tmp_path_factory, report_arguments):
    """A folder with two tasks, the second one with the states of single entries."""
    out = tmp_path_factory.mktemp("finished") / "report"
    assert main(report_arguments(out, "--task", "first")) == 0
    assert main(report_arguments(out, "--task", "second", "--max-tokens", "2000", "--groups", "param")) == 0
    return out


@pytest.fixture(scope="session")
def same_bits():
    """Whether the states of a task in two report folders are equal bit for bit."""

    def compare(a, b, task):
        left, right = (fj.checkpoint.restore(out / "state")[task] for out in (a, b))
        assert jax.tree.structure(left) == jax.tree.structure(right)
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            x, y = np.asarray(x), np.asarray(y)
            assert x.dtype == y.dtype
            assert x.tobytes() == y.tobytes()
        return True

    return compare

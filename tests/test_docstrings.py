"""Every example in the documentation of the library runs, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import fisher_jax as fj

OPTIONS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
# The command line is shown by the README; its modules have no Python interface.
MODULES = [
    m.name for m in pkgutil.walk_packages(fj.__path__, "fisher_jax.") if not m.name.startswith("fisher_jax.cli")
]


def examples(module):
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [found for found in finder.find(importlib.import_module(module)) if found.examples]


EXAMPLES = [found for module in ["fisher_jax", *MODULES] for found in examples(module)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda found: found.name.removeprefix("fisher_jax."))
def test_the_example_runs(example):
    report = []
    result = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(example, out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)


def public_functions():
    """Functions named by ``__all__`` of the package, and of the modules that it names."""
    for name in fj.__all__:
        found = getattr(fj, name)
        if inspect.ismodule(found):
            yield from ((f"{name}.{inner}", getattr(found, inner)) for inner in found.__all__)
        else:
            yield name, found


FUNCTIONS = {name: found for name, found in public_functions() if inspect.isroutine(found)}


def test_the_search_finds_the_library():
    assert {"check", "ema", "next_token_batch", "welford.add", "lm_head.moments"} <= set(FUNCTIONS)
    names = {found.name for found in EXAMPLES}
    assert {"fisher_jax.welford.accumulation.add", "fisher_jax.batch.batch.next_token_batch"} <= names


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_shows_an_example(name):
    assert ">>> " in (inspect.getdoc(FUNCTIONS[name]) or ""), f"fj.{name} has no example in its docstring"

"""The public names: few at the top, the others in public modules, each written down, light to import."""

import dataclasses
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import typing

import jax.numpy as jnp
import pytest

import fisher_jax as fj

ROOT = pathlib.Path(__file__).parent.parent
NAMES = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
MODULES = {name: getattr(fj, name) for name in fj.__all__ if inspect.ismodule(getattr(fj, name))}
TOP = {name: getattr(fj, name) for name in fj.__all__ if name not in MODULES}
PUBLIC = {**TOP, **{f"{room}.{name}": getattr(module, name) for room, module in MODULES.items()
                    for name in module.__all__}}  # fmt: skip
CLASSES = {x for x in PUBLIC.values() if inspect.isclass(x)}
FUNCTIONS = {name: x for name, x in PUBLIC.items() if inspect.isroutine(x)}


def test_few_names_are_at_the_top():
    assert len(TOP) <= 48
    assert all(importlib.import_module(f"fisher_jax.{name}") is module for name, module in MODULES.items())


def test_the_page_of_names_has_them_all():
    top = re.findall(r"^\| [^|`]+ \| (.*) \|$", NAMES, re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(top))) == sorted(TOP)
    rows = dict(re.findall(r"^\| `fj\.(\w+)` \| [^|]+ \| (.*) \|$", NAMES, re.M))
    assert {room: re.findall(r"`(\w+)`", row) for room, row in rows.items()} == {
        room: sorted(module.__all__) for room, module in MODULES.items()
    }


@pytest.mark.parametrize("place", ["README.md", "CONTRIBUTING.md", "docs", "fisher_jax", "tests", "experiments"])
def test_every_name_that_is_written_exists(place):
    files = [ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).rglob("*.*"))
    for file in files:
        if file.suffix not in (".py", ".md") or file.name == pathlib.Path(__file__).name:
            continue
        text = file.read_text(encoding="utf-8").split("## Where a name went")[0]
        for name, inner in re.findall(r"\bfj\.(\w+)(?:\.(\w+))?", text):
            assert name in fj.__all__ or name.startswith("__"), f"{file}: fj.{name}"
            assert not inner or name not in MODULES or hasattr(MODULES[name], inner), f"{file}: fj.{name}.{inner}"


def classes_in(annotation):
    if inspect.isclass(annotation) and annotation.__module__.startswith("fisher_jax."):
        yield annotation
    for part in typing.get_args(annotation):
        yield from classes_in(part)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_class_that_a_function_returns_is_public(name):
    found = typing.get_type_hints(inspect.unwrap(FUNCTIONS[name])).get("return")
    assert set(classes_in(found)) <= CLASSES
    named = re.findall(r"`([A-Z]\w+)`", (inspect.getdoc(FUNCTIONS[name]) or "").partition("Returns:")[2])
    assert set(named) <= {x.__name__ for x in CLASSES} | {"None"}


def test_results_never_change():
    for found in CLASSES:
        assert hasattr(found, "_fields") or not dataclasses.is_dataclass(found) or found.__dataclass_params__.frozen


def test_a_tap_and_a_coverage_have_a_short_repr():
    def loss(params, x):
        return jnp.sum(x @ params["w"])

    args = {"w": jnp.ones((30, 20))}, jnp.ones((40, 30))
    tap = fj.capture(loss)(*args)[1][0]
    for found in (tap, tap.use, fj.coverage(loss, *args)):
        assert len(repr(found)) < 420
        assert "\n" not in repr(found)
    assert "float32[40, 20]" in repr(tap)


LIGHT = {
    "package": ("fj.__all__", "jax flax orbax optax scipy numpy"),
    "welford": (
        "import jax.numpy as jnp; x = fj.welford.observe(jnp.ones((3, 2))); fj.interval(x); "
        "fj.check(fj.welford.add(fj.welford.init(x), x))", "flax orbax optax",
    ),
    "lm_head": (
        "import jax.numpy as jnp; fj.mean(fj.lm_head.moments(jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.array([0, 1])))",
        "flax orbax optax",
    ),
    "doors": ("fj.stats.holm; fj.shift.conflict", "flax orbax"),
}  # fmt: skip


@pytest.mark.parametrize("part", LIGHT)
def test_what_is_used_alone_imports_little(part):
    code, absent = LIGHT[part]
    code = f"import sys; import fisher_jax as fj; {code}; print(*(x for x in {absent.split()} if x in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr

"""The rooms of the package: how many, and that imports go one way, as CONTRIBUTING.md says."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules():
    """Every module by its dotted name, with those of the package that it imports, anywhere in it."""
    files = {}
    for file in (ROOT / "fisher_jax").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    found = {}
    for name, file in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                told = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {one if one in files else node.module for one in told}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] &= files.keys()
    return found


def rooms(place):
    """``{room: rooms that it imports}`` of the files and folders directly in a folder of the package."""
    depth = place.count(".") + 1

    def room(module):
        parts = module.split(".")
        inside = ".".join(parts[:depth]) == place and len(parts) > depth
        return parts[depth] if inside else None

    found = {}
    for module, imported in modules().items():
        if (own := room(module)) is not None:
            found.setdefault(own, set()).update(other for x in imported if (other := room(x)) not in (None, own))
    return found


@pytest.mark.parametrize(("place", "most", "arrows"), [("fisher_jax", 22, 80), ("fisher_jax.cli", 12, 30)])
def test_there_are_few_rooms_and_few_arrows(place, most, arrows):
    found = rooms(place)
    assert len(found) <= most
    assert sum(map(len, found.values())) <= arrows


@pytest.mark.parametrize(
    "place", ["fisher_jax", "fisher_jax.cli", "fisher_jax.cli.report", "fisher_jax.kronecker", "fisher_jax.spectra",
              "fisher_jax.models", "fisher_jax.lm_head", "fisher_jax._tracing", "fisher_jax.checkpoint"]
)  # fmt: skip
def test_imports_never_go_in_a_circle(place):
    graphlib.TopologicalSorter(rooms(place)).prepare()


def test_every_room_is_told_of_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `([a-z_]+)(?:\.py|/)` \|", text, re.M))
    assert told == rooms("fisher_jax").keys()


def test_the_order_in_contributing_is_that_of_imports():
    """A room imports only rooms that stand above it in the table."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    order = re.findall(r"^\| `([a-z_]+)(?:\.py|/)` \|", text, re.M)
    for room, imported in rooms("fisher_jax").items():
        assert not [other for other in imported if order.index(other) > order.index(room)], room


def test_only_models_texts_and_the_command_line_know_files():
    for name, imported in modules().items():
        room = name.split(".")[1] if "." in name else ""
        if room not in ("cli", "models", "text", "exchange", "checkpoint"):
            assert not [
                x for x in imported if x.startswith(("fisher_jax.cli", "fisher_jax.models", "fisher_jax.text"))
            ]


@pytest.mark.parametrize(
    "sentence", ["weights have one value per", "do not fit {", "units have one id per row", "apply_fn returns one",
                 "negative_weight=~", "target_out_of_range=jnp", "in_range(outputs"]
)  # fmt: skip
def test_batches_are_validated_in_one_room(sentence):
    files = [f for f in (ROOT / "fisher_jax").rglob("*.py") if sentence in f.read_text(encoding="utf-8")]
    assert [file.parent.name for file in files if file.name != "likelihoods.py"] == ["batch"], files

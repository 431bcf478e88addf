"""Damaged state folders and exchange files: single flipped bits, and facts that say something else.

Each generator is seeded and yields ``(name, damage)``; ``damage(folder)`` changes a copy of a good folder in place.
"""

import copy
import hashlib
import json
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

__all__ = [
    "exchange_header",
    "facts_of",
    "flip_a_bit",
    "flips",
    "mutated_facts",
    "rewrite",
    "rewrite_exchange",
    "rewritten",
]

ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    1e9,
    10**9,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "/etc/passwd",
    "../..",
    "fisher_jax.checkpoint:os.system",
    "builtins:eval",
    "a0",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [1, 2, 3],
    [10**9],
    [-1],
    ["x"],
]


def facts_of(folder: pathlib.Path) -> pathlib.Path:
    """The file of facts in a state folder."""
    found = [p for name in ("facts.json", "state.json") for p in sorted(folder.rglob(name))]
    return found[-1]


def rewrite(file: pathlib.Path, text: str | bytes) -> None:
    """New facts, with the hash that belongs to them: what a person does who means it."""
    data = text.encode() if isinstance(text, str) else text
    file.write_bytes(data)
    digest = file.with_suffix(".sha256")
    if digest.exists():
        digest.write_text(f"{hashlib.sha256(data).hexdigest()}  {file.name}\n")


def rewritten(folder: pathlib.Path, change: Callable[[Any], Any]) -> None:
    """``change`` edits the parsed facts in place, or returns others."""
    file = facts_of(folder)
    facts = json.loads(file.read_text())
    changed = change(facts)
    rewrite(file, json.dumps(facts if changed is None else changed))


def flip_a_bit(folder: pathlib.Path, random_bits: random.Random) -> str:
    """Flip one bit of one file below the folder, all bits alike; its place in words."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    sizes = [p.stat().st_size for p in files]
    place = random_bits.randrange(sum(sizes))
    for file, size in zip(files, sizes, strict=True):  # noqa: B007
        if place < size:
            break
        place -= size
    bit = random_bits.randrange(8)
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)
    return f"bit {bit} of byte {place} of {file.relative_to(folder)}"


def flips(number: int, seed: int = 0) -> Iterator[tuple[str, Callable[[pathlib.Path], str]]]:
    for i in range(number):
        yield f"flip {seed}.{i}", lambda folder, i=i: flip_a_bit(folder, random.Random(f"{seed}.{i}"))


def mutated_facts(facts: Any, number: int, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """``(what was changed, changed facts)``: one place of the tree replaced, left out, doubled, moved or nested."""
    chance, before, found = random.Random(seed), json.dumps(facts), 0
    places = list(_places(facts, ()))
    while found < number:
        changed = copy.deepcopy(facts)
        what, changed = _mutate(changed, chance, places)
        if _circular(changed) or json.dumps(changed) == before:
            continue
        found += 1
        yield what, changed


def _mutate(changed: Any, chance: random.Random, places: list[tuple]) -> tuple[str, Any]:
    where = chance.choice(places)
    if not where:
        value = chance.choice(ODD)
        return f"all facts are {value!r}", copy.deepcopy(value)
    parent, key = _parent(changed, where)
    way = chance.choice(["replace", "replace", "replace", "drop", "swap", "nest", "number", "rename"])
    if way == "replace":
        parent[key] = copy.deepcopy(chance.choice(ODD))
        way = f"replace by {parent[key]!r}"
    elif way == "drop":
        del parent[key]
    elif way == "swap":
        other, place = _parent(changed, chance.choice([p for p in places if p]))
        parent[key], other[place] = other[place], parent[key]
    elif way == "nest":
        for _ in range(chance.choice([1, 150])):
            parent[key] = [parent[key]]
    elif way == "number" and isinstance(parent[key], int | float):
        parent[key] = parent[key] + chance.choice([1, -1, 2**31, -(2**31), 2**70, 0.5])
    elif isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    return f"{way} at {'/'.join(map(str, where))}", changed


def _places(x: Any, where: tuple) -> Iterator[tuple]:
    yield where
    for key, child in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from _places(child, (*where, key))


def _parent(x: Any, where: tuple) -> tuple[Any, Any]:
    for key in where[:-1]:
        x = x[key]
    return x, where[-1] if where else None


def _circular(x: Any) -> bool:
    try:
        json.dumps(x)
    except ValueError:
        return True
    return False


def exchange_header(file: pathlib.Path) -> dict[str, Any]:
    """The header of a safetensors file: tensors by name, and ``__metadata__``."""
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def rewrite_exchange(file: pathlib.Path, header: dict[str, Any], *, meant: bool) -> None:
    """Another header before the same tensors; ``meant``: with the hash that belongs to it."""
    found = header.get("__metadata__")
    if meant and isinstance(found, dict):
        rest = {name: text for name, text in found.items() if name != "fisher_jax_sha256"}
        found["fisher_jax_sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    data, text = file.read_bytes(), json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :])

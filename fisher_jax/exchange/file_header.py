"""What a safetensors file of `fj.exchange` says of its tensors, and whether it can be believed."""

import hashlib
import json
import math
import os
from typing import Any

import numpy as np

from fisher_jax._support.errors import InputError
from fisher_jax._support.machine import installed
from fisher_jax._support.printable import first_line
from fisher_jax.checkpoint import sums
from fisher_jax.checkpoint.facts import DamagedError, check
from fisher_jax.welford.moments import UNITS

PAIRS = ("mean", "m2", "square_mean", "square_m2")
SCALARS = ("weight", "weight_sq", "count", "rejected", "reasons")

_VERSION = "2"
_FACTS, _DIGEST = "fisher_jax", "fisher_jax_sha256"
_STATE = {"unit", "scale", "observations", "weight", "fractional", "errors"}
_LEAF = {"path", "names", "stacked", "transposed"}

Shapes = dict[str, tuple[str, list[int]]]  # dtype, as safetensors calls it, and shape of each tensor


def header(facts: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """The metadata of a safetensors file, with a checksum of each tensor and a SHA-256 of all of it."""
    version = installed("fisher-jax", "unknown")
    checksums = {name: list(sums.of_host(x)) for name, x in tensors.items()}
    found = {
        "format": "fisher_jax", "format_version": _VERSION, "fisher_jax_version": version,
        "quantity": "Fisher information: squared derivative of the log-likelihood (nats) by the parameter",
        "normalization": "mean per weighted token, summed within groups",
        _FACTS: json.dumps({**facts, "checksums": checksums}),
    }  # fmt: skip
    return {**found, _DIGEST: _sha256(found)}


def _sha256(found: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def read_header(path: str | os.PathLike) -> tuple[dict[str, str], Shapes]:
    """The metadata of any safetensors file, and its tensors."""
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, {k: (x.get_dtype(), list(x.get_shape())) for k, x in slices.items()}
    except Exception as error:
        raise InputError(f"{path} is no safetensors file, or a damaged one: {first_line(error)}") from error


def is_ours(found: dict[str, str]) -> bool:
    return found.get("format") == "fisher_jax" or _FACTS in found or _DIGEST in found


def read(path: str | os.PathLike, found: dict[str, str]) -> dict[str, Any]:
    """The facts of a file of ours."""
    version = found.get("format_version")
    if version != _VERSION:
        raise InputError(
            f"{path} has version {str(version)[:20]} of this format, known is {_VERSION}; "
            "read it with the fisher_jax that wrote it"
        )
    stated = found.get(_DIGEST)
    rest = {name: text for name, text in found.items() if name != _DIGEST}
    check(stated == _sha256(rest), "its facts do not have the SHA-256 that it states")
    try:
        facts = json.loads(found.get(_FACTS, ""))
    except (ValueError, RecursionError) as error:
        raise DamagedError("its facts are not JSON") from error
    check(type(facts) is dict, "its facts are not a JSON object")
    return facts


def checked(facts: dict[str, Any], tensors: Shapes) -> dict[str, Any]:
    """The facts, if they are of the form that `header` writes and say of the tensors what they are."""
    is_state = facts.get("content") == "state"
    check(facts.get("content") in ("state", "values"), "its content is not 'state' or 'values'")
    wanted = {"content", "metadata", "leaves", "checksums"} | (_STATE if is_state else set())
    check(set(facts) == wanted, "it lacks facts, or has others")
    check(type(facts["metadata"]) is dict, "its metadata are not a dict")
    leaves, checksums = facts["leaves"], facts["checksums"]
    check(type(leaves) is list, "its leaves are not a list")
    for leaf in leaves:
        _check_leaf(leaf)
    names = [name for leaf in leaves for name in leaf["names"]]
    check(len(set(names)) == len(names), "two of its leaves have one name")
    if is_state:
        _check_state(facts)
    expected = set(names) | {f"{name}:{part}" for part in _parts(facts) for name in names}
    expected |= {f"state:{scalar}" for scalar in _scalars(facts)}
    check(set(tensors) == expected, "its tensors are not those that its facts name")
    check(type(checksums) is dict and set(checksums) == expected, "its checksums are not those of its tensors")
    for leaf in leaves:
        _check_shapes(leaf, facts, tensors)
    if is_state:
        _check_scalars(facts, tensors)
    return facts


def _check_leaf(leaf: Any) -> None:
    check(type(leaf) is dict and set(leaf) == _LEAF, "a leaf is not described")
    path, names = leaf["path"], leaf["names"]
    check(
        type(path) is list and all(type(key) in (str, int) for key in path),
        "the path of a leaf is not a list of keys",
    )
    good = type(names) is list and names and all(type(name) is str and ":" not in name for name in names)
    check(bool(good), "the names of a leaf are not a list of texts")
    check(type(leaf["stacked"]) is bool and type(leaf["transposed"]) is bool, "a leaf is not described")
    check(leaf["stacked"] or len(names) == 1, "a leaf that is not stacked has several names")


def _check_state(facts: dict[str, Any]) -> None:
    weight = facts["weight"]
    check(type(facts["unit"]) is str and facts["unit"] in UNITS, f"its unit is {str(facts['unit'])[:40]!r}")
    check(type(facts["scale"]) is int and abs(facts["scale"]) <= 1024, "its scale is not a whole number")
    check(type(facts["observations"]) is int and facts["observations"] >= 0, "its observations are not a count")
    good = type(weight) in (int, float) and 0 <= weight < math.inf
    check(good, f"its weight is {str(weight)[:40]}")
    check(type(facts["fractional"]) is bool and type(facts["errors"]) is bool, "its facts are not true or false")


def _parts(facts: dict[str, Any]) -> list[str]:
    if facts["content"] != "state":
        return []
    pairs = [part for part in PAIRS if facts["fractional"] or not part.startswith("square")]
    return pairs + (["open.mean"] if facts["unit"] == "document" else [])


def _scalars(facts: dict[str, Any]) -> list[str]:
    if facts["content"] != "state":
        return []
    return [*SCALARS, *(("open.weight", "open.unit_id") if facts["unit"] == "document" else ())]


def _check_shapes(leaf: dict[str, Any], facts: dict[str, Any], tensors: Shapes) -> None:
    shapes = [tensors[name] for name in leaf["names"]]
    check(all(shape == shapes[0] for shape in shapes), f"the tensors of {leaf['names'][0]!r} disagree in shape")
    for part in _parts(facts):
        for name in leaf["names"]:
            dtype, (parts, *shape) = tensors[f"{name}:{part}"][0], tensors[f"{name}:{part}"][1] or [0]
            fits = parts in (1, 2) and shape == shapes[0][1] and dtype in ("F32", "F64")
            check(fits, f"the tensor {name}:{part} does not have the shape of {name!r}")


def _check_scalars(facts: dict[str, Any], tensors: Shapes) -> None:
    for scalar in _scalars(facts):
        dtype, shape = tensors[f"state:{scalar}"]
        counts = scalar in ("rejected", "reasons", "open.unit_id")
        fits = (shape, dtype) == ([], "I32") if counts else shape == [2] and dtype in ("F32", "F64")
        check(fits, f"state:{scalar} is {dtype}{shape}")


def values(package: Any, path: str | os.PathLike, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a file, those of ours with the values that were saved."""
    try:
        tensors = package.load_file(path)
    except Exception as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    for name, stated in facts.get("checksums", {}).items():
        check(list(sums.of_host(tensors[name])) == stated, f"the values of {name!r} have changed")
    for leaf in facts.get("leaves", ()):
        for name in leaf["names"]:
            smallest = np.min(tensors[name].astype(np.float64), initial=0)
            check(bool(smallest >= 0), f"{name!r} has the entry {smallest:.3g}; Fisher information is never negative")
    for scalar in ("weight", "weight_sq", "count") if facts["content"] == "state" else ():
        pair = tensors[f"state:{scalar}"]
        check(bool(np.isfinite(pair).all() and pair.sum() >= 0), f"its {scalar} is {pair.tolist()}")
    return tensors

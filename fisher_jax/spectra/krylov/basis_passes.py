"""A basis of vectors, in place: projections, subtractions and rotations, leaf by leaf and block by block.

A basis is a list of arrays, one per leaf, with the vectors along the leading axis. On devices it lies as the leaves
do, and every pass works on the shards where they are (`jax.shard_map`); on the host it is a list of numpy arrays.
Sums over many entries are kept in pairs (device) or in float64 (host): 1e8 float32 terms lose nothing visible.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fisher_jax.spectra.krylov import device_passes, host_passes
from fisher_jax.spectra.krylov.layout import Layout, Vector


class Basis(NamedTuple):
    """``rows`` vectors of storage. Passes consume the basis that they are given and return the new one."""

    leaves: list
    layout: Layout
    rows: int
    on_host: bool


def on_host(storage: str, layout: Layout) -> bool:
    """Whether the basis is kept in numpy arrays; ``auto``: where every leaf lies on one CPU device."""
    if storage not in ("auto", "device", "host"):
        raise ValueError(f"storage is one of auto, device, host, found {storage!r}")
    devices: set = set().union(*(place.device_set for place in layout.places if place is not None))
    devices = devices or {jax.devices()[0]}
    local = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return storage == "host" or (storage == "auto" and local)


def empty_like(layout: Layout, rows: int, dtype: Any, on_host: bool) -> list:
    """Shapes, dtypes and places of the leaves of a basis."""
    return [
        jax.ShapeDtypeStruct((rows, *shape), dtype or work, sharding=None if on_host else stacked(place))
        for shape, work, place in zip(layout.shapes, layout.work, layout.places, strict=True)
    ]


def stacked(place: Any) -> Any:
    """The place of a stack of vectors, with the vectors along the leading axis."""
    return NamedSharding(place.mesh, PartitionSpec(None, *place.spec)) if isinstance(place, NamedSharding) else place


def allocate(layout: Layout, rows: int, dtype: Any, on_host: bool) -> Basis:
    """A basis of zeros."""
    like = empty_like(layout, rows, dtype, on_host)
    if on_host:
        leaves: list = [np.zeros(x.shape, x.dtype) for x in like]
    else:
        leaves = [jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in like]
    return Basis(leaves, layout, rows, on_host)


def write(basis: Basis, vector: Vector, scale: float, row: int) -> tuple[Basis, Vector]:
    """Store ``scale * vector`` as a row; also what was stored, rounded as it was, as a vector. Consumes it."""
    if not basis.on_host:
        done = [
            device_passes.write(x, v, jnp.asarray(scale, v.dtype), row)
            for x, v in zip(basis.leaves, vector, strict=True)
        ]
        return basis._replace(leaves=[x for x, _ in done]), [v for _, v in done]
    new = [
        host_passes.write(x.reshape(basis.rows, -1)[row], np.asarray(v).reshape(-1), scale).reshape(v.shape)
        for x, v in zip(basis.leaves, vector, strict=True)
    ]
    return basis, new


def project(basis: Basis, vector: Vector, rows: int) -> np.ndarray:
    """Dot products of the first ``rows`` rows with a vector, float64."""
    if basis.on_host:
        return np.sum([host_passes.project(x, v, rows) for x, v in _flat(basis, vector)], axis=0)
    parts = [device_passes.project(x, v, **_static(basis, i, rows)) for i, (x, v) in enumerate(_pairs(basis, vector))]
    return np.sum([np.asarray(part, np.float64).sum(0) for part in parts], axis=0)[:rows]


def subtract(
    basis: Basis, vector: Vector, coefficients: np.ndarray, measure: bool = True
) -> tuple[Vector, np.ndarray, float]:
    """``w = vector - sum_i coefficients_i row_i``, the rows' dot products with ``w``, and its norm.

    One pass over the basis: what is subtracted and what is left are found block by block. Consumes the vector.
    Without ``measure`` the dot products are zeros on the host, which saves nearly half of the pass.
    """
    rows = len(coefficients)
    if basis.on_host:
        new = [host_passes.subtract(x, v, coefficients, measure) for x, v in _flat(basis, vector)]
        out = [w.reshape(v.shape) for (w, _), v in zip(new, vector, strict=True)]
        sums = np.sum([s for _, s in new], axis=0)
    else:
        new = []
        for i, (x, v) in enumerate(_pairs(basis, vector)):
            static = _static(basis, i, rows)
            padded = np.zeros(static["rows"])
            padded[:rows] = coefficients
            new.append(device_passes.subtract(x, v, jnp.asarray(padded, v.dtype), **static))
        out = [w for w, _ in new]
        parts = [np.asarray(s, np.float64).sum(0) for _, s in new]
        sums = np.sum([np.append(s[:rows], s[-1]) for s in parts], axis=0)
    return out, sums[:-1], math.sqrt(sums[-1]) if sums[-1] >= 0 else math.nan


def combine(basis: Basis, coefficients: np.ndarray) -> Vector:
    """``sum_i coefficients_i row_i``."""
    if basis.on_host:
        zeros: list = [np.zeros(s, d) for s, d in zip(basis.layout.shapes, basis.layout.work, strict=True)]
    else:
        like = zip(basis.layout.shapes, basis.layout.work, basis.layout.places, strict=True)
        zeros = [jnp.zeros(s, d, device=p) for s, d, p in like]
    return subtract(basis, zeros, -coefficients, measure=False)[0]


def dot(basis: Basis, x: Vector, y: Vector) -> float:
    """Dot product of two vectors that are not in the basis."""
    one = basis._replace(leaves=[v[None] for v in x], rows=1)
    return float(project(one, y, 1)[0])


def rotate(basis: Basis, rotation: np.ndarray) -> Basis:
    """Row ``i`` becomes ``sum_j rotation[j, i] row_j``, in place; rows beyond the rotation's columns become zero."""
    square = np.zeros((basis.rows, basis.rows))
    square[: rotation.shape[0], : rotation.shape[1]] = rotation
    if basis.on_host:
        for x in basis.leaves:
            host_passes.rotate(x.reshape(basis.rows, -1), square[:, : rotation.shape[1]])
        return basis
    leaves = []
    for i, x in enumerate(basis.leaves):
        static = _static(basis, i, basis.rows)
        del static["rows"]
        leaves.append(device_passes.rotate(x, jnp.asarray(square, basis.layout.work[i]), **static))
    return basis._replace(leaves=leaves)


def _pairs(basis: Basis, vector: Vector):
    return zip(basis.leaves, vector, strict=True)


def _flat(basis: Basis, vector: Vector):
    return ((x.reshape(basis.rows, -1), np.asarray(v).reshape(-1)) for x, v in _pairs(basis, vector))


def _static(basis: Basis, leaf: int, rows: int) -> dict:
    """What the compiled passes are specialised to; few numbers of rows, so that few programs are compiled."""
    place = basis.layout.places[leaf]
    device = next(iter(place.device_set)) if place is not None else jax.devices()[0]
    size = math.prod(basis.layout.shapes[leaf])
    if size <= 1 << 16:
        rows = basis.rows
    step = max(8, -(-basis.rows // 5))
    # A block stays in a CPU's cache; an accelerator wants large ones.
    block = 1 << 13 if device.platform == "cpu" else 1 << 20
    spread = place if isinstance(place, NamedSharding) and len(place.device_set) > 1 else None
    return {"rows": min(-(-rows // step) * step, basis.rows), "block": block, "place": spread}

"""Meshes with explicit axes: code that slices and scans rows runs with automatic axes inside."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from fisher_jax._support.jax_internals import is_traced
from fisher_jax._support.placement import automatic

__all__ = ["Place", "laid_out", "on_mesh_of", "places", "replicated", "replicating", "with_all_rows"]


def replicating(function: Callable, *args: Any) -> Any:
    """``function(*args)``, on a mesh with explicit axes with those axes automatic and the result replicated."""
    return automatic(function, PartitionSpec(), *args)


Place = NamedSharding | None


def places(arrays: list) -> tuple[Place, ...]:
    """Where arrays lie on a mesh with automatic axes; ``None`` for traced arrays and such as are on no mesh.

    On explicit axes the place is part of an array's type, and nobody has to remember it.
    """

    def place(x: Any) -> Place:
        sharding = None if is_traced(x) else getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding) or AxisType.Explicit in sharding.mesh.axis_types:
            return None
        return NamedSharding(sharding.mesh, sharding.spec)

    return tuple(map(place, arrays))


def laid_out(arrays: list, where: tuple[Place, ...]) -> list:
    """The same arrays in these places, inside of ``jit`` too."""
    return [
        x if place is None else jax.lax.with_sharding_constraint(x, place)
        for x, place in zip(arrays, where, strict=True)
    ]


def with_all_rows(x: Array) -> Array:
    """The same array with its first axis whole on every device, where Explicit mesh axes shard it."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or not sharding.spec or sharding.spec[0] is None:
        return x
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:])))


def replicated(x: Array) -> Array:
    """The same array, whole on every device, where Explicit mesh axes shard it."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or not any(sharding.spec):
        return x
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*(None for _ in x.shape))))


def on_mesh_of(tree: Any, like: Any) -> Any:
    """A concrete tree on all devices of the mesh that ``like`` is on, where it is on one."""
    placed = (getattr(x, "sharding", None) for x in jax.tree.leaves(like) if not is_traced(x))
    mesh = next((s.mesh for s in placed if isinstance(s, NamedSharding)), None)
    if mesh is None or any(is_traced(x) for x in jax.tree.leaves(tree)):
        return tree

    def put(x):
        known = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
        return x if known else jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(put, tree)

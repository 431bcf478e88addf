"""Meshes with Explicit axes: linear algebra runs with automatic axes inside, its results in chosen places."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

__all__ = ["automatic", "mesh_of", "spec_of"]


def automatic(function: Callable, out: Any, *args: Any) -> Any:
    """``function(*args)`` with Explicit axes automatic inside, and results placed as the tree ``out`` of specs says.

    Arrays that ``function`` reads must be among ``args``. Without Explicit axes it is just called.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    if not explicit:
        return function(*args)
    return jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=out)(*args)


def spec_of(x: Any) -> PartitionSpec:
    """Where an array lies on the Explicit axes of the mesh; nowhere in particular without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return PartitionSpec()
    return jax.typeof(x).sharding.spec


def mesh_of(*arrays: Any) -> Any:
    """The mesh around the computation, or else that of some arrays; ``None`` where there is none."""
    around = jax.sharding.get_abstract_mesh()
    if not around.empty:
        return around
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays))
    return next((mesh for mesh in meshes if not mesh.empty), None)

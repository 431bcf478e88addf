"""Meshes with explicit axes: code that slices and scans rows runs with automatic axes inside."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

__all__ = ["automatic"]


def automatic(function: Callable, *args: Any) -> Any:
    """``function(*args)``, on a mesh with explicit axes with those axes automatic and the result replicated."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    if not explicit:
        return function(*args)
    return jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=PartitionSpec())(*args)

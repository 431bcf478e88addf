"""Eigendecompositions of many matrices: those of one size together, shared out among the devices."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from fisher_jax._support.jax_internals import is_traced
from fisher_jax.kronecker.factors.forms import Eigen, eigen

__all__ = ["eigen_stacks"]


def eigen_stacks(stacks: list[Array], mesh: Any = None, axis_name: Any = None) -> list[Eigen]:
    """Decompositions of stacks ``[N, n, n]``.

    Under ``jit`` on a mesh with automatic axes, or over ``axis_name`` inside ``jax.shard_map``, each device
    decomposes its share of the matrices of one size, and all get the results.
    """
    groups: dict[tuple, list[int]] = {}
    for i, stack in enumerate(stacks):
        groups.setdefault((stack.shape[-1], stack.dtype), []).append(i)
    found: dict[int, Eigen] = {}
    for members in groups.values():
        whole = _shared_out(jnp.concatenate([stacks[i] for i in members]), mesh, axis_name)
        begin = 0
        for i in members:
            end = begin + len(stacks[i])
            found[i] = Eigen(whole.values[begin:end], whole.vectors[begin:end])
            begin = end
    return [found[i] for i in range(len(stacks))]


def _shared_out(matrices: Array, mesh: Any, axis_name: Any) -> Eigen:
    if len(matrices) == 1 or not is_traced(matrices):
        return eigen(matrices)
    if axis_name is not None:
        return _over_axis(matrices, axis_name)
    if mesh is None:
        return eigen(matrices)
    axes = tuple(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
    return _over_mesh(matrices, mesh, axes) if axes else eigen(matrices)


def _over_axis(matrices: Array, axis_name: Any) -> Eigen:
    """Every device has all matrices, takes its own by its index, and gathers the results."""
    devices = jax.lax.axis_size(axis_name)
    padded = _padded(matrices, devices)
    share = len(padded) // devices
    own = eigen(jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(axis_name) * share, share))
    return Eigen(*(jax.lax.all_gather(x, axis_name, tiled=True)[: len(matrices)] for x in own))


def _over_mesh(matrices: Array, mesh: Any, axes: tuple[str, ...]) -> Eigen:
    spread = PartitionSpec(axes)
    padded = _padded(matrices, math.prod(mesh.shape[name] for name in axes))
    share = jax.shard_map(eigen, mesh=mesh, in_specs=spread, out_specs=spread, axis_names=set(axes), check_vma=False)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Eigen(*(jax.lax.with_sharding_constraint(x, everywhere)[: len(matrices)] for x in share(padded)))


def _padded(matrices: Array, devices: int) -> Array:
    """Zeros after the matrices, up to a whole number for each device."""
    missing = -len(matrices) % devices
    return jnp.concatenate([matrices, jnp.zeros((missing, *matrices.shape[1:]), matrices.dtype)])

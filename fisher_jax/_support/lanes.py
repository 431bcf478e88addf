"""Rows in lanes, one for each device that the rows of a batch lie on, all of them gone through side by side.

A loop over rows that lie on several devices has every device repeat the work of all. Split into ``[lanes, rows of a
lane, ...]``, each device goes through rows of its own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from fisher_jax._support.jax_internals import is_traced
from fisher_jax._support.placement import automatic

__all__ = ["Laid", "Lanes", "lanes_of"]

Tree = Any


@dataclasses.dataclass
class Laid:
    """The axes of meshes that arrays were seen on, for programs that are traced without them (Auto axes).

    Attributes:
        params: those of parameters, and by the names of a mesh's axes.
        rows: those of the rows of a batch.
    """

    params: dict[tuple[str, ...], frozenset[str]] = dataclasses.field(default_factory=dict)
    rows: dict[tuple[str, ...], tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def note_params(self, params: Tree) -> None:
        for x in jax.tree.leaves(params):
            if (sharding := _placed(x)) is not None:
                mesh = tuple(sharding.mesh.axis_names)
                self.params[mesh] = self.params.get(mesh, frozenset()) | _axes(*sharding.spec)

    def note_rows(self, rows: Tree) -> None:
        for x in jax.tree.leaves(rows):
            if (sharding := _placed(x)) is not None and len(x.shape):
                self.rows[tuple(sharding.mesh.axis_names)] = _names(sharding)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How many lanes there are, and on which axes of a mesh.

    Attributes:
        number: of lanes, a divisor of the number of rows.
        axes: empty where only the compiler knows.
        mesh: ``None`` where the axes are empty.
        explicit: whether the axes are part of the types of arrays.
    """

    number: int
    axes: tuple[str, ...] = ()
    mesh: Any = None
    explicit: bool = False

    def each(self, function: Callable[[Tree, Tree], Tree], shared: Tree, rows: Tree) -> Tree:
        """``function(shared, rows)`` of the rows of every lane, stacked.

        On Explicit axes ``function`` runs on what one device has, and must not close over other arrays.

        Raises:
            NotImplementedError: by ``jax.vmap``, for an operation that has no such rule (``jax.lax.ragged_dot``).
        """
        if not self.explicit:
            return jax.vmap(lambda rows: function(shared, rows))(jax.tree.map(self._split, rows))

        def one(shared, rows):
            return jax.tree.map(lambda x: x[None], function(shared, rows))

        lane = PartitionSpec(self.axes)
        return jax.shard_map(
            one, mesh=self.mesh, in_specs=(PartitionSpec(), lane), out_specs=lane, axis_names=set(self.axes),
            check_vma=False,
        )(shared, jax.tree.map(self._spread, rows))  # fmt: skip

    def together(self, function: Callable[..., Tree], found: Tree, *others: Tree) -> Tree:
        """``function`` of what the lanes found, stacked: a tree like ``found``, of the arrays of one lane."""
        if not self.explicit:
            return function(found, *others)
        out = jax.tree.map(lambda x: PartitionSpec(*jax.typeof(x).sharding.spec[1:]), found)
        with jax.sharding.use_abstract_mesh(self.mesh):
            return automatic(function, out, found, *others)

    def joined(self, x: Array) -> Array:
        """Rows that lanes found, ``[lanes, rows of a lane, ...]``, as ``[rows, ...]``."""

        def join(x: Array) -> Array:
            return x.reshape(-1, *x.shape[2:])

        if not self.explicit:
            return join(x)
        lane, _, *rest = jax.typeof(x).sharding.spec
        with jax.sharding.use_abstract_mesh(self.mesh):
            return automatic(join, PartitionSpec(lane, *rest), x)

    def _split(self, x: Array) -> Array:
        x = jnp.asarray(x)
        x = x.reshape(self.number, x.shape[0] // self.number, *x.shape[1:])
        if not self.axes:
            return x
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(self.axes, *free)))

    def _spread(self, x: Array) -> Array:
        sharding = jax.typeof(x).sharding
        rest = () if sharding.mesh.empty else sharding.spec[1:]
        return jax.reshard(x, NamedSharding(self.mesh, PartitionSpec(self.axes, *rest)))


def lanes_of(params: Tree, rows: Tree, number: int, laid: Laid) -> Lanes:
    """The lanes of ``number`` rows that are the first axis of these arrays.

    Axes that parameters lie on too carry no lanes: what is folded would be whole on every device. Outside of ``jit``
    there is one lane.
    """
    laid.note_params(params)
    laid.note_rows(rows)
    if not any(map(is_traced, jax.tree.leaves((params, rows)))):
        return Lanes(1)
    x = next((x for x in jax.tree.leaves(rows) if len(jnp.shape(x))), None)
    sharding = None if x is None else jax.typeof(x).sharding
    if sharding is None or sharding.mesh.empty:
        return Lanes(1)
    mesh = sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit in kinds.values():
        held = frozenset().union(*(_axes(*jax.typeof(p).sharding.spec) for p in jax.tree.leaves(params)))
        axes = tuple(name for name in _names(sharding) if name not in held)
        known = True
    else:
        names = tuple(mesh.axis_names)
        known = names in laid.rows
        held = laid.params.get(names, frozenset())
        possible = laid.rows.get(names, names)
        axes = tuple(name for name in possible if name not in held and kinds[name] == AxisType.Auto)
    size = math.prod(mesh.shape[name] for name in axes)
    lanes = math.gcd(number, size)
    if lanes == 1:
        return Lanes(1)
    if not known or lanes != size:
        return Lanes(lanes)
    return Lanes(lanes, axes, mesh, AxisType.Explicit in kinds.values())


def _placed(x: Any) -> NamedSharding | None:
    """Where an array, or a ``jax.ShapeDtypeStruct``, lies on a mesh with Auto axes, if that can be seen."""
    sharding = None if is_traced(x) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    return None if AxisType.Explicit in sharding.mesh.axis_types else sharding


def _names(sharding: NamedSharding) -> tuple[str, ...]:
    """The axes that the first axis of an array lies on."""
    first = sharding.spec[0] if sharding.spec else None
    return () if first is None else first if isinstance(first, tuple) else (first,)


def _axes(*spec: Any) -> frozenset[str]:
    each = (axis if isinstance(axis, tuple) else (axis,) for axis in spec if axis is not None)
    return frozenset(name for names in each for name in names)

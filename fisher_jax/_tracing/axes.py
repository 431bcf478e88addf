"""Following the axes of a parameter through the layout operations on its way to a use."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._support.jax_internals import broadcast_axes, named_axes, permutation, slice_bounds, unstacked_axis
from fisher_jax._tracing.uses import Segment, Step, Use

__all__ = ["Atom", "UntraceableError", "in_leaf_order", "places_in_leaf", "roles_of_leaf", "trace_axes"]


class UntraceableError(Exception):
    """An axis of a parameter cannot be followed; the message says where."""


@dataclasses.dataclass(frozen=True)
class Atom:
    """A factor of one axis of a leaf, as in a reshape of ``[in, heads * dim]`` to ``[in, heads, dim]``.

    Attributes:
        axis: of the leaf.
        place: its factors in the leaf's own order sort by place.
        size: number of entries.
        whole: false once a slice has cut it.
        start, stride: entry ``i`` stands at ``start + i * stride`` of the axis, beside those of its other factors.
    """

    axis: int
    place: tuple[int, ...]
    size: int
    whole: bool = True
    start: int = 0
    stride: int = 1

    def split(self, outer: int) -> tuple["Atom", "Atom"]:
        inner = self.size // outer
        first = dataclasses.replace(self, place=(*self.place, 0), size=outer, stride=self.stride * inner)
        return first, dataclasses.replace(self, place=(*self.place, 1), size=inner, start=0)


_NOWHERE = -(2**40)  # the start of a part of several factors, which has no one stride

Axes = list[tuple[Atom, ...]]  # for every axis of an array, the atoms it is made of, outermost first


def trace_axes(use: Use) -> tuple[Axes, dict[int, int | None]]:
    """Axes of the operand of a use, and the axes of the leaf that a loop took away, or an index, which is told."""
    first = use.segments[0].source.shape
    axes: Axes = [(Atom(i, (), n),) for i, n in enumerate(first)]
    taken: dict[int, int | None] = {}
    for depth, segment in enumerate(use.segments):
        axes = _through(segment, axes, taken)
        if depth < len(use.loops) and use.loops[depth] == "stacked":
            taken |= {atom.axis: None for atom in axes[0]}
            axes = axes[1:]
    return axes, taken


def _through(segment: Segment, axes: Axes, taken: dict[int, int | None]) -> Axes:
    for step in segment.steps:
        axes = _step(step, axes, taken)
    return axes


def _step(step: Step, axes: Axes, taken: dict[int, int | None]) -> Axes:
    name = step.eqn.primitive.name
    before = tuple(step.eqn.invars[0].aval.shape)
    after = tuple(step.eqn.outvars[step.output].aval.shape)
    if name == "transpose":
        return [axes[i] for i in permutation(step.eqn)]
    if name == "broadcast_in_dim":
        places = {to: i for i, to in enumerate(broadcast_axes(step.eqn))}
        return [axes[places[i]] if i in places else () for i in range(len(after))]
    if name == "tile" and all(m in (1, n) for m, n in zip(before, after, strict=True)):
        return [a if m == n else () for a, m, n in zip(axes, before, after, strict=True)]
    if name == "squeeze":
        return _without(set(named_axes(step.eqn)), axes, taken)
    if name == "unstack":
        own = unstacked_axis(step.eqn)
        cut = [(_cut(a, 1, step.output),) if i == own and a and before[i] > 1 else a for i, a in enumerate(axes)]
        return _without({own}, cut, taken)
    if name == "expand_dims":
        added = set(named_axes(step.eqn))
        rest = iter(axes)
        return [() if i in added else next(rest) for i in range(len(after))]
    if name == "reshape":
        return _reshape(axes, after, taken)
    if name in ("slice", "split"):
        bounds = _bounds(step, len(before))
        return [
            a if m == n or not a else (_cut(a, n, *b),)
            for a, m, n, b in zip(axes, before, after, bounds, strict=True)
        ]
    if name == "rev" and any(axes[i] for i in named_axes(step.eqn)):
        return [_reversed(a) if i in named_axes(step.eqn) else a for i, a in enumerate(axes)]
    if before != after:
        raise UntraceableError(f"{name} from {list(before)} to {list(after)}")
    return axes


def _without(gone: set[int], axes: Axes, taken: dict[int, int | None]) -> Axes:
    """Axes of length 1 removed; what had been cut out of a longer axis is noted."""
    taken |= {atom.axis: atom.start for i in gone for atom in axes[i] if not atom.whole}
    return [atoms for i, atoms in enumerate(axes) if i not in gone]


def _bounds(step: Step, ndim: int) -> list[tuple[int, int]]:
    """Start and stride along each axis, of a ``slice`` or of one result of a ``split``."""
    if step.eqn.primitive.name == "slice":
        starts, _, strides = slice_bounds(step.eqn)
        return [(int(a), int(b)) for a, b in zip(starts, strides or (1,) * ndim, strict=True)]
    start = int(sum(step.eqn.params["sizes"][: step.output]))
    return [(start if i == step.eqn.params["axis"] else 0, 1) for i in range(ndim)]


def _cut(atoms: tuple[Atom, ...], size: int, start: int = 0, stride: int = 1) -> Atom:
    """A part of an axis."""
    if len({atom.axis for atom in atoms}) != 1:
        raise UntraceableError("a slice of several joined axes")
    (atom, *others) = atoms
    return dataclasses.replace(
        atom, size=size, whole=False, start=_NOWHERE if others else atom.start + start * atom.stride,
        stride=atom.stride * stride,
    )  # fmt: skip


def _reversed(atoms: tuple[Atom, ...]) -> tuple[Atom, ...]:
    return tuple(
        dataclasses.replace(a, whole=False, start=a.start + (a.size - 1) * a.stride, stride=-a.stride)
        if a.size > 1
        else a
        for a in atoms
    )


def _reshape(axes: Axes, shape: tuple[int, ...], taken: dict[int, int | None]) -> Axes:
    """Atoms, split where needed, handed out to the new axes in order."""
    atoms = [atom for axis in axes for atom in axis if atom.size != 1]
    if math.prod(a.size for a in atoms) != math.prod(shape):
        raise UntraceableError(f"a reshape to {list(shape)} after a broadcast")
    taken |= {atom.axis: atom.start for axis in axes for atom in axis if atom.size == 1 and not atom.whole}
    result: Axes = []
    for size in shape:
        own: list[Atom] = []
        missing = size
        while missing > 1:
            atom = atoms.pop(0)
            if missing % atom.size == 0:
                own.append(atom)
                missing //= atom.size
                continue
            if atom.size % missing:
                raise UntraceableError(f"a reshape to {list(shape)} that mixes axes")
            first, rest = atom.split(missing)
            own.append(first)
            atoms.insert(0, rest)
            missing = 1
        result.append(tuple(own))
    return result


def roles_of_leaf(use: Use, ndim: int) -> tuple[str | None, ...]:
    """The role of every axis of the leaf in this use: those of `Use.roles`, ``loop``, or ``None`` (of length 1).

    Raises:
        UntraceableError: an axis that has two roles, or cannot be followed.
    """
    axes, taken = trace_axes(use)
    found: list[set[str]] = [{"loop"} if i in taken else set() for i in range(ndim)]
    for role, atoms in zip(use.roles, axes, strict=True):
        for atom in atoms:
            found[atom.axis].add(role)
    for i, roles in enumerate(found):
        if len(roles) > 1:
            raise UntraceableError(f"axis {i} is {' and '.join(sorted(roles))} at once")
    return tuple(next(iter(roles), None) for roles in found)


def places_in_leaf(use: Use, axes: Sequence[int]) -> dict[int, np.ndarray]:
    """For every axis of the leaf that the operand's axes ``axes`` are made of, or that an index took away, the places
    of the operand's entries along it, int64, over ``axes``.

    Raises:
        UntraceableError: an axis that cannot be followed.
    """
    traced, taken = trace_axes(use)
    if any(at is not None and at < 0 for at in taken.values()):
        raise UntraceableError("a slice of an axis that was split and joined again")
    found: dict[int, np.ndarray] = {axis: np.array(at) for axis, at in taken.items() if at is not None}
    for i, axis in enumerate(axes):
        shape = [1] * len(axes)
        shape[i] = math.prod(atom.size for atom in traced[axis])
        index = np.indices([atom.size for atom in traced[axis]]).reshape(len(traced[axis]), shape[i])
        for atom, own in zip(traced[axis], index, strict=True):
            if atom.start < 0:
                raise UntraceableError("a slice of an axis that was split and joined again")
            place = (atom.start + own * atom.stride).reshape(shape)
            found[atom.axis] = found.get(atom.axis, np.array(0)) + place
    return found


def in_leaf_order(use: Use, sums: Array, axes: Sequence[int]) -> Array:
    """From the operand's axes ``axes`` to the axes of the leaf that they are."""
    traced, _ = trace_axes(use)
    atoms = [atom for i in axes for atom in traced[i]]
    order = sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, atoms[i].place))
    apart = jnp.transpose(sums.reshape([atom.size for atom in atoms]), order)
    leaf = use.segments[0].source.shape
    return apart.reshape([leaf[i] for i in sorted({atom.axis for atom in atoms})])

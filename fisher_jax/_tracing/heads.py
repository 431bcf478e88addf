"""From the units of attention kernels to heads: as the program has them, or as a name says."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._tracing.axes import UntraceableError, places_in_leaf
from fisher_jax._tracing.uses import Spec
from fisher_jax.groups import Heads

__all__ = ["HeadSums", "by_heads", "by_program", "named_part"]

_WAY_OUT = "give a function (path, shape) -> group that returns fj.groups.tensor, or another, for it"


@dataclasses.dataclass(frozen=True)
class HeadSums:
    """How the units of one leaf are summed.

    Attributes:
        axes: of the leaf, along which its units lie.
        output: whether they are inputs (of an output kernel).
        finish: from sums ``[loops, *units]`` to sums over heads ``[loops, heads]``, or to a dict of these by part.
    """

    axes: tuple[int, ...]
    output: bool
    finish: Callable


def named_part(heads: Heads, leaf: int, names: list[str], specs: list[Spec]) -> str | None:
    """What a leaf is by its name, where the program does not say otherwise; see `fisher_jax.groups.head`.

    Args:
        names: of all leaves.
        specs: all uses of all leaves.
    """
    part = heads.part_of(names[leaf])
    if part is None:
        return None
    named = [heads.part_of(name) for name in names]
    parts = [p for spec in specs for p in spec.use.parts]
    own = [s for s in specs if s.leaf == leaf]
    kernels = {i for s in own if s.use.kind == "bias" for i in s.use.follows}
    if kernels:
        return part if {named_part(heads, i, names, specs) for i in kernels} == {part} else None
    if part != "output":
        into = {named[s.leaf] for s in specs if leaf in s.use.follows and s.use.kind != "bias"}
        return part if into <= {"output"} and not (into and parts) else None
    follows = {named[i] for s in own for i in s.use.follows}
    if not follows <= {"query", "key", "value", "fused"}:
        return None
    # Every attention that the program shows has its output kernel elsewhere; or nothing attends at all.
    open_ends = {p.attention for p in parts} - {p.attention for p in parts if p.name == "output"}
    attends = any(named_part(heads, i, names, specs) for i, p in enumerate(named) if p not in (None, "output"))
    return part if open_ends or (attends and not parts) else None


def by_program(path: str, shape: tuple[int, ...], specs: Sequence[Spec], heads: Heads) -> HeadSums:
    """The heads of a leaf that the program shows in an attention.

    Raises:
        ValueError: other numbers of heads than those given; units in no head, or in several.
    """
    try:
        placed = [
            (part, spec.use.where, places_in_leaf(spec.use, part.axes)) for spec in specs for part in spec.use.parts
        ]
    except UntraceableError as error:
        raise ValueError(
            f"the units of parameter {path} cannot be followed to its heads ({error}); {_WAY_OUT}"
        ) from None
    for part, where, _ in placed:
        _check_number(path, heads, part.name, part.number, part.where or where)
    first, where, _ = placed[0]
    axes = tuple(sorted({axis for _, _, places in placed for axis in places}))
    mixed = {part.name == "output" for part, _, _ in placed}
    if len(mixed) > 1 or any(set(places) != set(axes) for _, _, places in placed):
        raise ValueError(f"parameter {path} is {_names(placed)} in several ways ({where}); {_WAY_OUT}")
    tables: dict[str, np.ndarray] = {}
    for part, _, places in placed:
        table = tables.setdefault(part.name, np.full([shape[i] for i in axes], -1))
        index = np.broadcast_arrays(*(places[i] for i in axes), part.heads)
        own, new = tuple(index[:-1]), index[-1]
        old = table[own]
        if ((old >= 0) & (new >= 0) & (old != new)).any():
            raise ValueError(
                f"a unit of parameter {path} is in one head here and in another there ({where}); {_WAY_OUT}"
            )
        table[own] = np.maximum(old, new)
    # Layers that the program takes out one by one keep apart.
    for at in reversed(range(len(axes))):
        taken = all(places[axes[at]].ndim == 0 for _, _, places in placed)
        if taken and all((t == t.take([0], at)).all() for t in tables.values()):
            axes = axes[:at] + axes[at + 1 :]
            tables = {name: t.take(0, at) for name, t in tables.items()}
    covered = np.any([t >= 0 for t in tables.values()], 0)
    if not covered.all():
        raise ValueError(
            f"{int(covered.sum())} of the {covered.size} units of parameter {path} are {_names(placed)} of heads at "
            f"{first.where}, the others are not; {_WAY_OUT}"
        )
    for name, table in tables.items():
        _check_size(path, heads, name, table)
    return HeadSums(axes, first.name == "output", _finish(tables))


def _names(placed: list) -> str:
    return " and ".join(dict.fromkeys(part.name for part, _, _ in placed))


def _check_number(path: str, heads: Heads, name: str, number: int, where: str) -> None:
    option = "num_kv_heads" if name in ("key", "value") else "num_heads"
    wanted = heads.num_kv_heads if name in ("key", "value") else heads.num_heads
    if number != wanted:
        raise ValueError(
            f"parameter {path} is the {name} of {number} heads at {where}, and fj.groups.head has {option}={wanted}: "
            f"give {option}={number}, or a function (path, shape) -> group where layers differ"
        )


def _check_size(path: str, heads: Heads, name: str, table: np.ndarray) -> None:
    size = int((table == 0).sum())
    if heads.head_dim and name in ("query", "key") and size != heads.head_dim:
        raise ValueError(
            f"parameter {path} is the {name} of heads of size {size}, and fj.groups.head has "
            f"head_dim={heads.head_dim}"
        )


def _finish(tables: dict[str, np.ndarray]) -> Callable:
    flat = {name: table.ravel() for name, table in tables.items()}
    orders = {}
    for name, table in flat.items():
        number = int(table.max()) + 1
        order = np.argsort(table, kind="stable")[int((table < 0).sum()) :]
        sizes = np.bincount(table[table >= 0], minlength=number)
        orders[name] = order, number, None if (sizes == sizes[0]).all() else table[order]
    ndim = next(iter(tables.values())).ndim

    def summed(sums: Array, order: np.ndarray, number: int, uneven: np.ndarray | None) -> Array:
        lead = sums.shape[: sums.ndim - ndim]
        units = sums.reshape(*lead, -1)
        if not np.array_equal(order, np.arange(units.shape[-1])):
            units = units[..., order]
        if uneven is None:
            return units.reshape(*lead, number, -1).sum(-1)
        return jnp.zeros((*lead, number), sums.dtype).at[..., uneven].add(units)

    def finish(sums: Array):
        found = {name: summed(sums, *how) for name, how in orders.items()}
        return found if len(found) > 1 else next(iter(found.values()))

    return finish


def by_heads(path: str, heads: Heads, part: str, units: tuple[int, ...]) -> tuple[Callable, int]:
    """A function from sums over units ``[..., *units]`` to sums over heads ``[..., heads]``, and the size of a head.

    For ``fused`` it returns a dict of three.

    Args:
        path: of the kernel, for messages.
        part: of the attention, see ``Heads.part_of``.
        units: lengths of the axes of units in the kernel: ``(heads * dim,)`` or ``(heads, dim)`` or ``(dim, heads)``.

    Raises:
        ValueError: units that are no whole number of heads, or not of the given size.
    """
    total = 1
    for n in units:
        total *= n
    if part == "fused":
        return _fused(path, heads, units, total)
    number = heads.num_kv_heads if part in ("key", "value") else heads.num_heads
    dim = heads.head_dim or total // number
    _check(path, part, number, dim, number * dim, total)
    swapped = heads.layout == "units"
    if heads.layout is None and 1 not in (number, dim):
        if len(units) != 2 or number == dim:
            raise ValueError(
                f"parameter {path} is taken for the {part} kernel of {number} heads of {dim} by its name, and no "
                "attention of the program shows which of its units belong to which head: say with layout='heads' of "
                "fj.groups.head that those of one head lie side by side, or layout='units' that one of each head do"
            )
        swapped = units == (dim, number)
    if len(units) > 1 and units != ((dim, number) if swapped else (number, dim)):
        raise ValueError(
            f"parameter {path} is taken for the {part} kernel of {number} heads of {dim} by its name, but has axes "
            f"of units {list(units)}: correct num_heads, head_dim or layout of fj.groups.head"
        )

    def finish(sums: Array) -> Array:
        lead = sums.shape[: sums.ndim - len(units)]
        split = sums.reshape(*lead, dim, number) if swapped else sums.reshape(*lead, number, dim)
        return split.sum(-2 if swapped else -1)

    return finish, dim


def _check(path: str, part: str, number: int, dim: int, wanted: int, total: int) -> None:
    if wanted != total:
        raise ValueError(
            f"parameter {path} is taken for the {part} kernel of {number} heads of {dim} by its name, but has "
            f"{total} units: correct num_heads, num_kv_heads or head_dim, or the pattern {part}= of fj.groups.head"
        )


def _fused(path: str, heads: Heads, units: tuple[int, ...], total: int) -> tuple[Callable, int]:
    if heads.fused_layout is None:
        raise ValueError(
            f"parameter {path} holds query, key and value together: say how with fused_layout='q k v' or 'heads' in "
            "fj.groups.head"
        )
    if len(units) != 1:
        raise ValueError(
            f"parameter {path} holds query, key and value in the axes {list(units)}; fused layouts are for one axis "
            "of units: give a function (path, shape) -> reduction"
        )
    q, kv = heads.num_heads, heads.num_kv_heads
    dim = heads.head_dim or total // (q + 2 * kv)
    _check(path, "fused", q + 2 * kv, dim, (q + 2 * kv) * dim, total)

    def finish(sums: Array) -> dict[str, Array]:
        lead = sums.shape[:-1]
        if heads.fused_layout == "q k v":
            every = sums.reshape(*lead, q + 2 * kv, dim).sum(-1)
            query, key, value = jnp.split(every, [q, q + kv], axis=-1)
        else:
            every = sums.reshape(*lead, kv, q // kv + 2, dim).sum(-1)
            query = every[..., : q // kv].reshape(*lead, q)
            key, value = every[..., -2], every[..., -1]
        return {"query": query, "key": key, "value": value}

    return finish, dim

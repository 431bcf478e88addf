"""Which axes of every kernel are inputs and which are outputs, and what a group is then."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from fisher_jax import groups as groups_room
from fisher_jax._support.jax_internals import is_traced
from fisher_jax._tracing.axes import UntraceableError, roles_of_leaf
from fisher_jax._tracing.experts import expert_axes
from fisher_jax._tracing.heads import by_heads, by_program, named_part
from fisher_jax._tracing.uses import Spec
from fisher_jax.groups import Experts, Group, Heads

__all__ = ["Grouping", "groupings", "sizes"]

Tree = Any
Roles = tuple[str | None, ...]

_KEPT = {"row": ("loop", "row", "both"), "column": ("loop", "column", "both"), "tensor": ("loop",)}
_WAYS_OUT = "use fj.groups.param, or a function (path, shape) -> group or reduction that decides for this parameter"


@dataclasses.dataclass(frozen=True)
class Grouping:
    """From squares of one leaf to its groups.

    Attributes:
        path: of the leaf.
        keep: axes that stay; the others are summed. ``None`` where only ``finish`` knows.
        finish: what is done with the sums.
        side: of the operand that stays, ``row``, ``column`` or ``tensor`` (neither); ``None`` for anything else.
        head_dim: of attention heads that are taken for such by their name; 0 where the program shows them.
    """

    path: str
    keep: tuple[int, ...] | None
    finish: Callable[[Array], Tree] = lambda sums: sums
    side: str | None = None
    head_dim: int | None = None

    def __call__(self, squares: Array) -> Tree:
        if self.keep is None:
            return self.finish(squares)
        return self.finish(jnp.sum(squares, [i for i in range(squares.ndim) if i not in self.keep]))


def groupings(groups: Any, params: Tree, specs: Callable[[], list[Spec]] | None) -> list[Grouping | None]:
    """For every leaf how its squares are reduced; ``None`` for a leaf that is not floating.

    Args:
        groups: see ``fj.group_fisher``.
        params: arrays or ``jax.ShapeDtypeStruct``s.
        specs: finds all uses of the parameters in a traced loss; ``None`` without an example.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    several = isinstance(groups, Mapping)
    named = dict(groups) if several else {"": groups}
    chosen = [{k: _choose(g, path, x) for k, g in named.items()} for path, x in leaves]
    oriented = [c.name for choice in chosen for c in choice.values() if isinstance(c, Group) and c.name != "param"]
    if oriented and specs is None:
        name = oriented[0]
        raise ValueError(
            f"groups={name!r} needs example=, a batch of arrays or jax.ShapeDtypeStructs: it is traced to find the "
            "orientation of every kernel; without it only fj.groups.param works"
        )
    found = specs() if specs is not None and oriented else []
    if not any(spec.use.is_followed for spec in found):  # of data that the program holds itself no rows are known
        found = [dataclasses.replace(s, use=dataclasses.replace(s.use, same_for_all=False)) for s in found]
    result: list[Grouping | None] = []
    heads: list[tuple[int, str]] = []
    slashed = [_slashed(path) for path, _ in leaves]
    for i, ((path, x), choice) in enumerate(zip(leaves, chosen, strict=True)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            result.append(None)
            continue
        name = jax.tree_util.keystr(path)
        part = {k: named_part(c, i, slashed, found) if isinstance(c, Heads) else None for k, c in choice.items()}
        own = {k: _leaf(name, part[k], x, c, [s for s in found if s.leaf == i]) for k, c in choice.items()}
        heads += [(one.head_dim, one.path) for one in own.values() if one.head_dim is not None]
        result.append(_several(name, own) if several else own[""])
    if any(isinstance(c, Experts) for choice in chosen for c in choice.values()):
        _check_experts(found)
    if any(isinstance(c, Heads) for choice in chosen for c in choice.values()):
        _check_heads(dict(heads), leaves)
    return result


def _slashed(path: tuple) -> str:
    while len(path) > 1 and getattr(path[-1], "name", None) in ("value", "raw_value"):
        path = path[:-1]  # the box of a library, whose attribute it is
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _choose(groups: Any, path: tuple, x: Any) -> Any:
    """A `Group`, or the user's own reduction, of one leaf."""
    if isinstance(groups, Heads | Experts):
        return groups
    if not callable(groups):
        return groups_room.resolve(groups)
    name = jax.tree_util.keystr(path)
    found = groups(name, tuple(x.shape))
    if isinstance(found, Heads | Experts):
        return found
    if isinstance(found, Group | str):
        return groups_room.resolve(found)
    if not callable(found):
        raise ValueError(
            f"groups({name!r}, {tuple(x.shape)}) returns a group or a function of squares, found "
            f"{type(found).__name__}"
        )
    return found


def _leaf(path: str, part: str | None, x: Any, choice: Any, specs: list[Spec]) -> Grouping:
    if not isinstance(choice, Group):
        return Grouping(path, None, choice)
    if choice.name == "param":
        return Grouping(path, tuple(range(x.ndim)))
    if not specs:
        # The loss does not use it: nothing tells its orientation, and its only value is zero.
        return Grouping(path, (), side="tensor")
    if isinstance(choice, Experts):
        return _experts(path, x, specs)
    shown = isinstance(choice, Heads) and any(spec.use.parts for spec in specs)
    if choice.name == "tensor" or (isinstance(choice, Heads) and not shown and part is None):
        return _kept(path, "tensor", _loops(specs, x.ndim))
    roles = _roles(path, x.ndim, specs)
    if isinstance(choice, Heads):
        return _shown_heads(path, x, choice, roles, specs) if shown else _heads(path, str(part), x, choice, roles)
    if "grouped" in roles and choice.name == "column":
        raise ValueError(
            f"parameter {path} is the kernel of a grouped convolution, whose input axis holds the inputs of one "
            f"group: it has no columns; {_WAYS_OUT}"
        )
    return _kept(path, choice.name, roles)


def _experts(path: str, x: Any, specs: list[Spec]) -> Grouping:
    try:
        keep = expert_axes(specs)
    except UntraceableError as error:
        raise ValueError(f"the experts of parameter {path} cannot be told apart ({error}); {_WAYS_OUT}") from None
    loops = [i for i, role in enumerate(_loops(specs, x.ndim)) if role == "loop"]
    return Grouping(path, tuple(sorted({*loops, *keep})))


def _check_experts(specs: list[Spec]) -> None:
    if all(spec.use.experts is None for spec in specs):
        raise ValueError(
            "no parameter is an expert's: over none decides what was ranked by top_k, sort or argmax alone; "
            "use fj.groups.tensor, or a function (path, shape) -> group or reduction"
        )


def _kept(path: str, group: str, roles: Roles) -> Grouping:
    return Grouping(path, tuple(i for i, role in enumerate(roles) if role in _KEPT[group]), side=group)


def _roles(path: str, ndim: int, specs: list[Spec]) -> Roles:
    """Roles that all uses agree on; uses that say nothing (weight decay beside a product) do not count."""
    told = [s for s in specs if s.use.kind != "generic"]
    if not told:
        if ndim <= 1:
            # A vector has one natural reading: every entry its own.
            return ("both",) * ndim
        use = specs[0].use
        place = f" at {use.where}" if use.where else ""
        raise ValueError(
            f"parameter {path} is used by {use.primitive}{place} in no way that tells its rows from its columns; "
            f"{_WAYS_OUT}"
        )
    found: dict[Roles, str] = {}
    for spec in told:
        if spec.use.same_for_all and not spec.use.ids and spec.use.kind in ("embedding", "scale"):
            raise ValueError(
                f"parameter {path} meets constants alone ({spec.use.primitive} at {spec.use.where}) before it meets "
                f"data, where its rows cannot be told from its columns; {_WAYS_OUT}"
            )
        try:
            found.setdefault(roles_of_leaf(spec.use, ndim), spec.use.where)
        except UntraceableError as error:
            raise ValueError(
                f"the axes of parameter {path} cannot be followed to its use at {spec.use.where} ({error}); "
                f"{_WAYS_OUT}"
            ) from None
    roles, *others = found
    for other in others:
        roles = tuple(_agree(path, i, a, b, found) for i, (a, b) in enumerate(zip(roles, other, strict=True)))
    return roles


def _agree(path: str, axis: int, a: str | None, b: str | None, found: dict[Roles, str]) -> str | None:
    if a is None or b is None or a == b:
        return a or b
    lines = " and ".join(dict.fromkeys(found.values()))
    raise ValueError(f"axis {axis} of parameter {path} is {a} in one use and {b} in another ({lines}); {_WAYS_OUT}")


def _loops(specs: list[Spec], ndim: int) -> Roles:
    """Axes of stacked layers alone; no orientation is needed."""
    for spec in specs:
        loops = sum(loop == "stacked" for loop in spec.use.loops)
        plain = not any(segment.steps for segment in spec.use.segments[: len(spec.use.loops)])
        if loops and plain:
            return ("loop",) * loops + (None,) * (ndim - loops)
    return (None,) * ndim


def _shown_heads(path: str, x: Any, heads: Heads, roles: Roles, specs: list[Spec]) -> Grouping:
    """Heads as the program has them."""
    found = by_program(path, tuple(x.shape), specs, heads)
    loops = [i for i, role in enumerate(roles) if role == "loop" and i not in found.axes]
    keep = tuple(sorted([*loops, *found.axes]))
    order = [keep.index(i) for i in (*loops, *found.axes)]
    side = None if any(i not in loops for i in range(len(loops))) else "column" if found.output else "row"
    return Grouping(path, keep, lambda sums: found.finish(jnp.transpose(sums, order)), side, 0)


def _heads(path: str, part: str, x: Any, heads: Heads, roles: Roles) -> Grouping:
    side = ("column", "both") if part == "output" else ("row", "both")
    keep = tuple(i for i, role in enumerate(roles) if role == "loop" or role in side)
    if part == "output" and not any(role == "column" for role in roles):
        return _kept(path, "tensor", roles)  # the bias of the output kernel is in no head
    loops = sum(role == "loop" for role in roles)
    if list(keep[:loops]) != [i for i, role in enumerate(roles) if role == "loop"]:
        raise ValueError(f"parameter {path} has its axes of stacked layers behind its units; {_WAYS_OUT}")
    finish, head_dim = by_heads(path, heads, part, tuple(x.shape[i] for i in keep[loops:]))
    return Grouping(path, keep, finish, "column" if part == "output" else "row", head_dim)


def _several(path: str, parts: dict[str, Grouping]) -> Grouping:
    """Several groups of one leaf, as a dict; from the sums of the finest where the others are coarser."""
    finest = max(parts.values(), key=lambda one: -1 if one.keep is None else len(one.keep))
    if finest.keep is None or any(p.keep is None or not set(p.keep) <= set(finest.keep) for p in parts.values()):
        return Grouping(path, None, lambda squares: {name: one(squares) for name, one in parts.items()})
    kept = finest.keep

    def finish(sums: Array) -> Tree:
        return {
            name: one.finish(jnp.sum(sums, tuple(i for i, axis in enumerate(kept) if axis not in (one.keep or ()))))
            for name, one in parts.items()
        }

    return Grouping(path, kept, finish, finest.side)


def _check_heads(sizes: dict[int, str], leaves: list) -> None:
    named = {size: path for size, path in sizes.items() if size}
    if len(named) > 1:
        told = " and ".join(f"{path} of size {size}" for size, path in named.items())
        raise ValueError(f"attention kernels have heads of one size, found {told}: give head_dim= or name patterns")
    if not sizes:
        names = ", ".join(_slashed(path) for path, _ in leaves[:4])
        raise ValueError(
            f"no parameter is a query, key, value or output kernel by its name (the first are {names}); give "
            "fj.groups.head(..., query=, key=, value=, output=) patterns"
        )


def _count(one: Grouping, x: Any) -> Tree:
    """Entries in every group, float32: its own reduction of ones."""
    if one.keep is None:
        return one(jnp.ones(x.shape, jnp.float32))
    shape = [x.shape[i] for i in one.keep]
    summed = [n for i, n in enumerate(x.shape) if i not in one.keep]
    return one.finish(jnp.full(shape, math.prod(summed), jnp.float32))


def sizes(found: list[Grouping | None], params: Tree) -> Tree:
    """Entries in every group, a tree like the statistic."""
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(
        treedef, [None if one is None else _count(one, x) for one, x in zip(found, leaves, strict=True)]
    )


def as_sharded(found: list[Grouping | None], params: Tree, like: Tree) -> Tree:
    """Shapes of a statistic with the shardings of their parameters, where these are concrete and sharded arrays."""
    following = iter(found)

    def leaf(x, shape):
        one = next(following)
        return shape if one is None else _sharded(one, x, shape)

    return jax.tree.map(leaf, params, like)


def _sharded(one: Grouping, x: Any, shape: Tree) -> Tree:
    sharding = None if is_traced(x) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or one.keep is None or not isinstance(shape, jax.ShapeDtypeStruct):
        return shape
    spec = [*sharding.spec, *(None for _ in range(x.ndim - len(sharding.spec)))]
    kept = [spec[i] for i in one.keep]
    if shape.shape != tuple(x.shape[i] for i in one.keep):
        kept = [None] * len(shape.shape)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(sharding.mesh, PartitionSpec(*kept)))

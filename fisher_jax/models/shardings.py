"""Where the parameters of a decoder lie on a mesh: rules by the role of an axis, or any sharding of one's own."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from fisher_jax._support.errors import InputError
from fisher_jax.models.weight_names import flatten

__all__ = ["sharding_rules", "shardings_of"]

ROLES = ("layers", "vocab", "positions", "width", "heads", "kv_heads", "mlp", "experts")
# Of the axes of a leaf, without those that are stacked; biases have the last one alone.
KERNELS = {
    "attention/q": ("width", "heads"), "attention/k": ("width", "kv_heads"), "attention/v": ("width", "kv_heads"),
    "attention/o": ("heads", "width"), "mlp/gate": ("width", "mlp"), "mlp/up": ("width", "mlp"),
    "mlp/down": ("mlp", "width"), "mlp/router": ("width", "experts"), "mlp/experts/gate": ("experts", "width", "mlp"),
    "mlp/experts/up": ("experts", "width", "mlp"), "mlp/experts/down": ("experts", "mlp", "width"),
}  # fmt: skip
OUTSIDE = {
    "embedding": ("vocab", "width"), "head": ("vocab", "width"), "head_bias": ("vocab",),
    "positions": ("positions", "width"),
}  # fmt: skip

Axes = str | tuple[str, ...]


def sharding_rules(mesh: Mesh, **roles: Axes) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """``sharding=`` of `load`: each axis of a parameter lies over the mesh axes that its role is given here.

    Roles are ``vocab`` (rows of embedding and head), ``width`` (of the residual stream), ``heads`` (outputs of the
    query kernel, inputs of the output kernel), ``kv_heads`` (outputs of the key and value kernels), ``mlp``,
    ``experts``, ``positions`` (learned ones) and ``layers``. Axes of other roles are whole everywhere, as are the
    scales of queries and keys.

    Args:
        mesh: any mesh, with automatic or explicit axes.
        roles: the name of a mesh axis, or several names, for each role.

    Returns:
        A function ``(path, shape) -> NamedSharding``.

    Raises:
        InputError: an unknown role or mesh axis. The function raises it for an axis that the devices cannot share
            evenly, and for a parameter of which two axes would lie over one mesh axis.

    Example:
        >>> import fisher_jax as fj, jax
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> rules = fj.models.sharding_rules(mesh, vocab="model", heads="model", mlp="model", width="data")
        >>> tuple(rules("layers/mlp/down/kernel", (2, 16, 8)).spec)
        (None, 'model', 'data')
    """
    for role, axes in roles.items():
        if role not in ROLES:
            raise InputError(f"no axis has the role {role!r}; roles are {', '.join(ROLES)}")
        if unknown := [axis for axis in names_of(axes) if axis not in mesh.axis_names]:
            raise InputError(
                f"{role}= names the mesh axis {unknown[0]!r}, but the mesh has {', '.join(map(str, mesh.axis_names))}"
            )

    def rule(path: str, shape: tuple[int, ...]) -> NamedSharding:
        own = roles_of(path, len(shape))
        spec: list[Axes | None] = []
        for role, size in zip(own, shape, strict=True):
            axes = roles.get(role) if role else None
            devices = math.prod(mesh.shape[name] for name in names_of(axes))
            if size % devices:
                raise InputError(
                    f"{path} has an axis of {size:,} for {role}, which the {devices} devices of {axes!r} cannot "
                    f"share evenly; leave {role}= out, or give it another mesh axis"
                )
            spec.append(axes)
        used = [name for axes in spec for name in names_of(axes)]
        if twice := [name for name in used if used.count(name) > 1]:
            several = [role for role in own if role and twice[0] in names_of(roles.get(role))]
            raise InputError(
                f"{' and '.join(several)} of {path} would both lie over the mesh axis {twice[0]!r}; give one of them "
                "another mesh axis, or leave it out"
            )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return rule


def names_of(axes: Axes | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def roles_of(path: str, ndim: int) -> tuple[str | None, ...]:
    """The role of every axis of a parameter."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    part, leaf = path.rsplit("/", 1)
    stacked = ("layers",) if part.startswith("layers/") else ()
    part = part.removeprefix("layers/")
    if part in KERNELS:
        own = KERNELS[part]
        return (*stacked, *(own if leaf == "kernel" else own[-1:]))
    if part in ("attention/q_norm", "attention/k_norm"):
        return (*stacked, *(None,) * (ndim - len(stacked)))
    return (*stacked, "width")


def shardings_of(sharding: Any, shapes: Any) -> dict[str, Sharding]:
    """The sharding of every path; an ``InputError`` where one is missing or does not fit its shape."""
    flat = flatten(shapes)
    if isinstance(sharding, Sharding):
        found = dict.fromkeys(flat, sharding)
    elif callable(sharding):
        found = {path: sharding(path, leaf.shape) for path, leaf in flat.items()}
    elif isinstance(sharding, dict) and str(jax.tree.structure(sharding)) == str(jax.tree.structure(shapes)):
        found = flatten(sharding)
    else:
        raise InputError(
            f"sharding= is a {type(sharding).__name__}, but must be a function (path, shape) -> Sharding, one "
            f"Sharding, or a tree of them with the leaves {', '.join(flat)}"
        )
    for path, one in found.items():
        check_fits(path, one, flat[path].shape)
    return found


def check_fits(path: str, sharding: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(sharding, Sharding):
        raise InputError(
            f"sharding= gives {type(sharding).__name__} for {path}, but must give a jax.sharding.Sharding"
        )
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise InputError(
            f"{path} has the shape {list(shape)}, which its sharding {sharding} cannot cut into equal parts; give it "
            "another one"
        ) from error
    if not sharding.addressable_devices:
        raise InputError(
            f"process {jax.process_index()} has no device in the sharding of {path}; each process needs one"
        )

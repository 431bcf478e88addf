"""From the output units of attention kernels to heads."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax.groups import Heads

__all__ = ["by_heads"]


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
    swapped = len(units) == 2 and units == (dim, number) and dim != number

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

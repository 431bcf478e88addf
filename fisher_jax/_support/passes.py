"""Backward passes of many cotangents: together on an accelerator, one after the other on a CPU."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

__all__ = ["each"]

Tree = Any


def each(function: Callable[..., Tree], *arguments: Array | Tree) -> Tree:
    """``function`` of every row of ``arguments``, stacked.

    A CPU takes one row after the other. A pass through a batch fills its cores, so that passes together are no faster
    from a few hundred tokens on, and a loop is compiled as the model's own backward pass is. Compilers get vmapped
    pullbacks wrong: jaxlib 0.10.2 fuses ``g + sum(x * g)`` to wrong numbers beyond 128 KiB where ``g`` has an axis
    that ``x`` lacks, which is what vmap makes of every norm.
    """
    return jax.lax.platform_dependent(
        *arguments,
        cpu=lambda *rows: jax.lax.map(lambda row: function(*row), rows),
        default=lambda *rows: jax.vmap(function)(*rows),
    )

"""Trees of which ``optax.masked`` and ``optax.multi_transform`` show a part."""

from typing import Any

import optax

__all__ = ["is_masked"]


def is_masked(x: Any) -> bool:
    """Whether this place of a tree belongs to another transformation."""
    return isinstance(x, optax.MaskedNode)

"""Where the rows and positions of a batch lie among the tokens of a use."""

import numpy as np
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.jax_internals import contraction
from fisher_jax._tracing.dense import token_axes
from fisher_jax._tracing.ids import NOBODY, Ids, Lost
from fisher_jax._tracing.provenance import Use

__all__ = ["Unfollowed", "mask_on", "rows_of"]


class Unfollowed(Exception):
    """Rows or positions of a use are not known; the message says where they were lost."""


def _over_tokens(use: Use, shape: tuple[int, ...], kind: str) -> list[np.ndarray]:
    """Ids of one kind over the tokens of a use, ``[*loops, T]`` each; of length 1 where they do not vary.

    Args:
        use: of kind dense, embedding or conv.
        shape: of what it meets, without loops (of its output, for a convolution).

    Raises:
        Unfollowed: they were lost on the way.
    """
    found = []
    for one in use.ids:
        if one.kind != kind:
            continue
        if isinstance(one, Lost):
            raise Unfollowed(str(one))
        found.append(_ravelled(one, use, shape))
    return found


def _ravelled(one: Ids, use: Use, shape: tuple[int, ...]) -> np.ndarray:
    loops = len(use.loops)
    lead, own = one.values.shape[:loops], one.values.shape[loops:]
    tokens = input_token_axes(use, len(own))
    if any(n > 1 for i, n in enumerate(own) if i not in tokens):
        raise Unfollowed(f"the product at {use.where} meets several {one.kind}s at once")
    order = [*range(loops), *(loops + i for i in tokens), *(loops + i for i in range(len(own)) if i not in tokens)]
    values = one.values.transpose(order)
    if all(own[i] == 1 for i in tokens):
        return values.reshape(*lead, 1)
    full = np.broadcast_to(
        values, (*lead, *(shape[i] for i in tokens), *(1 for _ in range(len(own) - len(tokens))))
    )
    return full.reshape(*lead, -1)


def input_token_axes(use: Use, ndim: int) -> tuple[int, ...]:
    """Axes along which tokens lie in what a use meets (in its output, for a convolution)."""
    if use.kind == "dense":
        contracted, batch = (sides[1 - use.index] for sides in contraction(use.options))
        return tuple(i for i in range(ndim) if i not in (*contracted, *batch))
    if use.kind == "embedding":
        return tuple(range(ndim - 1))
    return token_axes(use, ndim)

"""Where the rows and positions of a batch lie among the tokens of a use."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._support.jax_internals import contraction
from fisher_jax._tracing.dense import token_axes
from fisher_jax._tracing.ids import NOBODY, Ids, Lost
from fisher_jax._tracing.uses import Use

__all__ = ["UnfollowedError", "input_token_axes", "of_real_positions", "of_rows", "of_tokens", "row_ids"]


class UnfollowedError(Exception):
    """It is not known to which rows and positions the tokens of a use belong; the message says why."""


def input_token_axes(use: Use, ndim: int) -> tuple[int, ...]:
    """Axes along which tokens lie in what a use meets (in its output, for a convolution), in `matrices`' order."""
    if use.kind == "dense":
        contracted, batch = (sides[1 - use.index] for sides in contraction(use.options))
        return tuple(i for i in range(ndim) if i not in (*contracted, *batch))
    if use.kind == "embedding":
        return tuple(range(ndim - 1))
    return token_axes(use, ndim)


def of_real_positions(use: Use, shape: tuple[int, ...], real: Array) -> Array:
    """Which tokens of a use are real, bool ``[T]``; a token that belongs to no row is.

    Args:
        shape: of what the use meets, see `input_token_axes`, without loops.
        real: ``[rows]`` or ``[rows, ...positions]``.

    Raises:
        UnfollowedError: rows or positions are not known, or move from iteration to iteration of a loop.
    """
    real = jnp.asarray(real).astype(bool)
    rows, positions = _over_tokens(use, shape, "row"), _over_tokens(use, shape, "position")
    by_row = real.reshape(real.shape[0], -1)
    if real.ndim == 1 or not positions:
        found = [_taken(by_row.any(1), row) for row in rows]
    elif not rows:
        found = [_taken(by_row.any(0), position) for position in positions]
    else:
        index = [_both(row, position, by_row.shape[1]) for row in rows for position in positions]
        found = [_taken(by_row.ravel(), one) for one in index]
    count = math.prod(shape[i] for i in input_token_axes(use, len(shape)))
    return jnp.broadcast_to(jnp.all(jnp.stack(found), 0) if found else jnp.ones(1, bool), (count,))


def of_tokens(use: Use, shape: tuple[int, ...], values: Array) -> Array:
    """Numbers of the tokens of the outputs, at the tokens of the head that they come from, ``[T]``; 0 at others.

    Raises:
        UnfollowedError: it is not known which outputs come from which token of the head.
    """
    found = _over_tokens(use, shape, "token")
    if len(found) != 1:
        raise UnfollowedError("the outputs come from no single product")
    (tokens,) = found
    flat = jnp.ravel(values)
    if np.array_equal(tokens, np.arange(flat.size)):
        return flat
    return jnp.where(tokens == NOBODY, 0, flat[np.maximum(tokens, 0)])


def of_rows(use: Use, shape: tuple[int, ...]) -> np.ndarray:
    """The row of every token of a use, int32 ``[T]``.

    Raises:
        UnfollowedError: it has none, or none that is known.
    """
    found = _over_tokens(use, shape, "row")
    count = math.prod(shape[i] for i in input_token_axes(use, len(shape)))
    if len(found) != 1 or (found[0] == NOBODY).any():
        raise UnfollowedError("its tokens belong to no single row")
    return np.broadcast_to(found[0], (count,))


def row_ids(use: Use) -> Ids:
    """The ids of rows of a use.

    Raises:
        UnfollowedError: it has none, or none that is known.
    """
    found = [one for one in use.ids if one.kind == "row"]
    if len(found) != 1 or isinstance(found[0], Lost):
        raise UnfollowedError(
            str(found[0]) if found and isinstance(found[0], Lost) else "it belongs to no single row"
        )
    return found[0]


def _over_tokens(use: Use, shape: tuple[int, ...], kind: str) -> list[np.ndarray]:
    """Ids of one kind over the tokens of a use, ``[T]`` or, where they do not vary, ``[1]``."""
    found = []
    for one in use.ids:
        if one.kind == kind:
            if isinstance(one, Lost):
                raise UnfollowedError(str(one))
            values = _ravelled(one, use, shape)
            if values is not None:
                found.append(values)
    return found


def _ravelled(one: Ids, use: Use, shape: tuple[int, ...]) -> np.ndarray | None:
    if any(n > 1 for n in one.values.shape[: len(use.loops)]):
        raise UnfollowedError(f"every iteration of the loop around it has another {one.kind}")
    own = one.values.reshape(one.values.shape[len(use.loops) :])
    tokens = input_token_axes(use, own.ndim)
    rest = [i for i in range(own.ndim) if i not in tokens]
    if any(own.shape[i] > 1 for i in rest):
        if use.kind == "dense" and not any(own.shape[i] > 1 for i in (*tokens, *_kept_apart(use))):
            return None  # summed over
        raise UnfollowedError(f"it meets several {one.kind}s at once")
    values = own.transpose([*tokens, *rest]).reshape([own.shape[i] for i in tokens])
    if values.size == 1:
        return values.reshape(1)
    return np.broadcast_to(values, [shape[i] for i in tokens]).ravel()


def _kept_apart(use: Use) -> tuple[int, ...]:
    return contraction(use.options).batch[1 - use.index]


def _both(row: np.ndarray, position: np.ndarray, length: int) -> np.ndarray:
    return np.where((row == NOBODY) | (position == NOBODY), NOBODY, row * length + position)


def _taken(values: Array, index: np.ndarray) -> Array:
    if np.array_equal(index, np.arange(values.size)):
        return values
    return jnp.where(index == NOBODY, True, values[np.maximum(index, 0)])

"""Where the rows and positions of a batch lie among the tokens of a use."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._support.jax_internals import contraction
from fisher_jax._tracing.dense import token_axes
from fisher_jax._tracing.ids import NOBODY, Carried, Ids, Lost, along
from fisher_jax._tracing.uses import Use

__all__ = [
    "UnfollowedError",
    "input_token_axes",
    "is_at_outputs",
    "of_real_positions",
    "of_rows",
    "of_tokens",
    "row_ids",
    "told",
]


class UnfollowedError(Exception):
    """It is not known to which rows and positions the tokens of a use belong; the message says why."""


def input_token_axes(use: Use, ndim: int) -> tuple[int, ...]:
    """Axes along which tokens lie in what a use meets (in its output, for a convolution), in `matrices`' order.

    For a scale or a bias these are the axes of the output along which it is broadcast: other axes may be among them.
    """
    if use.kind == "dense":
        contracted, batch = (sides[1 - use.index] for sides in contraction(use.options))
        return tuple(i for i in range(ndim) if i not in (*contracted, *batch))
    if use.kind == "embedding":
        return tuple(range(ndim - 1))
    if use.kind in ("scale", "bias"):
        return tuple(i for i, n in enumerate(use.operand.shape or (1,) * ndim) if n == 1)
    return token_axes(use, ndim)


def told(use: Use, shape: tuple[int, ...], axes: tuple[int, ...] | None, lead: tuple[int, ...]) -> Carried:
    """Ids of a use whose axes of rows and positions a user names; ``None``: it has none.

    Args:
        shape: of what the use meets, see `input_token_axes`, without loops.
        axes: of rows, then of positions, one for each axis of ``lead`` after the first, or none.
        lead: rows, and positions of a row.

    Raises:
        UnfollowedError: axes that there are not, that are no axes of tokens, or of other sizes.
    """
    if axes is None:
        return tuple(one for one in use.ids if one.kind not in ("row", "position", "token"))
    tokens = input_token_axes(use, len(shape))
    if not set(axes) <= set(tokens):
        raise UnfollowedError(f"tokens lie along {_axes(tokens)} of its shape {list(shape)}, not along {_axes(axes)}")
    wanted = lead[: len(axes)]
    if len(axes) not in (1, len(lead)) or tuple(shape[i] for i in axes) != wanted:
        raise UnfollowedError(
            f"{_axes(axes)} of its shape {list(shape)} have sizes {[shape[i] for i in axes]}, and rows and positions "
            f"of the batch {list(lead)}"
        )
    loops, ndim = len(use.loops), len(shape)
    found = [along("row", np.arange(lead[0]), axes[:1], ndim, loops)]
    places = np.arange(math.prod(wanted)).reshape(wanted)
    if len(axes) > 1:
        found.append(along("position", places[0], axes[1:], ndim, loops))
    if len(axes) == len(lead) and any(one.kind == "token" for one in use.ids):
        found.append(along("token", places, axes, ndim, loops))
    return tuple(found)


def _axes(axes: tuple[int, ...]) -> str:
    return f"axes {', '.join(map(str, axes))}"


def of_real_positions(use: Use, shape: tuple[int, ...], real: Array, iteration: tuple[Array, ...] = ()) -> Array:
    """Which tokens of a use are real, bool ``[T]``; a token that belongs to no row is.

    Args:
        shape: of what the use meets, see `input_token_axes`, without loops.
        real: ``[rows]`` or ``[rows, ...positions]``.
        iteration: of each of the use's loops the iteration that is meant.

    Raises:
        UnfollowedError: rows or positions are not known.
    """
    real = jnp.asarray(real).astype(bool)
    rows, positions = _over_tokens(use, shape, "row"), _over_tokens(use, shape, "position")
    if len(rows) > 1:
        raise UnfollowedError("it meets two rows at once")
    by_row = real.reshape(real.shape[0], -1)
    if real.ndim == 1 or not positions:
        found = [_taken(by_row.any(1), row) for row in rows]
    elif not rows:
        found = [_taken(by_row.any(0), position) for position in positions]
    else:
        index = [_both(row, position, by_row.shape[1]) for row in rows for position in positions]
        found = [_taken(by_row.ravel(), one) for one in index]
    count = math.prod(shape[i] for i in input_token_axes(use, len(shape)))
    if not found:
        return jnp.ones(count, bool)
    every = functools.reduce(jnp.logical_and, found)
    return jnp.broadcast_to(_at_iteration(every, iteration), (count,))


def _at_iteration(x: Array, iteration: tuple[Array, ...]) -> Array:
    """The part of ``[*loops, T]`` of one iteration, where loops are of length 1 where nothing varies."""
    return x[tuple(i if n > 1 else 0 for i, n in zip(iteration, x.shape[:-1], strict=True))]


def of_tokens(use: Use, shape: tuple[int, ...], values: Array, iteration: tuple[Array, ...] = ()) -> Array:
    """Numbers of the tokens of the outputs, at the tokens of the head that they come from, ``[T]``; 0 at others.

    Raises:
        UnfollowedError: it is not known which outputs come from which token of the head.
    """
    found = _over_tokens(use, shape, "token")
    if len(found) != 1:
        raise UnfollowedError("the outputs come from no single product")
    tokens, flat = found[0], jnp.ravel(values)
    if np.array_equal(tokens.ravel(), np.arange(flat.size)) and not use.loops:
        return flat
    every = jnp.where(tokens == NOBODY, 0, flat[np.maximum(tokens, 0)])
    count = math.prod(shape[i] for i in input_token_axes(use, len(shape)))
    return jnp.broadcast_to(_at_iteration(every, iteration), (count,))


def is_at_outputs(use: Use) -> bool:
    """Whether the outputs are tokens of this use."""
    return any(one.kind == "token" for one in use.ids)


def of_rows(use: Use, shape: tuple[int, ...]) -> np.ndarray:
    """The row of every token of a use, int32 ``[T]``.

    Raises:
        UnfollowedError: it has none, or none that is known.
    """
    found = _over_tokens(use, shape, "row")
    count = math.prod(shape[i] for i in input_token_axes(use, len(shape)))
    if len(found) != 1 or (found[0] == NOBODY).any():
        raise UnfollowedError("its tokens belong to no single row")
    if any(n > 1 for n in found[0].shape[:-1]):
        raise UnfollowedError("every iteration of the loop around it has other rows")
    return np.broadcast_to(found[0].ravel(), (count,))


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
    """Ids of one kind over the tokens of a use, ``[*loops, T]``, of length 1 where they do not vary."""
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
    loops = len(use.loops)
    lead, own = one.values.shape[:loops], one.values.shape[loops:]
    tokens = input_token_axes(use, len(own))
    rest = [i for i in range(len(own)) if i not in tokens]
    if any(own[i] > 1 for i in rest):
        if use.kind == "dense" and not any(own[i] > 1 for i in (*tokens, *_kept_apart(use))):
            return None  # summed over
        raise UnfollowedError(f"it meets several {one.kind}s at once")
    order = [*range(loops), *(loops + i for i in (*tokens, *rest))]
    values = one.values.transpose(order).reshape(*lead, *(own[i] for i in tokens))
    if all(own[i] == 1 for i in tokens):
        return values.reshape(*lead, 1)
    return np.broadcast_to(values, (*lead, *(shape[i] for i in tokens))).reshape(*lead, -1)


def _kept_apart(use: Use) -> tuple[int, ...]:
    return contraction(use.options).batch[1 - use.index]


def _both(row: np.ndarray, position: np.ndarray, length: int) -> np.ndarray:
    return np.where((row == NOBODY) | (position == NOBODY), NOBODY, row * length + position)


def _taken(values: Array, index: np.ndarray) -> Array:
    if index.ndim == 1 and np.array_equal(index, np.arange(values.size)):
        return values
    return jnp.where(index == NOBODY, True, values[np.maximum(index, 0)])

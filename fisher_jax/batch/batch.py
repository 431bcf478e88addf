"""Batches of tokens: the one place where next-token shifting, padding and loss masks are defined."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Shaped

from fisher_jax._support.outline import outline

__all__ = ["Batch", "next_token_batch"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "targets", "weights", "real", "units"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a model reads and what it is scored on.

    A *token* is one element of the leading axes of the model's outputs.

    Attributes:
        inputs: whatever ``apply_fn(params, inputs)`` takes; for language models token ids ``[B, S]``.
        targets: what each output is scored against; for language models token ids ``[B, S]``.
        weights: per token, shaped like the leading axes of the outputs: 0 where there is no loss, and outputs and
            targets are never read. ``None``: 1 wherever something is real.
        real: per row, or per position of a row: 1, or 0 where it is padding, which is never read: a model that looks
            there sees token 0, or numbers 0. A row in which nothing is real is as if it were not there. ``None``: all
            ones. A prompt is real and has no loss. Inputs whose first axes are those of ``real``, in either order,
            are laid out as it is; one that the model compares, or spreads over other places (a mask, a bias of
            attention), tells it what is padding, and stays.
        units: per row ``[B]``, an integer id (say, of a document). Consecutive rows with one id, across batches
            too, form one observation. ``None``: each row is its own.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> batch = fj.Batch(jnp.array([[5, 6]]), jnp.array([[6, 7]]))
        >>> batch.weights is None
        True
    """

    inputs: Any
    targets: Any
    weights: Any = None
    real: Any = None
    units: Any = None

    def __repr__(self) -> str:
        return outline(self)


def next_token_batch(
    tokens: Int[ArrayLike, "rows length"],
    mask: Shaped[ArrayLike, "rows length"] | None = None,
    loss_mask: Shaped[ArrayLike, "rows length"] | None = None,
    units: Int[ArrayLike, " rows"] | None = None,
) -> Batch:
    """Score the output at position ``t`` against the token at ``t + 1``, once and for all.

    With tokens ``x[B, S]``: ``inputs = x[:, :-1]``, ``targets = x[:, 1:]``, both ``[B, S - 1]``. Nothing else in
    this library shifts.

    Args:
        tokens: integer ids ``[B, S]``, ``S >= 2``.
        mask: ``[B, S]``, 1 for a real token and 0 for padding. A token is scored if it and the position that
            predicts it are real. A floating mask with another value gives weights of NaN, which reject the batch.
        loss_mask: ``[B, S]``, aligned with ``tokens``: 0 for a token that is not to be *predicted* (a prompt); a
            number between is its weight.
        units: integer ids ``[B]``, see `Batch`.

    Returns:
        A `Batch`: ``weights`` float32 ``[B, S - 1]``, ``real`` bool ``[B, S - 1]``, or ``None`` without a mask.

    Raises:
        ValueError: an array of another shape than ``tokens``, or rows too short to hold a prediction.
        TypeError: tokens or units that are not integers.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> batch = fj.next_token_batch(jnp.array([[5, 6, 7, 0]]), mask=jnp.array([[1, 1, 1, 0]]))
        >>> batch.targets.tolist(), batch.weights.tolist()
        ([[6, 7, 0]], [[1.0, 1.0, 0.0]])
    """
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens are integer ids, found dtype {tokens.dtype}")
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens have shape [rows, length] with length >= 2 (a target needs a token before it), found "
            f"{list(tokens.shape)}"
        )
    real = None if mask is None else _same_shape("mask", mask, tokens)
    whole = jnp.ones(tokens.shape, bool) if real is None else real.astype(bool)
    weights = (whole[:, 1:] & whole[:, :-1]).astype(jnp.float32)
    if loss_mask is not None:
        weights = weights * _same_shape("loss_mask", loss_mask, tokens)[:, 1:].astype(jnp.float32)
    if units is not None:
        units = row_ids(units, tokens.shape[0])
    if real is not None and jnp.issubdtype(real.dtype, jnp.inexact):
        # What is neither real nor not makes no batch: such weights reject it.
        weights = jnp.where(jnp.all((real == 0) | (real == 1)), weights, jnp.nan)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, None if real is None else whole[:, :-1], units)


def row_ids(units: Any, num_rows: int) -> Int[Array, " rows"]:
    """Integer ids, one per row."""
    units = jnp.asarray(units)
    if not jnp.issubdtype(units.dtype, jnp.integer):
        raise TypeError(f"units are integer ids, one per row, found dtype {units.dtype}")
    if units.shape != (num_rows,):
        raise ValueError(f"units have one id per row, [{num_rows}], found shape {list(units.shape)}")
    return units


def _same_shape(name: str, mask: Any, tokens: Array) -> Shaped[Array, "rows length"]:
    mask = jnp.asarray(mask)
    if mask.shape != tokens.shape:
        raise ValueError(f"{name} has the shape of tokens, {list(tokens.shape)}, found {list(mask.shape)}")
    return mask

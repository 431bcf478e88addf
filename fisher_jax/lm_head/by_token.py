"""Row, column and tensor groups: stream over tokens, one logits product, no [V, H] accumulation."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax.lm_head.scores import VALUE_BITS, SquaredScores, squared_scores
from fisher_jax.lm_head.softmax import Head
from fisher_jax.welford.moments import Fold, Moments, finish, fold, from_sums, start

__all__ = ["DEFAULT_CHUNK", "TokenRows", "moments_by_token"]

DEFAULT_CHUNK = 64  # tokens; [64, 50k] logits are 12 MB
_HIGHEST = jax.lax.Precision.HIGHEST


class TokenRows(NamedTuple):
    """Tokens in rows; a row lies within one observation (or is a part of a document, or holds all tokens)."""

    hidden: Array  # [B, S, H], zero where the weight is
    targets: Array  # [B, S], -1 for none
    weights: Array  # [B, S]
    units: Array  # [B]
    binary: bool  # every weight is known to be 0 or 1
    whole_weights: Array | None = None  # if not: whether every weight is 0 or 1
    beside: bool = False  # other rows are gone through at the same time, under jax.vmap


class _Sums(NamedTuple):
    """Sums over the tokens of each row ``[R, ...]``: of ``w f`` and, for the unit token, of ``w f**2``, ..."""

    first: Any
    second: Any = None
    square_first: Any = None  # the same with weights w**2
    square_second: Any = None


def moments_by_token(
    rows: TokenRows, head: Head, *, group: str, kinds: tuple[str, ...], unit: str, temperature: float, chunk: int
) -> tuple[dict[str, Moments], Array]:
    """Moments of each kind and the log-likelihood ``[B, S]``."""
    num_rows, length, _ = rows.hidden.shape
    # Several short rows to a chunk, or several chunks to a long row; the last piece starts early, its overlap is
    # masked.
    rows_at_once = min(num_rows, max(1, chunk // length))
    num_pieces = math.ceil(length / chunk)
    size = math.ceil(length / num_pieces)
    scale = VALUE_BITS if group == "row" else 0
    sums_like = _sums_like(rows, head, group, unit, rows_at_once)
    fold_like = jax.ShapeDtypeStruct(sums_like.first.shape[1:], head.dtype)
    folds: Any = {kind: None if unit == "token" else start(fold_like, unit, scale) for kind in kinds}
    totals = {kind: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums_like) for kind in kinds}

    def piece(carry, index, first_row):
        totals, log_likelihood = carry
        begin = jnp.minimum(index * size, length - size)
        row_begin = jnp.minimum(first_row, num_rows - rows_at_once)

        def part(x):
            return jax.lax.dynamic_slice(x, (row_begin, begin, 0)[: x.ndim], (rows_at_once, size, *x.shape[2:]))

        seen = (jnp.arange(size) + begin < index * size)[None, :]
        weights = jnp.where(seen | (jnp.arange(rows_at_once) + row_begin < first_row)[:, None], 0, part(rows.weights))
        sums, found = _piece_sums(
            part(rows.hidden), part(rows.targets), weights, head, group, kinds, unit, temperature, rows.binary
        )
        log_likelihood = jax.lax.dynamic_update_slice(log_likelihood, found, (row_begin, begin))
        return (jax.tree.map(jnp.add, totals, sums), log_likelihood), None

    def rows_step(carry, first_row):
        folds, kept, log_likelihood = carry
        (sums, log_likelihood), _ = jax.lax.scan(
            lambda c, i: piece(c, i, first_row), (totals, log_likelihood), jnp.arange(num_pieces)
        )
        if unit == "token":
            return (folds, jax.tree.map(jnp.add, kept, sums), log_likelihood), None
        row_begin = jnp.minimum(first_row, num_rows - rows_at_once)
        part_weights = jax.lax.dynamic_slice_in_dim(rows.weights, row_begin, rows_at_once).sum(1)
        part_weights = jnp.where(jnp.arange(rows_at_once) + row_begin < first_row, 0, part_weights)
        part_units = jax.lax.dynamic_slice_in_dim(rows.units, row_begin, rows_at_once)

        def row_step(folds: dict[str, Fold], row: Any):
            weight, unit_id, total = row
            return {k: fold(folds[k], total[k].first, weight, unit_id) for k in kinds}, None

        folds, _ = jax.lax.scan(row_step, folds, (part_weights, part_units, sums))
        return (folds, kept, log_likelihood), None

    kept: Any = totals if unit == "token" else None
    log_likelihood = jnp.zeros(rows.targets.shape, head.dtype)
    (folds, kept, log_likelihood), _ = jax.lax.scan(
        rows_step,
        (folds, kept, log_likelihood),
        jnp.arange(math.ceil(num_rows / rows_at_once)) * rows_at_once,
    )
    if unit == "token":
        sums = {kind: jax.tree.map(lambda x: x.sum(0), kept[kind]) for kind in kinds}
        return {k: from_sums(tuple(s), rows.weights, scale=scale) for k, s in sums.items()}, log_likelihood
    return {kind: finish(folds[kind]) for kind in kinds}, log_likelihood


def _sums_like(rows: TokenRows, head: Head, group: str, unit: str, rows_at_once: int) -> _Sums:
    shape = {"row": (head.size,), "column": rows.hidden.shape[2:], "tensor": ()}[group]
    array = jax.ShapeDtypeStruct((rows_at_once, *shape), head.dtype)
    if unit != "token":
        return _Sums(array)
    return _Sums(array, array) if rows.binary else _Sums(array, array, array, array)


def _piece_sums(hidden, targets, weights, head: Head, group, kinds, unit, temperature, binary):
    shape = weights.shape
    flat = hidden.reshape(-1, hidden.shape[-1])
    z = head.logits(flat)
    scores, log_likelihood = squared_scores(z, targets.reshape(-1), head, kinds, temperature)
    powers = [weights, *([] if binary or unit != "token" else [weights**2])]
    sums = {}
    for kind in kinds:
        if group == "row":
            norm = jnp.sum(flat.astype(head.dtype) ** 2, 1).reshape(shape)
            first = [_row_sums(scores[kind], w * norm, head) for w in powers]
            second = (
                [_row_square_sums(scores[kind], w * norm * norm, head) for w in powers] if unit == "token" else []
            )
        else:
            per_token = _over_vocabulary(scores[kind], head).reshape(shape)
            squares = hidden.astype(head.dtype) ** 2
            f = per_token * squares.sum(-1) if group == "tensor" else per_token[..., None] * squares
            over = [w.reshape(shape + (1,) * (f.ndim - 2)) for w in powers]
            first = [(w * f).sum(1) for w in over]
            second = [(w * f * f).sum(1) for w in over] if unit == "token" else []
        sums[kind] = _Sums(*(x for pair in zip(first, second, strict=True) for x in pair) if second else first)
    return sums, log_likelihood.reshape(shape)


def _weighted_rows(matrix: Array, coefficients: Array) -> Array:
    """``sum_s c[r, s] m[r, s, v]``: ``[R, V]``."""
    rows, length = coefficients.shape
    if rows == 1:
        return jnp.matmul(coefficients, matrix, precision=_HIGHEST)
    return jnp.einsum("rs,rsv->rv", coefficients, matrix.reshape(rows, length, -1), precision=_HIGHEST)


def _add_specials(sums: Array, indices, values, head: Head) -> Array:
    row = jnp.repeat(jnp.arange(sums.shape[0]), indices[0].shape[0] // sums.shape[0])
    for index, value in zip(indices, values, strict=True):
        local = index - head.offset
        local = jnp.where((index >= 0) & (local >= 0), local, head.size)
        sums = sums.at[row, local].add(value, mode="drop")
    return sums


def _row_sums(scores: SquaredScores, base: Array, head: Head) -> Array:
    parts = zip(scores.matrices, scores.coefficients, strict=True)
    sums = sum((_weighted_rows(m, base * c.reshape(base.shape)) for m, c in parts), jnp.zeros((), base.dtype))
    values = [v * base.reshape(-1) for v in scores.special_values]
    return _add_specials(sums, scores.special_indices, values, head)


def _row_square_sums(scores: SquaredScores, base: Array, head: Head) -> Array:
    matrix, coefficient = scores.square
    sums = _weighted_rows(matrix, base * coefficient.reshape(base.shape))
    values = [v * v * base.reshape(-1) for v in scores.special_values]
    return _add_specials(sums, scores.special_indices, values, head)


def _over_vocabulary(scores: SquaredScores, head: Head) -> Array:
    parts = zip(scores.matrices, scores.coefficients, strict=True)
    inside = head.gather_sum(jnp.stack([m.sum(1) * c for m, c in parts]).sum(0))
    special = sum(jnp.where(i >= 0, v, 0) for i, v in zip(scores.special_indices, scores.special_values, strict=True))
    return (inside + special) * 2.0**-VALUE_BITS

"""Entry-wise groups: stream over the vocabulary, so that neither [T, V] nor [T, V, H] ever exists."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax.lm_head.by_token import TokenRows
from fisher_jax.lm_head.scores import VALUE_BITS
from fisher_jax.lm_head.softmax import SCALE_BITS, Head, Partition, merge_partitions, partition
from fisher_jax.welford.moments import Moments, finish, fold, from_sums, start

__all__ = ["chunks", "cut", "default_chunk", "moments_by_vocabulary", "products", "stream_partition"]

_SCALE = 2.0**SCALE_BITS
_VALUE_SCALE = 2.0**VALUE_BITS
_TOKENS = 512  # tokens of one logits block; longer batches are streamed over tokens too


def default_chunk(num_tokens: int) -> int:
    """Vocabulary rows of a chunk: about half a million logits, so that a block stays in cache."""
    return max(64, 2**19 // min(num_tokens, _TOKENS))


class Pieces(NamedTuple):
    """How tokens of one row are cut: ``number`` pieces of ``size``; the last starts early, its overlap is masked."""

    number: int
    size: int


def cut(length: int) -> Pieces:
    number = math.ceil(length / _TOKENS)
    return Pieces(number, math.ceil(length / number))


def chunks(head: Head, chunk: int) -> tuple[int, int]:
    size = min(chunk, head.size)
    return math.ceil(head.size / size), size


def moments_by_vocabulary(
    rows: TokenRows, head: Head, *, kinds: tuple[str, ...], unit: str, temperature: float, chunk: int
) -> tuple[dict[str, Moments], Array]:
    """Moments ``[V, H]`` of each kind and the log-likelihood ``[B, S]``, for any unit and temperature.

    A row's value must be complete before it is squared, so the partition of every token is streamed first.
    """
    shape = rows.targets.shape
    flat = rows.hidden.reshape(-1, rows.hidden.shape[-1])
    targets = rows.targets.reshape(-1)
    part = stream_partition(flat, targets, head, chunk, 1.0)
    cold = part if temperature == 1 else stream_partition(flat, targets, head, chunk, temperature)
    log_likelihood = part.label_logit - part.log_sum_exp(targets)

    def unflatten(tree):
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), tree)

    tokens = _Tokens(rows.hidden, rows.targets, rows.weights, *unflatten((part, cold)))
    number, size = chunks(head, chunk)
    like = jax.ShapeDtypeStruct((size, flat.shape[1]), head.dtype)

    def chunk_moments(index):
        local = head.rows(begin_of(index), size)
        first_row = begin_of(index) + head.offset
        if unit == "token":
            sums: dict = {}
            for kind in kinds:
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), [like] * (2 if rows.binary else 4))

                def row_step(carry, row, kind=kind):
                    return jax.tree.map(
                        jnp.add, carry, _row_sums(row, local, first_row, kind, temperature, carry, rows.whole_weights)
                    ), None

                sums[kind], _ = jax.lax.scan(row_step, zeros, tokens)
                sums[kind] += [None] * (4 - len(sums[kind]))
            return {k: from_sums(tuple(s), rows.weights, scale=VALUE_BITS) for k, s in sums.items()}

        def fold_step(carry, x):
            row, unit_id = x
            weight = row.weights.sum()
            zeros = [jnp.zeros(like.shape, like.dtype)]
            return {
                k: fold(carry[k], _row_sums(row, local, first_row, k, temperature, zeros, None)[0], weight, unit_id)
                for k in kinds
            }, None

        folds, _ = jax.lax.scan(fold_step, {k: start(like, unit, VALUE_BITS) for k in kinds}, (tokens, rows.units))
        return {k: finish(f) for k, f in folds.items()}

    def begin_of(index):
        return jnp.minimum(index * size, head.size - size)

    return _assemble(chunk_moments, number, begin_of, head.size), log_likelihood.reshape(shape)


class _Tokens(NamedTuple):
    hidden: Array
    targets: Array
    weights: Array
    part: Partition
    cold: Partition  # of z / temperature


def _assemble(chunk_moments, number: int, begin_of, total_rows: int) -> dict[str, Moments]:
    """Run over chunks and write each one's rows in place; scalars are the same for every chunk."""
    like = jax.eval_shape(chunk_moments, jnp.zeros((), jnp.int32))
    whole = jax.tree.map(lambda x: jnp.zeros((total_rows, *x.shape[1:]) if x.ndim == 2 else x.shape, x.dtype), like)

    def step(index, whole):
        found = chunk_moments(index)
        return jax.tree.map(
            lambda w, x: jax.lax.dynamic_update_slice_in_dim(w, x, begin_of(index), 0) if x.ndim == 2 else x,
            whole,
            found,
        )

    return jax.lax.fori_loop(0, number, step, whole)


def stream_partition(hidden: Array, targets: Array, head: Head, chunk: int, temperature: float) -> Partition:
    """The partition of every token, online over chunks of the vocabulary."""
    number, size = chunks(head, chunk)
    alone = Head(head.weight, head.bias, head.soft_cap, None, head.dtype)
    block = cut(hidden.shape[0])

    def tokens_of(x, i):
        return jax.lax.dynamic_slice_in_dim(x, jnp.minimum(i * block.size, hidden.shape[0] - block.size), block.size)

    def chunk_step(carry, index, h, y):
        begin = jnp.minimum(index * size, head.size - size)
        local = alone.rows(begin, size)
        z = local.logits(h) / temperature
        # Rows that an earlier chunk has counted.
        z = jnp.where(jnp.arange(size) + begin < index * size, -jnp.inf, z)
        targets_here = jnp.where(y >= 0, y - head.offset - begin, -1)
        found, _ = partition(z, jnp.where(targets_here >= index * size - begin, targets_here, -1), local)
        found = found._replace(top=(found.top + begin + head.offset).astype(jnp.int32))
        return merge_partitions(carry, found, y), None

    def block_step(carry, i):
        h, y = tokens_of(hidden, i), tokens_of(targets, i)
        low = jnp.full(y.shape, -jnp.inf, head.dtype)
        empty = Partition(low, jnp.full(y.shape, -2, jnp.int32), jnp.zeros_like(low), low)
        found, _ = jax.lax.scan(lambda c, k: chunk_step(c, k, h, y), empty, jnp.arange(number))
        start_at = jnp.minimum(i * block.size, hidden.shape[0] - block.size)
        return jax.tree.map(lambda w, x: jax.lax.dynamic_update_slice(w, x, (start_at,)), carry, found), None

    zeros = jnp.zeros(targets.shape, head.dtype)
    whole = Partition(zeros, jnp.zeros(targets.shape, jnp.int32), zeros, zeros)
    part, _ = jax.lax.scan(block_step, whole, jnp.arange(block.number))
    if head.axis_name is not None:
        parts = jax.lax.all_gather(part, head.axis_name)
        devices = [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(jax.lax.axis_size(head.axis_name))]
        part = devices[0]
        for other in devices[1:]:
            part = merge_partitions(part, other, targets)
    return part


def _row_sums(
    row: _Tokens, local: Head, first_row, kind: str, temperature: float, like: list[Array], whole: Array | None
) -> list[Array]:
    """``sum w f`` (and the squares, as many as ``like`` has) of one row for one chunk, ``[C, H]`` each."""
    block = cut(row.targets.shape[0])

    def step(carry, i):
        begin = jnp.minimum(i * block.size, row.targets.shape[0] - block.size)
        piece = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, block.size), row)
        weights = jnp.where(jnp.arange(block.size) + begin < i * block.size, 0, piece.weights)
        f = _values(piece, local, first_row, kind, temperature)
        return jax.tree.map(jnp.add, carry, products(f, piece.hidden, weights, len(like), whole)), None

    sums, _ = jax.lax.scan(step, [jnp.zeros_like(x) for x in like], jnp.arange(block.number))
    return sums


def _values(piece: _Tokens, local: Head, first_row, kind: str, temperature: float) -> Array:
    """``f / h_j**2`` of a chunk, ``[C, tokens]``, multiplied by ``2**32``."""
    z = local.logits(piece.hidden, vocabulary_first=True)
    index = (jnp.arange(local.size) + first_row)[:, None]
    part, targets = piece.part, piece.targets
    total = part.total(targets)[None, :]
    p = jnp.exp(z - part.top_logit[None, :]) / total
    label_rest, top_rest = (x[None, :] for x in part.complements(targets))
    is_label, is_top = index == targets[None, :], index == part.top[None, :]
    slope = local.squared_slope(z) * _VALUE_SCALE
    if kind == "empirical":
        return jnp.where(is_label, label_rest / total, p) ** 2 * slope
    if temperature == 1:
        rest = jnp.where(is_top, top_rest / total, jnp.where(is_label, label_rest / total, 1 - p))
        return p * rest * slope
    cold_total = piece.cold.total(targets)[None, :]
    q = jnp.exp(z / temperature - piece.cold.top_logit[None, :]) / cold_total
    cold_rest = piece.cold.complements(targets)[1][None, :]
    return ((p - q) ** 2 + q * jnp.where(is_top, cold_rest / cold_total, 1 - q)) * slope


def products(f: Array, hidden: Array, weights: Array, number: int, whole: Array | None) -> list[Array]:
    """``sum w f h**2``, ``sum w f**2 h**4``, and the same with ``w**2``: the first ``number`` of them.

    ``whole`` says whether all weights are 0 or 1, and is read for all four.
    """
    squares = hidden.astype(f.dtype) ** 2

    def product(g, w, h):
        return jnp.matmul(g, w[:, None] * h, precision="highest")

    sums = [product(f, weights, squares)]
    if number > 1:
        sums.append(product(f * f, weights, squares * squares))
    if number == 4:
        # Weights of 0 and 1 are their own squares: no second pair of products.
        sums += jax.lax.cond(
            whole,
            lambda: list(sums),
            lambda: [product(f, weights**2, squares), product(f * f, weights**2, squares * squares)],
        )
    return sums

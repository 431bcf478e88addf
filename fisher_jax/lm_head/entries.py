"""Entry-wise token moments, the fast way: each logit is computed once if the log-sum-exp is known.

The complement ``1 - p`` of a label, or of a confident prediction, is the sum of the other probabilities, which is
known after the last chunk of the vocabulary only. These few entries are left out on the way and added at the end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax.lm_head.by_token import TokenRows
from fisher_jax.lm_head.by_vocabulary import chunks, cut, products
from fisher_jax.lm_head.scores import VALUE_BITS
from fisher_jax.lm_head.softmax import Head
from fisher_jax.welford.moments import Moments, from_sums

__all__ = ["token_moments"]

_VALUE_SCALE = 2.0**VALUE_BITS
_CONFIDENT = 0.75  # below, 1 - p loses less than two bits; at most one probability is above


class _Seen(NamedTuple):
    """What the chunks so far hold of each token ``[T]``."""

    rest: Array  # sum of the ordinary probabilities
    label_logit: Array
    top: Array  # index of a confident prediction that is not the label, else -1
    top_logit: Array


def token_moments(
    rows: TokenRows, head: Head, kinds: tuple[str, ...], log_sum_exp: Array, chunk: int
) -> tuple[dict[str, Moments], Array]:
    """Moments ``[V, H]`` of each kind for the unit token, and the log-likelihood ``[B, S]``."""
    hidden = rows.hidden.reshape(-1, rows.hidden.shape[-1])
    targets, weights, lse = (x.reshape(-1) for x in (rows.targets, rows.weights, log_sum_exp.astype(head.dtype)))
    (tokens, width), (number, size) = hidden.shape, chunks(head, chunk)
    block = cut(tokens)
    powers = 2 if rows.binary else 4

    def take_block(i):
        begin = jnp.minimum(i * block.size, tokens - block.size)
        fresh = jnp.arange(block.size) + begin >= i * block.size
        return (
            begin,
            fresh,
            [jax.lax.dynamic_slice_in_dim(x, begin, block.size) for x in (hidden, targets, lse)],
            (jnp.where(fresh, jax.lax.dynamic_slice_in_dim(weights, begin, block.size), 0)),
        )

    def chunk_step(index, carry):
        whole, seen = carry
        begin_row = jnp.minimum(index * size, head.size - size)
        local = head.rows(begin_row, size)
        counted = jnp.arange(size) + begin_row >= index * size

        def block_step(carry, i):
            sums, seen = carry
            begin, fresh, (h, y, s), w = take_block(i)
            f, found = _chunk_values(local, h, y - head.offset - begin_row, s, counted, kinds)
            top = jnp.where(found.top >= 0, found.top + begin_row + head.offset, -1)
            found = found._replace(top=top.astype(jnp.int32))
            old = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, block.size), seen)
            new = _Seen(old.rest + found.rest, *map(jnp.maximum, old[1:], found[1:]))
            new = jax.tree.map(lambda a, b: jnp.where(fresh, a, b), new, old)
            seen = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, begin, 0), seen, new)
            sums = {
                k: jax.tree.map(jnp.add, sums[k], products(f[k], h, w, powers, rows.whole_weights)) for k in kinds
            }
            return (sums, seen), None

        zeros = {k: [jnp.zeros((size, width), head.dtype)] * powers for k in kinds}
        (sums, seen), _ = jax.lax.scan(block_step, (zeros, seen), jnp.arange(block.number))
        return jax.tree.map(lambda a, x: jax.lax.dynamic_update_slice_in_dim(a, x, begin_row, 0), whole, sums), seen

    low = jnp.full(tokens, -jnp.inf, head.dtype)
    seen = _Seen(jnp.zeros_like(low), low, jnp.full(tokens, -1, jnp.int32), low)
    whole = {k: [jnp.zeros((head.size, width), head.dtype)] * powers for k in kinds}
    whole, seen = jax.lax.fori_loop(0, number, chunk_step, (whole, seen))
    if head.axis_name is not None:
        rest = jax.lax.psum(seen.rest, head.axis_name)
        seen = _Seen(rest, *(jax.lax.pmax(x, head.axis_name) for x in seen[1:]))

    def special_step(whole, i):
        begin, _, (h, y, s), w = take_block(i)
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, block.size), seen)
        return {
            k: _add_specials(whole[k], _specials(part, y, s, head, k), h, w, head, rows.beside) for k in kinds
        }, None

    whole, _ = jax.lax.scan(special_step, whole, jnp.arange(block.number))
    found = {k: (*whole[k], *[None] * (4 - powers)) for k in kinds}
    moments = {k: from_sums(found[k], rows.weights, scale=VALUE_BITS) for k in kinds}
    return moments, (seen.label_logit - lse).reshape(rows.targets.shape)


def _chunk_values(local: Head, hidden: Array, label: Array, lse: Array, counted: Array, kinds: tuple[str, ...]):
    """Ordinary ``f / h_j**2`` of each kind, ``[C, T]`` times ``2**32``, and what this chunk adds to `_Seen`."""
    z = local.logits(hidden, vocabulary_first=True)
    tokens = jnp.arange(label.shape[0])
    here = (label >= 0) & (label < local.size)
    label_logit = jnp.where(here, z[jnp.where(here, label, 0), tokens], -jnp.inf)
    z = z.at[jnp.where(here, label, local.size), tokens].set(-jnp.inf, mode="drop")
    top, top_logit = jnp.full(label.shape, -1, jnp.int32), jnp.full_like(label_logit, -jnp.inf)
    if "true" in kinds:
        top = jnp.argmax(z, 0).astype(jnp.int32)
        top_logit = jnp.max(z, 0)
        confident = jnp.exp(top_logit - lse) > _CONFIDENT
        z = z.at[jnp.where(confident, top, local.size), tokens].set(-jnp.inf, mode="drop")
        top, top_logit = jnp.where(confident, top, -1), jnp.where(confident, top_logit, -jnp.inf)
    p = jnp.exp(z - lse[None, :])
    # A matrix product: summing over the leading axis is several times slower on a CPU.
    rest = jnp.matmul(counted.astype(p.dtype), p, precision="highest")
    slope = local.squared_slope(jnp.where(z == -jnp.inf, 0, z)) if local.soft_cap is not None else 1.0
    f = {"empirical": lambda: p * p, "true": lambda: p * (1 - p)}
    return {k: f[k]() * slope * _VALUE_SCALE for k in kinds}, _Seen(rest, label_logit, top, top_logit)


def _specials(part: _Seen, targets: Array, lse: Array, head: Head, kind: str):
    """Indices and ``f / h_j**2`` (times ``2**32``) of the entries left out."""
    label, top = jnp.exp(part.label_logit - lse), jnp.exp(part.top_logit - lse)
    label_rest, top_rest = part.rest + top, part.rest + label
    values = (label_rest**2, top**2) if kind == "empirical" else (label * label_rest, top * top_rest)
    if head.soft_cap is not None:
        logits = (part.label_logit, part.top_logit)
        slopes = (head.squared_slope(jnp.where(jnp.isfinite(z), z, 0)) for z in logits)
        values = (values[0] * next(slopes), values[1] * next(slopes))
    return tuple((i, v * _VALUE_SCALE) for i, v in zip((targets, part.top), values, strict=True))


def _add_specials(
    sums: list[Array], specials, hidden: Array, weights: Array, head: Head, beside: bool
) -> list[Array]:
    squares = hidden.astype(sums[0].dtype) ** 2
    for index, value in specials:
        local = index - head.offset
        here = (index >= 0) & (local >= 0) & (local < head.size)
        f = jnp.where(here, value, 0)[:, None] * squares
        terms = [w[:, None] * x for w in (weights, weights**2)[: len(sums) // 2] for x in (f, f * f)]
        places = jnp.where(here, local, 0)
        if beside:  # slices at places of their own would be a scatter for every token
            sums = _at_once(sums, terms, places)
        else:
            sums = jax.lax.platform_dependent(sums, terms, places, cpu=_row_by_row, default=_at_once)
    return sums


def _at_once(sums: list[Array], terms: list[Array], local: Array) -> list[Array]:
    return [a.at[local].add(x) for a, x in zip(sums, terms, strict=True)]


def _row_by_row(sums: list[Array], terms: list[Array], local: Array) -> list[Array]:
    """In place, where XLA's CPU scatter copies its operand."""

    def step(i, sums):
        def add(a, x):
            row = jax.lax.dynamic_slice_in_dim(a, local[i], 1) + jax.lax.dynamic_slice_in_dim(x, i, 1)
            return jax.lax.dynamic_update_slice_in_dim(a, row, local[i], 0)

        return [add(a, x) for a, x in zip(sums, terms, strict=True)]

    return jax.lax.fori_loop(0, local.shape[0], step, sums)

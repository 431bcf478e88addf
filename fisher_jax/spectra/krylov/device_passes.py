"""Passes over one leaf of a basis where it lies: on each device over its own shard, block by block.

Sums over blocks are pairs (value, correction) of the leaf's work dtype, on a leading axis of 2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from fisher_jax._support import compensated

_EXACT = jax.lax.Precision.HIGHEST  # accelerators round products to bfloat16 or TF32 otherwise


def _where_it_lies(function: Callable, place: NamedSharding | None, kinds: str, results: str, *args: Any) -> Any:
    """``function`` on each device's shards. Kinds: a stack of vectors, a vector, numbers, or a sum over devices."""
    if place is None:
        return function(*args)
    spec = place.spec
    specs = {"stack": PartitionSpec(None, *spec), "vector": spec, "numbers": PartitionSpec(), "sum": PartitionSpec()}
    names = [n for part in spec if part is not None for n in (part if isinstance(part, tuple) else (part,))]
    kinds_in, kinds_out = kinds.split(), results.split()

    def local(*shards):
        out = function(*shards)
        out = out if isinstance(out, tuple) else (out,)
        summed = [
            jax.lax.psum(x, tuple(names)) if k == "sum" and names else x for x, k in zip(out, kinds_out, strict=True)
        ]
        return tuple(summed) if len(summed) > 1 else summed[0]

    out_specs = tuple(specs[k] for k in kinds_out)
    return jax.shard_map(
        local, mesh=place.mesh, in_specs=tuple(specs[k] for k in kinds_in),
        out_specs=out_specs if len(out_specs) > 1 else out_specs[0], check_vma=False,
    )(*args)  # fmt: skip


def _over_blocks(body: Callable, carry: Any, size: int, block: int) -> Any:
    """``carry = body(carry, start, length)`` over blocks of entries; the last one may be shorter."""
    full = size // block
    if full > 1:
        carry = jax.lax.fori_loop(0, full, lambda i, c: body(c, i * block, block), carry)
    elif full:
        carry = body(carry, 0, block)
    return body(carry, full * block, size % block) if size % block else carry


def _block_of(stack: Array, start: Any, rows: int, length: int, dtype: Any) -> Array:
    return jax.lax.dynamic_slice(stack, (0, start), (rows, length)).astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def write(stack, vector, scale, row):
    stack = stack.at[row].set((scale * vector).astype(stack.dtype))
    return stack, stack[row].astype(vector.dtype)


@functools.partial(jax.jit, static_argnames=("rows", "block", "place"))
def project(stack, vector, *, rows, block, place):
    def local(stack, vector):
        flat, v = stack.reshape(stack.shape[0], -1), vector.reshape(-1)

        def body(sums, start, length):
            part = jax.lax.dynamic_slice(v, (start,), (length,))
            rows_part = _block_of(flat, start, rows, length, v.dtype)
            return compensated.add_pair(sums, jnp.matmul(rows_part, part, precision=_EXACT))

        return _over_blocks(body, compensated.runtime(jnp.zeros((2, rows), v.dtype)), v.size, block)

    return _where_it_lies(local, place, "stack vector", "sum", stack, vector)


@functools.partial(jax.jit, static_argnames=("rows", "block", "place"), donate_argnums=1)
def subtract(stack, vector, coefficients, *, rows, block, place):
    def local(stack, vector, coefficients):
        flat, v = stack.reshape(stack.shape[0], -1), vector.reshape(-1)

        def body(carry, start, length):
            v, sums = carry
            rows_part = _block_of(flat, start, rows, length, v.dtype)
            part = jax.lax.dynamic_slice(v, (start,), (length,))
            part = part - jnp.matmul(coefficients, rows_part, precision=_EXACT)
            found = jnp.append(jnp.matmul(rows_part, part, precision=_EXACT), jnp.sum(part * part))
            return jax.lax.dynamic_update_slice(v, part, (start,)), compensated.add_pair(sums, found)

        zeros = compensated.runtime(jnp.zeros((2, rows + 1), v.dtype))
        v, sums = _over_blocks(body, (v, zeros), v.size, block)
        return v.reshape(vector.shape), sums

    return _where_it_lies(local, place, "stack vector numbers", "vector sum", stack, vector, coefficients)


@functools.partial(jax.jit, static_argnames=("block", "place"), donate_argnums=0)
def rotate(stack, rotation, *, block, place):
    def local(stack, rotation):
        flat = stack.reshape(stack.shape[0], -1)

        def body(flat, start, length):
            part = _block_of(flat, start, flat.shape[0], length, rotation.dtype)
            new = jnp.matmul(rotation.T, part, precision=_EXACT).astype(flat.dtype)
            return jax.lax.dynamic_update_slice(flat, new, (0, start))

        return _over_blocks(body, flat, flat.shape[1], block).reshape(stack.shape)

    return _where_it_lies(local, place, "stack numbers", "stack", stack, rotation)

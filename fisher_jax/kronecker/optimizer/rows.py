"""Parts of a batch: its first rows, or a window that moves on from step to step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisher_jax.batch import Batch

__all__ = ["check_rows", "check_runs", "first_rows", "window"]

# 2**32 over the golden ratio: multiples of it, modulo 2**32, never come back early and leave no large gap.
_GOLDEN = 2654435769


def check_rows(rows: int | None, example: Batch) -> None:
    """Raise where a batch does not have so many rows."""
    if rows is None:
        return
    number = min(x.shape[0] for x in jax.tree.leaves(example))
    if not 1 <= rows <= number:
        raise ValueError(f"factor_rows is from 1 to the {number} rows of the batch, found {rows}")


def check_runs(apply_fn: Callable, params: Any, inputs: Any, name: str, rows: int) -> None:
    """Raise where a model cannot be run on a part of the rows, as one that reshapes to a number of them."""
    try:
        jax.eval_shape(apply_fn, params, inputs)
    except Exception as error:
        raise ValueError(
            f"{name}={rows} runs the model on {rows} rows, and it fails there ({type(error).__name__}: {error}); "
            f"leave out {name}, or take sizes from the inputs, as x.shape[0], in place of numbers"
        ) from error


def first_rows(batch: Any, rows: int | None) -> Any:
    """So many rows from the first on; all with ``None``."""
    return batch if rows is None else jax.tree.map(lambda x: x[:rows], batch)


def window(batch: Batch, rows: int | None, step: Any = 0) -> Batch:
    """So many rows, after the last one on from the first; all with ``None``.

    Beginnings of steps are multiples of the golden section, so that every period of steps sees all rows.
    """
    if rows is None:
        return batch

    def start(number):
        turn = jnp.asarray(step).astype(jnp.uint32) * jnp.uint32(_GOLDEN)
        return (turn.astype(jnp.float32) * 2.0**-32 * number).astype(jnp.int32)

    def part(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
        return jnp.take(x, (start(x.shape[0]) + jnp.arange(rows)) % x.shape[0], axis=0)

    return jax.tree.map(part, batch)

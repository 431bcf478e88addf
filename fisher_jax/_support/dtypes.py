"""In which precision numbers are added up: statistics are at least float32, whatever the parameters are in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

__all__ = ["check_not_complex", "common_dtype", "is_floating", "is_narrow", "wide", "wide_dtype"]


def is_floating(x: Any) -> bool:
    """Whether ``x`` is made of real floating numbers; ``None`` is not."""
    return x is not None and bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def check_not_complex(path: str, x: Any, way_out: str = "") -> None:
    """Raise for a complex parameter, whose Fisher information is not one number."""
    if x is not None and jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        raise ValueError(
            f"parameter {path} has dtype {jnp.result_type(x)}; store its real and imaginary part as two parameters"
            + way_out
        )


def common_dtype(*dtypes: Any) -> jnp.dtype:
    """The dtype that holds numbers of all of these, also where the user has asked JAX for strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype is of real floating numbers and smaller than float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and wide_dtype(dtype) != dtype


def wide_dtype(*dtypes: Any) -> jnp.dtype:
    """The dtype that holds numbers of all of these and of float32."""
    return common_dtype(jnp.float32, *dtypes)


def wide(x: Any) -> Array:
    """Numbers in at least float32."""
    x = jnp.asarray(x)
    return x.astype(wide_dtype(x.dtype))

"""A result in one line: what its fields are, without the numbers of its arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support.jax_internals import is_traced

__all__ = ["outline"]


def outline(found: Any) -> str:
    """The ``__repr__`` of a named tuple or a dataclass.

    >>> from typing import NamedTuple
    >>> class Found(NamedTuple):
    ...     values: np.ndarray
    ...     trace: float
    ...     tree: dict
    ...     __repr__ = outline
    >>> Found(np.zeros((3, 4)), 0.5, {"a": np.ones(2)})
    Found(values=float64[3, 4], trace=0.5, tree=<tree of 1>)
    """
    names = getattr(found, "_fields", None) or [field.name for field in dataclasses.fields(found)]
    return f"{type(found).__name__}({', '.join(f'{name}={_short(getattr(found, name))}' for name in names)})"


def _short(x: Any) -> str:
    if x is None or isinstance(x, bool | int | float | str):
        return repr(x)
    if isinstance(x, np.ndarray | np.generic | jax.Array) and _is_number(x):
        return f"{x.item():.6g}"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    if isinstance(x, tuple | list) and len(x) <= 4 and all(isinstance(part, int | float | str) for part in x):
        return repr(x)
    if isinstance(x, tuple | list) and x and not hasattr(x, "_fields"):
        return f"<{len(x)} {type(x[0]).__name__}>"
    if callable(x):
        return getattr(x, "__name__", type(x).__name__)
    return f"<tree of {len(jax.tree.leaves(x))}>"


def _is_number(x: Any) -> bool:
    """One number that can be read here and now."""
    if x.ndim or is_traced(x) or not jnp.issubdtype(x.dtype, np.number):
        return False
    return not isinstance(x, jax.Array) or (x.is_fully_addressable and not x.is_deleted())

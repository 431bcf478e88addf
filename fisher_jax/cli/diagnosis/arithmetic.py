"""The first question: in what precision does this device multiply?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax.cli.diagnosis.records import Check, relative_error
from fisher_jax.cli.diagnosis.subject import Subject

__all__ = ["CHECKS", "REDUCED", "precision_of_products"]

Leaves = dict[str, np.ndarray]
_SIZE = 256

# Names and roundings of what float32 products run in where they are not float32: 10 and 7 bits after the point.
REDUCED = {"TF32": 2.0**-10, "bfloat16": 2.0**-7}


def _operands(dtype: Any) -> tuple[jax.Array, jax.Array]:
    generator = np.random.default_rng(3)
    a, b = (jnp.asarray(generator.normal(size=(_SIZE, _SIZE)), jnp.dtype(dtype)) for _ in range(2))
    return a, b


def product(precision: str | None, subject: Subject) -> Leaves:
    """A matrix product in the user's default precision (``None``), or in another."""
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    return {"product": np.asarray(multiply(*_operands(subject.dtype)), np.float64)}


def product_reference(subject: Subject) -> Leaves:
    a, b = (np.asarray(x, np.float64) for x in _operands(subject.dtype))
    return {"product": a @ b}


def precision_of_products(error: float) -> tuple[str, float] | None:
    """Name and rounding of float32 products with this error; ``None`` for full precision, or for worse than any."""
    for name, eps in REDUCED.items():
        if eps / 8 < error <= eps:
            return name, eps
    return None


def _eps(subject: Subject) -> float:
    return float(jnp.finfo(subject.dtype).eps)


CHECKS = (
    Check(
        "matrix products",
        lambda subject: product(None, subject),
        product_reference,
        slack=4.0,
        growth=lambda subject: 1.0,
        quick=True,
    ),
    Check(
        "matrix products, precision highest",
        lambda subject: product("highest", subject),
        product_reference,
        slack=4.0,
        growth=lambda subject: 1.0,
        quick=True,
        once=True,
    ),
)

"""The first question: in what precision does this device multiply?"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax.cli.doctor.records import WRONG, Check, Leaves, Record
from fisher_jax.cli.doctor.subject import Subject

_SIZE = 256
PRODUCTS = "matrix products"

# Names and roundings of what float32 products run in where they are not float32: 10 and 7 bits after the point.
REDUCED = {"TF32": 2.0**-10, "bfloat16": 2.0**-7}


def operands(dtype: Any) -> tuple[jax.Array, jax.Array]:
    generator = np.random.default_rng(3)
    a, b = (jnp.asarray(generator.normal(size=(_SIZE, _SIZE)), jnp.dtype(dtype)) for _ in range(2))
    return a, b


def product(precision: str | None, subject: Subject) -> Leaves:
    """A matrix product in the user's default precision (``None``), or in another."""
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    return {"product": np.asarray(multiply(*operands(subject.dtype)), np.float64)}


def product_reference(subject: Subject) -> Leaves:
    a, b = (np.asarray(x, np.float64) for x in operands(subject.dtype))
    return {"product": a @ b}


def precision_of_products(record: Record) -> str:
    """The verdict on products of float32: as they were found, or the name of what they run in."""
    if record.verdict != WRONG:
        return record.verdict
    return next((name for name, eps in REDUCED.items() if eps / 8 < record.error <= eps), WRONG)


def _check(name: str, precision: str | None, *, once: bool = False) -> Check:
    measure = functools.partial(product, precision)
    return Check(name, measure, product_reference, slack=1.0, growth=lambda subject: 1.0, quick=True, once=once)


CHECKS = (_check(PRODUCTS, None), _check("matrix products, precision highest", "highest", once=True))

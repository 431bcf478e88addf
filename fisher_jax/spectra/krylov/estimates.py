"""Traces of an operator and of its square: the large part exactly, the rest by random probes with their error."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from fisher_jax._support.errors import InputError
from fisher_jax._support.outline import outline
from fisher_jax.spectra.krylov import basis_passes, process
from fisher_jax.spectra.krylov.density import standard_error
from fisher_jax.spectra.krylov.layout import Layout, layout_of, product, random_vector

Tree = Any


class Estimate(NamedTuple):
    """A number, the standard error of its random part (0 where it is exact), and the products that it took."""

    value: float
    standard_error: float
    num_products: int
    exact_part: float  # what the deflated directions hold exactly

    def __repr__(self) -> str:
        return outline(self)


def trace(
    matvec: Callable[[Tree], Tree],
    like: Tree,
    *,
    num_products: int,
    key: Key[Array, ""],
    power: int = 1,
    storage: str = "auto",
    jit: bool = True,
) -> Estimate:
    """``tr A`` of a symmetric operator, the sum of its eigenvalues (not divided by the dimension); or ``tr A**2``.

    Hutch++ (Meyer, Musco, Musco and Woodruff 2021): a third of the products finds an orthonormal ``Q`` that spans
    ``A Omega``, a third gives ``tr(Q^T A Q)`` exactly, and the rest are probes in random directions ``u`` orthogonal
    to ``Q``, each ``(n - k) u^T A u / u^T u`` (as XTrace scales them: Epperly, Tropp and Webber 2024, 2.3). Unbiased;
    the standard error is that of the mean over the probes, given ``Q``. Exact where ``Q`` fills the space or the
    range, and for a multiple of the identity.

    ``tr A**2`` is the sum of the squares of the eigenvalues, so its root is the Frobenius norm. With
    ``P = I - Q Q^T`` it is ``|A Q|_F**2 + |A P|_F**2``: the first part exactly, the second as the mean of
    ``(n - k) |A u|**2 / u^T u``.

    Args:
        matvec, like, storage, jit: see `fj.lanczos`.
        num_products: at least 4, so that two probes remain; a third of so many vectors is kept in memory.
        key: of the random vectors.
        power: 1, or 2 for ``tr A**2``, from the same products.

    Raises:
        ValueError: as `fj.lanczos`; fewer than 4 products, another power.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> found = fj.spectra.trace(lambda v: 2 * v, jnp.zeros(100), num_products=6, key=jax.random.key(0))
        >>> round(found.value, 2), round(found.standard_error, 3)
        (200.0, 0.0)
        >>> matvec = lambda v: jnp.zeros(50).at[0].set(3.0).at[1].set(4.0) * v
        >>> square = fj.spectra.trace(matvec, jnp.zeros(50), num_products=8, key=jax.random.key(0), power=2)
        >>> round(square.value**0.5, 4)
        5.0
    """
    layout = layout_of(like)
    host = basis_passes.on_host(storage, layout)
    if num_products < 4:
        raise ValueError(f"num_products is at least 4, found {num_products}")
    if power not in (1, 2):
        raise ValueError(f"power is 1 or 2, found {power}")
    squared = power == 2
    kept = min(num_products // 3, layout.size)
    apply = product(matvec, layout, jit)
    basis = basis_passes.allocate(layout, kept, None, host)
    basis, size = _range(basis, apply, kept, key, layout)
    exact = 0.0
    for row in range(size):
        w = _finite(basis, apply(basis_passes.combine(basis, np.eye(size)[row])))
        exact += basis_passes.dot(basis, w, w) if squared else float(basis_passes.project(basis, w, size)[row])
    rest = np.array(
        [
            _probe(basis, apply, size, jax.random.fold_in(key, kept + probe), layout, squared)
            for probe in range(num_products - kept - size if size < layout.size else 0)
        ]
    )
    if not rest.size:
        return Estimate(exact, 0.0, kept + size, exact)
    return Estimate(exact + float(rest.mean()), float(standard_error(rest)), kept + size + len(rest), exact)


def _range(basis, apply: Callable, kept: int, key, layout: Layout):
    """Orthonormal rows that span the products of random signs; fewer where those depend on each other."""
    size, largest = 0, 0.0
    for draw in range(kept):
        w = _finite(basis, apply(random_vector(jax.random.fold_in(key, draw), layout, "normal")))
        before = math.sqrt(basis_passes.dot(basis, w, w))
        if before == 0:
            continue
        largest = max(largest, before)
        _, w, norm = process.orthogonalise(basis, w, np.zeros(max(size, 1)), lambda _: 0.0)
        if norm > 32 * layout.eps * largest:
            basis, _ = basis_passes.write(basis, w, 1 / norm, size)
            size += 1
    return basis, size


def _probe(basis, apply: Callable, size: int, key, layout: Layout, squared: bool) -> float:
    """``u^T A u (n - size) / u^T u`` for a random direction ``u`` outside of ``Q``, or the same of ``|A u|**2``."""
    drawn = process.on(basis, random_vector(key, layout, "normal"))
    _, u, norm = process.orthogonalise(basis, drawn, np.zeros(max(size, 1)), lambda _: 0.0)
    w = _finite(basis, apply(list(u)))
    found = basis_passes.dot(basis, w, w) if squared else basis_passes.dot(basis, u, w)
    return found * (layout.size - size) / norm**2


def _finite(basis, w):
    w = process.on(basis, w)
    if not math.isfinite(basis_passes.dot(basis, w, w)):
        raise InputError("a product has NaN or infinite entries; the loss or a derivative of it is not finite")
    return w

"""The Lanczos process with full reorthogonalisation, breakdowns and thick restarts, as a state and its steps.

After ``m`` steps the basis ``V`` is orthonormal to rounding and ``A V = V G + w c^T + X`` holds, where ``w`` is the
pending direction, ``c`` its coupling and ``X`` what breakdowns and restarts left aside, orthogonal to ``V`` and known
by its size. ``G`` is measured entry by entry and not assumed to be tridiagonal: its upper triangle is the Rayleigh
quotient, and what its lower triangle has more is the operator's asymmetry.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support.errors import InputError
from fisher_jax.spectra.krylov import basis_passes
from fisher_jax.spectra.krylov.basis_passes import Basis
from fisher_jax.spectra.krylov.layout import Layout, Vector, random_vector

_LITTLE = 0.05  # of a vector: after this is subtracted, no second pass finds more than rounding
_SUSPICIOUS = 0.02  # a residual this small may be the noise of products in bfloat16


class Rules(NamedTuple):
    """What is small, relative to the norm of the operator as far as it is known."""

    breakdown: float
    symmetry: float
    eps: float  # of the products
    matvec_dtype: str
    go_on: bool = True  # after a breakdown, with a fresh vector


def rules_for(layout: Layout, matvec_dtype: Any, basis_dtype: Any) -> Rules:
    """Tolerances from the arithmetic and from the narrowest type inside products and storage."""
    narrow = list(layout.dtypes) if matvec_dtype is None else [jnp.dtype(matvec_dtype)]
    narrow += [] if basis_dtype is None else [jnp.dtype(basis_dtype)]
    kind = max(narrow, key=lambda dtype: float(jnp.finfo(dtype).eps))
    eps = max(float(jnp.finfo(kind).eps), layout.eps)
    return Rules(eps / 2 + 32 * layout.eps, math.sqrt(eps), eps, str(kind))


class Process(NamedTuple):
    basis: Basis
    pending: Vector  # the next direction, not normalised
    beta: float  # its norm
    size: int  # vectors in the basis
    matrix: np.ndarray  # G, [rows, rows]
    coupling: np.ndarray  # c, [rows]
    left: np.ndarray  # a factor of X^T X: |X s| = |left s|, [rows, rows]
    scale: float  # the largest |A v| seen: a lower bound of the norm of A
    products: int
    restarts: int
    draws: int  # random vectors drawn so far
    fresh: bool  # the pending direction was drawn at random
    quiet: int  # fresh directions in a row that A sends to zero; once null, how many of them are no steps
    null: bool  # A is zero to rounding where the basis is not
    noise: float  # of a product, relative to its norm; negative until there was a reason to measure it
    key: Any

    @property
    def steps(self) -> int:
        """Products that gave a column; another one measured the noise."""
        return self.products - (self.noise >= 0)

    @property
    def exhausted(self) -> bool:
        return self.size == self.basis.layout.size

    @property
    def done(self) -> bool:
        return self.null or self.exhausted


def start(basis: Basis, key: Any, vector: Vector, drawn: bool = True) -> Process:
    """A process with ``vector`` as its first direction, ``drawn`` at random or given."""
    rows = basis.rows
    vector, _, norm = basis_passes.subtract(basis, on(basis, vector), np.zeros(1))
    if not (math.isfinite(norm) and norm > 0):
        raise InputError(f"the start vector has norm {norm}; wanted a finite vector that is not zero")
    return Process(
        basis, vector, norm, 0, np.zeros((rows, rows)), np.zeros(rows), np.zeros((rows, rows)), 0.0, 0, 0, 1, drawn,
        0, False, -1.0, key,
    )  # fmt: skip


def on(basis: Basis, vector: Vector) -> Vector:
    """A vector where passes over the basis want it."""
    return [np.asarray(x) for x in vector] if basis.on_host else vector


def step(state: Process, product: Callable[[Vector], Vector], rules: Rules) -> Process:
    """One product. Consumes the basis."""
    j = state.size
    basis, v = basis_passes.write(state.basis, state.pending, 1 / state.beta, j)
    matrix, coupling = state.matrix.copy(), np.zeros_like(state.coupling)
    matrix[j, :j] = state.coupling[:j]
    w = on(basis, product(v))
    predicted = matrix[j, : j + 1].copy()
    predicted[j] = basis_passes.dot(basis, v, w)
    del v
    column, w, norm = orthogonalise(basis, w, predicted, lambda x: rules.breakdown * max(state.scale, x))
    if not np.isfinite(norm):
        _explain_nan(state, product, basis, j)
    total = math.hypot(float(np.linalg.norm(column)), norm)
    scale = max(state.scale, total)
    asymmetry = float(np.linalg.norm(column[:j] - matrix[j, :j]))
    matrix[: j + 1, j] = column
    coupling[j] = norm
    state = state._replace(
        basis=basis, pending=w, beta=norm, size=j + 1, matrix=matrix, coupling=coupling, scale=scale,
        products=state.products + 1,
    )  # fmt: skip
    if state.noise < 0 and (asymmetry > rules.symmetry * scale or norm <= _SUSPICIOUS * scale):
        state = _measure_noise(state, product)
    rules = at_least(rules, state.noise)
    if asymmetry > rules.symmetry * scale:
        raise InputError(
            f"the operator is not symmetric: for the vectors of step {j + 1}, u.(A v) and v.(A u) differ by "
            f"{asymmetry:.3g} at |A v| up to {scale:.3g}, more than products with a relative noise of "
            f"{max(state.noise, 0):.1g} explain"
        )
    return _continue(state, rules, drawn=state.fresh, total=total)


def _measure_noise(state: Process, product: Callable) -> Process:
    """How far products are from linear: rounding inside them, seen by a vector whose length is no power of two."""
    signs = jax.random.rademacher(jax.random.fold_in(state.key, 2**32 - 2), (state.size,), np.int32)
    coordinates = 0.7 * np.asarray(signs, np.float64) / math.sqrt(state.size)
    size = float(np.linalg.norm(state.matrix[: state.size, : state.size] @ coordinates))
    size = math.hypot(size, float(state.coupling[: state.size] @ coordinates))
    noise = deviation(state, product, coordinates) / size if size else 0.0
    if not noise <= 0.2:
        raise InputError(
            f"the operator is not linear: A(a u + b v) and a A(u) + b A(v) differ by {noise:.2g} of their size; a "
            "product must not draw random numbers (dropout) or depend on the length of its vector"
        )
    return state._replace(noise=noise, products=state.products + 1)


def at_least(rules: Rules, noise: float) -> Rules:
    """Noise that was measured counts like that of a type with ``eps = 8 noise``."""
    eps = max(8 * noise, 0.0)
    return rules._replace(
        breakdown=max(rules.breakdown, eps / 2), symmetry=max(rules.symmetry, math.sqrt(eps)), eps=max(rules.eps, eps)
    )


def deviation(state: Process, product: Callable[[Vector], Vector], coordinates: np.ndarray) -> float:
    """``|A y - (V G + w c^T) t|`` for ``y = V t``: noise of the products, of storage and of the recurrence."""
    m = state.size
    w = on(state.basis, product(basis_passes.combine(state.basis, coordinates)))
    expected = float(state.coupling[:m] @ coordinates)
    if state.beta > 0 and expected:
        w = [x - np.asarray(expected / state.beta, x.dtype) * p for x, p in zip(w, state.pending, strict=True)]
    return basis_passes.subtract(state.basis, w, state.matrix[:m, :m] @ coordinates)[2]


def orthogonalise(basis: Basis, w: Vector, predicted: np.ndarray, small: Callable[[float], float]):
    """Coefficients of ``w`` in as many rows as are ``predicted``, what is left of it, and the norm of that.

    Classical Gram-Schmidt, twice and until nothing is left to subtract. The first pass takes away what is predicted
    (the three-term recurrence knows nearly all of it) and measures the rest of the coefficients; the second takes
    that away. Where it was little, nothing beyond rounding can be left; else each pass measures what it leaves, and
    the last one is the one that finds nothing beyond rounding (Daniel, Gragg, Kaufman and Stewart 1976: two passes
    are enough unless next to nothing remains).
    """
    w, rest, before = basis_passes.subtract(basis, w, predicted)
    column = predicted + rest
    little = np.linalg.norm(rest) <= _LITTLE * before
    w, rest, norm = basis_passes.subtract(basis, w, rest, measure=not little)
    size = math.hypot(float(np.linalg.norm(column)), norm)
    for _ in range(4 if not little else 0):
        if not np.linalg.norm(rest) > 4 * basis.layout.eps * norm:
            break
        column = column + rest
        w, rest, norm = basis_passes.subtract(basis, w, rest)
        if norm <= small(size) * 1e-3:
            break
    return column, w, norm


def _explain_nan(state: Process, product: Callable, basis: Basis, j: int) -> None:
    """Which leaf it was, at the price of one more product."""
    again = product(basis_passes.combine(basis, np.eye(j + 1)[j]))
    layout = basis.layout
    bad = [p or "the vector" for p, x in zip(layout.paths, again, strict=True) if not np.all(np.isfinite(x))]
    where = f"in {', '.join(bad[:4])}" if bad else "somewhere (a second product with the same vector was finite)"
    raise InputError(
        f"the product of step {j + 1} has NaN or infinite entries {where}; the loss or a derivative is not finite at "
        "these parameters and this batch"
    )


def _continue(state: Process, rules: Rules, drawn: bool, total: float) -> Process:
    """What follows a step: the residual's direction, a fresh one, or the knowledge that nothing is left."""
    if state.exhausted:
        return state
    j, small = state.size - 1, rules.breakdown * state.scale
    quiet = state.quiet + 1 if (drawn or state.quiet) and total <= small else 0
    # A fresh direction that A sends to zero may have too small a part in the largest remaining eigenvector: the next
    # one is what A made of it, and only if that too goes to zero is nothing left.
    if (drawn and total == 0) or quiet == 2:
        return _forget(state, max(quiet, 1), small)
    state = state._replace(quiet=quiet, fresh=False)
    if state.beta > small or (quiet and state.beta > 0):
        return state
    dropped = np.zeros(state.basis.rows)
    dropped[j] = state.beta
    nothing = np.zeros_like(state.coupling)
    state = state._replace(left=_joined(state.left, dropped[None]), coupling=nothing)
    return _draw(state) if rules.go_on else state._replace(beta=0.0)


def _forget(state: Process, quiet: int, small: float) -> Process:
    """Directions that only showed that nothing is left are no steps, but for one if there was no zero before it."""
    shorter = state._replace(size=state.size - quiet)
    zero_known = shorter.size > 0 and float(np.abs(ritz(shorter)[0]).min()) <= small
    forgotten = quiet if zero_known else quiet - 1
    size = state.size - forgotten
    # The row that coupled what is kept to what is forgotten becomes a residual.
    row = np.zeros((1, state.basis.rows))
    row[0, :size] = state.matrix[size, :size] if forgotten else state.coupling[:size]
    return state._replace(
        size=size, left=_joined(state.left, row), coupling=np.zeros_like(state.coupling), null=True, quiet=forgotten
    )


def _draw(state: Process) -> Process:
    """A random direction orthogonal to the basis, coupled to nothing."""
    drawn = random_vector(jax.random.fold_in(state.key, state.draws), state.basis.layout, "normal")
    _, w, norm = orthogonalise(state.basis, on(state.basis, drawn), np.zeros(state.size), lambda _: 0.0)
    return state._replace(pending=w, beta=norm, fresh=True, draws=state.draws + 1)


def ritz(state: Process) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ritz values ascending, their coordinates (columns), and the norms ``|A y - theta y|`` by the recurrence.

    float64 on the host, whatever the configuration of jax.
    """
    m = state.size
    measured = state.matrix[:m, :m]
    upper = np.triu(measured)
    values, vectors = np.linalg.eigh(upper + np.triu(upper, 1).T)
    rows = [_skew(measured) @ vectors, state.coupling[None, :m] @ vectors, state.left[:, :m] @ vectors]
    return values, vectors, np.linalg.norm(np.concatenate(rows), axis=0)


def _skew(measured: np.ndarray) -> np.ndarray:
    return np.tril(measured, -1) - np.triu(measured, 1).T


def restart(state: Process, kept: np.ndarray) -> Process:
    """Thick restart (Wu and Simon 2000): the basis becomes the Ritz vectors of the indices ``kept``, in place."""
    values, vectors, _ = ritz(state)
    m, k, rows = state.size, len(kept), state.basis.rows
    turn = vectors[:, kept]
    aside = np.zeros((rows + m, rows))
    aside[:, :k] = np.concatenate([state.left[:, :m], _skew(state.matrix[:m, :m])]) @ turn
    matrix, coupling = np.zeros((rows, rows)), np.zeros(rows)
    matrix[range(k), range(k)] = values[kept]
    coupling[:k] = state.coupling[:m] @ turn
    return state._replace(
        basis=basis_passes.rotate(state.basis, turn), size=k, matrix=matrix, coupling=coupling, left=_joined(aside),
        restarts=state.restarts + 1,
    )  # fmt: skip


def _joined(*rows: np.ndarray) -> np.ndarray:
    """A square factor with the same norms of products as all the rows."""
    return np.asarray(np.linalg.qr(np.concatenate(rows), mode="r"))

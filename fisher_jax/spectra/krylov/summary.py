"""What a process has found: `Spectrum`, with bounds, and what is missing said."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float64

from fisher_jax._support.outline import outline
from fisher_jax.spectra.krylov import basis_passes, process
from fisher_jax.spectra.krylov.process import Process, Rules

Tree = Any

ENDS = ("largest", "smallest", "both", "magnitude")


class Spectrum(NamedTuple):
    """What `lanczos` found. Numbers are float64 numpy, computed on the host.

    ``eigenvalues`` from the end that was asked for (``both``: ``k`` from the top, then ``k`` from the bottom), NaN
    where an entry is missing (``num_missing``; ``statement`` says why). ``residuals[i]`` bounds the distance from
    ``eigenvalues[i]`` to some eigenvalue of the operator, rounding included. ``converged``: the bound is at most
    ``tol * |eigenvalue|``, or is rounding (``rounding``) alone.
    """

    eigenvalues: Float64[np.ndarray, " entries"]
    residuals: Float64[np.ndarray, " entries"]
    converged: Bool[np.ndarray, " entries"]
    num_missing: int
    condition_number: float  # |largest| / |smallest|; see condition_over
    condition_is_lower_bound: bool
    condition_over: str  # over what it is taken, a sentence
    spectral_gap: float  # distance of the first two entries, NaN if there are not two
    effective_rank: int  # Ritz values not zero by their bounds: at least so many eigenvalues, if not complete
    negative_count: int  # Ritz values that are negative by their bounds: at least so many negative eigenvalues
    negative_sum: float  # their sum: the sum of all negative eigenvalues is at most this
    complete: bool  # every eigenvalue is known: the space was exhausted, or is null where it was not searched
    null_dimension: int  # dimension of the complement on which the operator is zero to rounding; 0 if not found
    num_valid_steps: int  # steps that gave a basis vector, over all restarts
    num_products: int  # with those that verify and those that found the null space
    num_restarts: int
    dimension: int  # entries of a vector
    rounding: float  # part of every residual that is rounding, of products and of storage
    ritz_values: Float64[np.ndarray, " basis"]  # of the final basis, ascending, all of them
    ritz_residuals: Float64[np.ndarray, " basis"]
    eigenvectors: Tree | None  # leading axis: the entries of eigenvalues; zeros for missing ones
    statement: str

    def __repr__(self) -> str:
        return outline(self)


class Plan(NamedTuple):
    k: int
    which: str
    tol: float
    verify: bool


def ends(values: np.ndarray, which: str, k: int) -> list[np.ndarray]:
    """Indices of ascending values from each end that is asked for, ``k`` of each."""
    up = np.arange(len(values))
    if which == "magnitude":
        return [np.argsort(-np.abs(values), kind="stable")[:k]]
    ends = {"largest": [up[::-1]], "smallest": [up], "both": [up[::-1], up]}[which]
    return [end[:k] for end in ends]


def summarise(state: Process, plan: Plan, rules: Rules, apply: Callable, vectors: bool) -> Spectrum:
    values, coordinates, residuals = process.ritz(state)
    rules = process.at_least(rules, state.noise)
    scale = max(state.scale, float(np.abs(values).max()))
    picked = ends(values, plan.which, plan.k)
    wanted, products = np.unique(np.concatenate(picked)), state.products
    rounding = 8 * state.basis.layout.eps * scale * math.sqrt(1 + state.restarts)
    if plan.verify:
        key = jax.random.fold_in(state.key, 2**32 - 1)
        signs = np.asarray(jax.random.rademacher(key, (len(wanted),), np.int32), float) / math.sqrt(len(wanted))
        rounding += math.sqrt(len(wanted)) * process.deviation(state, apply, coordinates[:, wanted] @ signs)
        products += 1
    else:
        rounding += 2 * rules.eps * scale
    bounds = residuals + rounding
    zero = max(rounding, rules.breakdown * scale)
    entries = _listed(state, plan, values, zero, picked)
    found = entries >= 0
    take = np.where(found, entries, 0)
    eigenvalues, errors = (np.where(found, x[take], np.nan) for x in (values, bounds))
    floor = np.maximum(plan.tol * np.abs(values), 2 * rounding)[take]
    condition, lower, over = _condition(state, values, bounds, zero)
    negative, nonzero = values < -bounds, np.abs(values) > bounds
    return Spectrum(
        eigenvalues=eigenvalues,
        residuals=errors,
        converged=found & (bounds[take] <= floor),
        num_missing=int(np.sum(~found)),
        condition_number=condition,
        condition_is_lower_bound=lower,
        condition_over=over,
        spectral_gap=float(abs(eigenvalues[0] - eigenvalues[1])) if plan.k > 1 else _gap(values, plan.which),
        effective_rank=int(nonzero.sum()),
        negative_count=int(negative.sum()),
        negative_sum=float(values[negative].sum()),
        complete=state.done,
        null_dimension=state.basis.layout.size - state.size if state.null else 0,
        num_valid_steps=state.steps - (state.quiet if state.null else 0),
        num_products=products,
        num_restarts=state.restarts,
        dimension=state.basis.layout.size,
        rounding=rounding,
        ritz_values=values,
        ritz_residuals=bounds,
        eigenvectors=_eigenvectors(state, coordinates, entries) if vectors else None,
        statement=_statement(state, plan, zero, int(np.sum(~found))),
    )


def _gap(values: np.ndarray, which: str) -> float:
    (first, *_) = ends(values, which, 2)
    return float(abs(np.diff(values[first])[0])) if len(first) == 2 else math.nan


def _listed(state: Process, plan: Plan, values, zero: float, picked) -> np.ndarray:
    """Indices of the entries, -1 where one is missing."""
    entries = np.full((len(picked), plan.k), -1)
    for row, end in zip(entries, picked, strict=True):
        row[: len(end)] = end
        zeros = np.flatnonzero(np.abs(values[end]) <= zero)
        if state.null and len(zeros):
            row[zeros[0] + 1 :] = -1  # copies of the zero come before whatever is next
    return entries.reshape(-1)


def _condition(state: Process, values, bounds, zero: float) -> tuple[float, bool, str]:
    """A ratio of eigenvalues that exist: of all of them, or of those that are proved by their bounds."""
    sizes = np.abs(values)
    largest = float(sizes.max())
    if largest == 0:
        return math.nan, False, "the operator is zero: no condition number"
    if state.exhausted and bool(np.all(sizes > 20 * bounds)):
        return largest / float(sizes.min()), False, f"over all {len(values)} eigenvalues"
    smallest = zero if state.null else float(np.min(sizes + bounds))
    bound = max(float(np.max(sizes - bounds)), largest - float(bounds[np.argmax(sizes)]), 0.0) / smallest
    if state.done:
        over = f"a lower bound: the smallest of all {state.basis.layout.size} eigenvalues is not told from rounding"
    else:
        over = f"a lower bound: over the eigenvalues near the {len(values)} Ritz values, not over the whole spectrum"
    return bound, True, over


def _statement(state: Process, plan: Plan, zero: float, missing: int) -> str:
    dimension = state.basis.layout.size
    said = []
    if state.null:
        said.append(
            f"on the {dimension - state.size} dimensions beyond these {state.size} steps the operator sends random "
            f"directions to zero (below {zero:.2g}); a repeated zero is listed once"
        )
    elif state.exhausted:
        said.append(f"all {dimension} dimensions were searched")
    if missing:
        asked = plan.k * (2 if plan.which == "both" else 1)
        said.append(f"{missing} of the {asked} eigenvalues asked for are missing (NaN)")
    return "; ".join(said)


def _eigenvectors(state: Process, coordinates: np.ndarray, entries: np.ndarray) -> Tree:
    """Rotates the basis in place and takes it apart leaf by leaf."""
    found = np.where((entries >= 0)[None, :], coordinates[:, np.maximum(entries, 0)], 0.0)
    basis, layout = state.basis, state.basis.layout
    if len(entries) > basis.rows:  # both ends of a small space: entries repeat
        rotated = basis_passes.rotate(basis, coordinates)
        index = np.maximum(entries, 0)
        rows = [x[index] * (entries >= 0).reshape(-1, *[1] * (x.ndim - 1)) for x in rotated.leaves]
    else:
        rotated = basis_passes.rotate(basis, found)
        rows = []
        while rotated.leaves:
            rows.append(rotated.leaves.pop(0)[: len(entries)])
    out = [jnp.asarray(x).astype(work) for x, work in zip(rows, layout.work, strict=True)]
    places = [basis_passes.stacked(place) for place in layout.places]
    return layout.tree([x if p is None else jax.device_put(x, p) for x, p in zip(out, places, strict=True)])

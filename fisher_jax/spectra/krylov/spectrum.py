"""`lanczos`: eigenvalues at the ends of a spectrum, each with a bound of its error."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from fisher_jax import checkpoint
from fisher_jax._support.errors import InputError
from fisher_jax.spectra.krylov import basis_passes, process
from fisher_jax.spectra.krylov.layout import Layout, layout_of, product, random_vector
from fisher_jax.spectra.krylov.process import Process
from fisher_jax.spectra.krylov.summary import ENDS, Plan, Spectrum, ends, summarise

Tree = Any


def lanczos(
    matvec: Callable[[Tree], Tree],
    like: Tree,
    *,
    num_steps: int,
    num_eigenvalues: int,
    which: str = "largest",
    key: Key[Array, ""],
    max_basis: int | None = None,
    tol: float = 1e-3,
    max_restarts: int | None = None,
    check_period: int | None = None,
    start: Tree | None = None,
    eigenvectors: bool = False,
    matvec_dtype: Any = None,
    verify: bool = True,
    storage: str = "auto",
    basis_dtype: Any = None,
    jit: bool = True,
    save: Any = None,
    save_period: int | Callable[[int], bool] = 10,
    resume: bool = False,
) -> Spectrum:
    """Eigenvalues at the ends of the spectrum of a symmetric operator, with bounds that include rounding.

    Lanczos with full reorthogonalisation in two passes: ``theta`` and ``y = V s`` from ``V^T A V s = theta s``, and
    ``|A y - theta y| = beta |s_m|`` bounds the distance of ``theta`` to an eigenvalue (Parlett, The Symmetric
    Eigenvalue Problem, 4.5 and 13). No ghosts: where a step breaks down (``beta <= c eps |A|``), a fresh random
    direction goes on, which is how multiplicity is found; where the operator is zero on all that is left, the
    zero is listed once and ``null_dimension`` says how often it occurs. The values are those of ``matvec``: a mean
    per weighted token for ``fj.operators``.

    Runs on the host, between compiled products and passes; the projected problem is solved there in float64. A
    `jax.tree_util.Partial` with new arrays of the same shapes compiles nothing again. The same key, arguments and
    machine give the same bits.

    Args:
        matvec: symmetric, tree -> tree. A plain function is compiled as a constant of the program: arrays that it
            closes over are too, so prefer a ``Partial``.
        like: arrays or ``jax.ShapeDtypeStruct``s, for example the parameters. Basis and eigenvectors are placed as
            its leaves are. ``None`` and leaves of integers stand still, ``None`` in what ``matvec`` gets and returns.
        num_steps: products, at most; two more may measure noise and verify.
        num_eigenvalues: ``k``; of each end for ``both``.
        which: ``largest``, ``smallest`` (algebraically), ``both``, or ``magnitude``.
        key: of the start vector and the fresh directions.
        max_basis: vectors in memory, at least ``k + 2`` (``both``: ``2 k + 2``), beside two or three that are at
            work; with fewer than ``num_steps`` the process is restarted thickly (Wu and Simon 2000), in place.
            ``None``: ``num_steps``.
        tol: relative to each eigenvalue; a run with restarts stops when all have converged.
        max_restarts: another reason to stop.
        check_period: stop as soon as all have converged, looked at every so many steps. Saves products on a small
            model; the bounds hold as ever, but a copy of a repeated eigenvalue, or one that the start vector hardly
            contains, may not have shown itself yet. ``None``: only a full basis is looked at, before a restart.
        start: first direction, a tree like ``like``; ``None``: random.
        eigenvectors: also the Ritz vectors, orthonormal, at least float32.
        matvec_dtype: the narrowest type inside the products, if narrower than the leaves (bfloat16 matrix products):
            asymmetry and breakdowns are judged by it. Where it is not stated, one more product measures the noise of
            products as soon as something looks like a breakdown or an asymmetry.
        verify: one more product, with a random combination of the wanted Ritz vectors, measures how far the products
            are from linear and the recurrence from true; its size, times ``sqrt(k)``, enters every residual. False:
            ``2 eps |A|`` of ``matvec_dtype`` instead, an assumption.
        storage: of the basis. ``device``: as the leaves lie. ``host``: numpy arrays, each vector crosses once per
            step. ``auto``: ``host`` where the leaves lie on one CPU device (the same memory, faster passes).
        basis_dtype: ``jnp.bfloat16`` halves the memory. Stored vectors are then orthonormal to about
            ``4e-3 / sqrt(dimension)`` and eigenvalues good to that times ``|A|``, but no residual is below about
            ``4e-3 beta``, which the verification sees. ``None``: that of the leaves, at least float32.
        jit: ``False`` for a ``matvec`` that cannot be traced, such as a sum over a data iterator.
        save: a folder for ``fj.checkpoint``, written every ``save_period`` steps.
        save_period: a number, or a function that is asked after each step, with how many there are, whether to save.
        resume: go on from ``save``; the result has the bits of an uninterrupted run.

    Returns:
        `Spectrum`.

    Raises:
        ValueError: ``k`` of 0 or beyond the dimension, fewer steps than eigenvalues, a complex leaf, a product with
            another tree, shape or dtype; as `InputError` what only values show: NaN, an operator that is not
            symmetric, a folder of another run.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> matvec = jax.tree_util.Partial(lambda d, v: {"w": d * v["w"]}, jnp.array([3.0, 1.0, 0.0, 0.0, 0.0]))
        >>> found = fj.lanczos(matvec, {"w": jnp.zeros(5)}, num_steps=5, num_eigenvalues=2, key=jax.random.key(0))
        >>> found.eigenvalues.round(4).tolist(), round(found.spectral_gap, 4), bool(found.converged.all())
        ([3.0, 1.0], 2.0, True)
    """
    layout = layout_of(like)
    host = basis_passes.on_host(storage, layout)
    rows = _check(layout, num_steps, num_eigenvalues, which, max_basis, tol, save, resume)
    if check_period is not None and check_period < 1:
        raise ValueError(f"check_period is at least 1, or None, found {check_period}")
    rules = process.rules_for(layout, matvec_dtype, basis_dtype)
    plan = Plan(num_eigenvalues, which, tol, verify)
    apply = product(matvec, layout, jit)
    due = save_period if callable(save_period) else lambda steps: steps % save_period == 0
    facts = {
        "kind": "lanczos", "which": which, "num_eigenvalues": num_eigenvalues, "max_basis": rows, "tol": tol,
        "basis": str(basis_dtype and jnp.dtype(basis_dtype)), "on_host": host, "matvec_dtype": rules.matvec_dtype,
    }  # fmt: skip
    if resume:
        state = _restore(save, layout, rows, basis_dtype, host, key, facts)
    else:
        basis = basis_passes.allocate(layout, rows, basis_dtype, host)
        first = random_vector(key, layout, "normal") if start is None else _leaves(start, layout)
        state = process.start(basis, key, first, drawn=start is None)
        del basis, first
    while not (state.done or state.steps >= num_steps):
        if state.size == rows:
            if (max_restarts is not None and state.restarts >= max_restarts) or _all_converged(state, plan):
                break
            state = process.restart(state, _kept(state, plan))
        elif check_period is not None and _due(state, plan, check_period) and _all_converged(state, plan):
            break
        state = process.step(state, apply, rules)
        if save is not None and due(state.steps):
            checkpoint.save(save, _saved(state), metadata=facts)
    return summarise(state, plan, rules, apply, eigenvectors)


def _check(layout: Layout, num_steps, k, which, max_basis, tol, save, resume) -> int:
    """The number of vectors of the basis; errors for what cannot be."""
    if which not in ENDS:
        raise ValueError(f"which is one of {', '.join(ENDS)}, found {which!r}")
    if not 1 <= k <= layout.size:
        raise ValueError(f"num_eigenvalues is between 1 and the dimension, {layout.size}; found {k}")
    wanted = min(2 * k, layout.size) if which == "both" else k
    if num_steps < wanted:
        raise ValueError(f"{wanted} eigenvalues (which={which!r}) need at least as many steps, found {num_steps}")
    if not tol >= 0:
        raise ValueError(f"tol is at least 0, found {tol}")
    if resume and save is None:
        raise ValueError("resume=True goes on from the folder of save=, which is not given")
    rows = min(num_steps, layout.size)
    if max_basis is not None and max_basis < rows:
        if max_basis < wanted + 2:
            raise ValueError(
                f"max_basis is at least {wanted + 2} for {wanted} eigenvalues (which={which!r}), found {max_basis}"
            )
        rows = max_basis
    return rows


def _leaves(tree: Tree, layout: Layout) -> list:
    leaves, treedef = jax.tree.flatten(tree)
    if treedef != layout.treedef or [jnp.shape(x) for x in leaves] != list(layout.shapes):
        raise ValueError(f"start is a tree like `like`, {layout.treedef} with shapes {list(layout.shapes)}")
    put = [jnp.array(x, dtype) for x, dtype in zip(leaves, layout.work, strict=True)]
    return [x if place is None else jax.device_put(x, place) for x, place in zip(put, layout.places, strict=True)]


def _due(state: Process, plan: Plan, check_period: int) -> bool:
    """Whether it is time to look, and there is anything to look at."""
    wanted = 2 * plan.k if plan.which == "both" else plan.k
    return state.steps % check_period == 0 and state.size >= min(wanted + 1, state.basis.layout.size)


def _all_converged(state: Process, plan: Plan) -> bool:
    """By the recurrence; half the tolerance is left for rounding, which is measured at the end."""
    values, _, residuals = process.ritz(state)
    wanted = np.unique(np.concatenate(ends(values, plan.which, plan.k)))
    floor = 8 * state.basis.layout.eps * state.scale
    return bool(np.all(residuals[wanted] <= np.maximum(plan.tol / 2 * np.abs(values[wanted]), floor)))


def _kept(state: Process, plan: Plan) -> np.ndarray:
    """Ritz vectors that a restart keeps: the wanted ones, and as many more as leave room for some steps."""
    values, _, _ = process.ritz(state)
    rows = state.basis.rows
    wanted = 2 * plan.k if plan.which == "both" else plan.k
    total = min(wanted + (rows - wanted) // 2, rows - 2)
    each = total // 2 if plan.which == "both" else total
    return np.unique(np.concatenate(ends(values, plan.which, each)))


# What a process knows beside its vectors, each with its type.
_NUMBERS = {name: kind for name, kind in Process.__annotations__.items() if name not in ("basis", "pending", "key")}


def _saved(state: Process) -> dict:
    return {
        "basis": state.basis.leaves,
        "pending": state.pending,
        "key": state.key,
        "numbers": {name: np.asarray(getattr(state, name), np.float64) for name in _NUMBERS},
    }


def _restore(folder: Any, layout: Layout, rows: int, dtype: Any, on_host: bool, key: Any, facts: dict) -> Process:
    square, row, one = np.zeros((rows, rows)), np.zeros(rows), np.zeros(())
    places = [None] * len(layout.places) if on_host else layout.places
    vector = zip(layout.shapes, layout.work, places, strict=True)
    like = {
        "basis": basis_passes.empty_like(layout, rows, dtype, on_host),
        "pending": [jax.ShapeDtypeStruct(shape, work, sharding=place) for shape, work, place in vector],
        "key": key,
        "numbers": {n: {"matrix": square, "left": square, "coupling": row}.get(n, one) for n in _NUMBERS},
    }
    saved = checkpoint.restore(folder, like, metadata=facts)
    if not np.array_equal(jax.random.key_data(saved["key"]), jax.random.key_data(key)):
        raise InputError(f"the run saved in {folder} has another key: pass the one that it was started with")
    numbers = {n: x if _NUMBERS[n] is np.ndarray else _NUMBERS[n](x) for n, x in saved["numbers"].items()}
    basis = basis_passes.Basis(saved["basis"], layout, rows, on_host)
    return Process(basis=basis, pending=saved["pending"], key=saved["key"], **numbers)

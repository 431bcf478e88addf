"""Preconditioned conjugate gradients, one product a step, with the bound of Gauss and Radau.

A step is a pure function of a state and of one product, so that the same steps run inside a compiled loop and on the
host. Some products are *looks*: of ``x``, to compute the residual anew. A look ends the work, or starts the recursion
again where rounding has carried it away from the true residual.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax.operators.tree_vectors import add_scaled, dot, norm, scalar_dtype, select, zeros_like

__all__ = ["RUNNING", "Limits", "State", "next_vector", "start", "step"]

Tree = Any
RUNNING, CONVERGED, ROUNDING, STEPS, NOT_POSITIVE, NOT_FINITE = range(6)


class Limits(NamedTuple):
    """Numbers that stay the same: ``A = C + damping I``, and ``smallest`` at most the least eigenvalue of ``M A``.

    ``M`` is the preconditioner. ``smallest`` is 0 where nothing is known, and ``damping`` 0 where there is no bound.
    """

    b: Tree
    damping: Array
    smallest: Array
    rtol: Array
    max_steps: Array


class State(NamedTuple):
    x: Tree
    r: Tree  # b - A x by recursion
    p: Tree
    rz: Array  # r M r
    radau: Array  # rz times this is at least the squared error in the norm of A
    look: Array  # the next product is of x
    steps: Array
    products: Array
    largest: Array  # the largest Rayleigh quotient of A so far
    residual: Array  # norm of b - A x at the last look
    bound: Array  # of the error in the norm of A at the last look
    status: Array


def start(limits: Limits, x0: Tree | None, precondition: Callable[[Tree], Tree]) -> State:
    b = limits.b
    dtype = scalar_dtype(b)
    one, count = jnp.ones((), dtype), jnp.zeros((), jnp.int32)
    z = precondition(b)
    size = norm(b)
    rz = dot(b, z)
    running = jnp.where(size == 0, CONVERGED, jnp.where(rz < 0, NOT_POSITIVE, RUNNING))
    running = jnp.where(jnp.isfinite(rz), running, NOT_FINITE).astype(jnp.int32)
    return State(
        x=zeros_like(b) if x0 is None else x0,
        r=b,
        p=z,
        rz=rz,
        radau=one / limits.smallest if x0 is None else one * jnp.inf,
        look=jnp.asarray(x0 is not None),
        steps=count,
        products=count,
        largest=0 * one,
        residual=jnp.where(size == 0, 0 * one, one * jnp.inf),
        bound=jnp.where(size == 0, 0 * one, one * jnp.inf),
        status=running,
    )


def next_vector(state: State) -> Tree:
    """What the next product is of."""
    return select(state.look, state.x, state.p)


def step(state: State, product: Tree, limits: Limits, precondition: Callable[[Tree], Tree]) -> State:
    """The state after the product ``A v`` of `next_vector`; of a state that runs no longer the same one."""
    new = _step(state, product, limits, precondition)
    return select(state.status == RUNNING, new, state)


def _step(state: State, q: Tree, limits: Limits, precondition: Callable[[Tree], Tree]) -> State:
    dtype = state.rz.dtype
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    look = state.look
    curvature = dot(state.p, q)
    square = dot(state.p, state.p)
    alpha = jnp.where(look, zero, state.rz / curvature)
    x = add_scaled(state.x, alpha, state.p)
    anew = add_scaled(limits.b, -one, q)
    drift = norm(add_scaled(anew, -one, state.r))
    r = select(look, anew, add_scaled(state.r, -alpha, q))
    z = precondition(r)
    rz = dot(r, z)
    beta = jnp.where(look, zero, rz / state.rz)
    p = add_scaled(z, beta, state.p)

    size, size_b = norm(r), norm(limits.b)
    largest = jnp.where(look, state.largest, jnp.maximum(state.largest, curvature / square))
    eps = jnp.asarray(jnp.finfo(dtype).eps, dtype)
    rounding = eps * (size_b + largest * norm(x))
    enough = size <= limits.rtol * size_b
    steps = state.steps + jnp.where(look, 0, 1)

    # After a step: the squared error is at most radau * rz (Meurant and Tichy 2013, for a lower end of the spectrum).
    ahead = jnp.maximum(state.radau - alpha, zero)
    known = jnp.isfinite(state.radau)
    next_radau = jnp.where(known, ahead / (limits.smallest * ahead + beta), one * jnp.inf)
    anew_radau = one / limits.smallest
    # At a look: what the recursion said, and how far it was from the residual; or the residual alone.
    root = jnp.sqrt(limits.damping)
    by_recursion = jnp.sqrt(state.radau * state.rz) + drift / root
    bound = jnp.minimum(by_recursion, jnp.minimum(jnp.sqrt(anew_radau * rz), size / root)) + 4 * rounding / root
    bound = jnp.where(jnp.isnan(bound), one * jnp.inf, bound)

    slow = size > state.residual / 2  # since the last look: rounding allows no more
    last = jnp.where(slow, ROUNDING, jnp.where(steps >= limits.max_steps, STEPS, RUNNING))
    at_look = jnp.where(enough, CONVERGED, last)
    status = jnp.where(look, at_look, jnp.where(curvature <= 0, NOT_POSITIVE, RUNNING))
    status = jnp.where((status == RUNNING) & (rz < 0), NOT_POSITIVE, status)
    finite = jnp.where(look, jnp.isfinite(size), jnp.isfinite(curvature) & jnp.isfinite(rz) | (curvature <= 0))
    status = jnp.where(finite, status, NOT_FINITE)
    return State(
        x=x,
        r=r,
        p=p,
        rz=rz,
        radau=jnp.where(look, anew_radau, next_radau),
        look=~look & (enough | (size <= rounding / 4) | (rz <= 0) | (steps >= limits.max_steps)),
        steps=steps,
        products=state.products + 1,
        largest=largest,
        residual=jnp.where(look, size, state.residual),
        bound=jnp.where(look, bound, state.bound),
        status=status.astype(jnp.int32),
    )

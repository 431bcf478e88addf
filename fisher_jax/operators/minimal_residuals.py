"""MINRES (Paige and Saunders 1975), preconditioned, for products that are symmetric and not positive.

The same interface as `fisher_jax.operators.conjugate_gradients`: a state, its next vector, a step with the product of
it. The Lanczos vectors of ``M A`` are scaled to ``v M^-1 v = 1``; ``phi`` is the norm of the residual by recursion in
the norm of the preconditioner ``M``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax.operators.conjugate_gradients import (
    CONVERGED,
    NOT_FINITE,
    NOT_POSITIVE,
    ROUNDING,
    RUNNING,
    STEPS,
    Limits,
)
from fisher_jax.operators.tree_vectors import add_scaled, dot, norm, scalar_dtype, select, zeros_like

__all__ = ["State", "next_vector", "start", "step"]

Tree = Any


class Rotation(NamedTuple):
    """What the last plane rotation left of the tridiagonal matrix."""

    cosine: Array
    sine: Array
    delta: Array  # above the diagonal of the next column, before its rotation
    epsilon: Array


class State(NamedTuple):
    x: Tree
    last: Tree  # the Lanczos vectors before M, the last and the one before
    before: Tree
    v: Tree  # the Lanczos vector after M, scaled
    w: Tree  # the last two directions of x
    w_before: Tree
    beta: Array
    beta_before: Array
    phi: Array
    goal: Array  # of phi, where the residual is looked at
    metric: Array  # phi by the norm of the residual, where the recursion began
    rotation: Rotation
    look: Array
    steps: Array
    products: Array
    largest: Array
    residual: Array
    bound: Array  # infinite: a product that is not positive has none
    status: Array


def start(limits: Limits, x0: Tree | None, precondition: Callable[[Tree], Tree]) -> State:
    dtype = scalar_dtype(limits.b)
    zero, one, count = jnp.zeros((), dtype), jnp.ones((), dtype), jnp.zeros((), jnp.int32)
    nothing = zeros_like(limits.b)
    size = norm(limits.b)
    status = jnp.where(size == 0, CONVERGED, RUNNING)
    state = State(
        x=nothing if x0 is None else x0, last=nothing, before=nothing, v=nothing, w=nothing, w_before=nothing,
        beta=zero, beta_before=zero, phi=zero, goal=zero, metric=zero, rotation=_unturned(dtype),
        look=jnp.asarray(x0 is not None),
        steps=count, products=count, largest=zero, residual=jnp.where(size == 0, zero, one * jnp.inf),
        bound=jnp.where(size == 0, zero, one * jnp.inf),
        status=jnp.where(jnp.isfinite(size), status, NOT_FINITE).astype(jnp.int32),
    )  # fmt: skip
    return _begin(state, limits.b, precondition(limits.b), limits)


def _unturned(dtype: Any) -> Rotation:
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    return Rotation(-one, zero, zero, zero)


def _begin(state: State, r: Tree, z: Tree, limits: Limits) -> State:
    """The recursion from a residual ``r``, and ``z = M r``."""
    square = dot(r, z)
    beta = jnp.sqrt(square)
    nothing = zeros_like(state.x)
    size = norm(r)
    share = jnp.where(size > 0, limits.rtol * norm(limits.b) / size, 0 * size) / 2
    least = jnp.asarray(jnp.finfo(beta.dtype).eps, beta.dtype) / 4
    status = jnp.where((state.status == RUNNING) & (square < 0), NOT_POSITIVE, state.status)
    return state._replace(
        last=r, before=nothing, v=_divided(z, beta), w=nothing, w_before=nothing, beta=beta,
        beta_before=jnp.zeros_like(beta), phi=beta, goal=jnp.maximum(share, least) * beta,
        metric=jnp.where(size > 0, beta / size, 0 * size), rotation=_unturned(beta.dtype), status=status,
    )  # fmt: skip


def next_vector(state: State) -> Tree:
    """What the next product is of."""
    return select(state.look, state.x, state.v)


def step(state: State, product: Tree, limits: Limits, precondition: Callable[[Tree], Tree]) -> State:
    """The state after the product ``A v`` of `next_vector`; of a state that runs no longer the same one."""
    one = jnp.ones((), state.beta.dtype)
    anew = add_scaled(limits.b, -one, product)
    alpha = dot(state.v, product)
    y = add_scaled(product, -alpha / state.beta, state.last)
    before = jnp.where(state.beta_before > 0, state.beta / state.beta_before, 0 * one)
    y = add_scaled(y, -before, state.before)
    r = select(state.look, anew, y)
    z = precondition(r)
    new = select(state.look, _looked(state, r, z, limits), _stepped(state, alpha, r, z, limits))
    return select(state.status == RUNNING, new, state)


def _looked(state: State, r: Tree, z: Tree, limits: Limits) -> State:
    size = norm(r)
    status = jnp.where(size > state.residual / 2, ROUNDING, RUNNING)
    status = jnp.where((status == RUNNING) & (state.steps >= limits.max_steps), STEPS, status)
    status = jnp.where(size <= limits.rtol * norm(limits.b), CONVERGED, status)
    status = jnp.where(jnp.isfinite(size), status, NOT_FINITE).astype(jnp.int32)
    state = state._replace(look=~state.look, products=state.products + 1, residual=size, status=status)
    return _begin(state, r, z, limits)


def _stepped(state: State, alpha: Array, y: Tree, z: Tree, limits: Limits) -> State:
    square = dot(y, z)
    beta = jnp.sqrt(jnp.maximum(square, 0))
    cosine, sine, delta, epsilon = state.rotation
    diagonal = cosine * delta + sine * alpha
    bar = sine * delta - cosine * alpha
    eps = jnp.asarray(jnp.finfo(beta.dtype).eps, beta.dtype)
    rotation = Rotation(cosine=cosine, sine=sine, delta=-cosine * beta, epsilon=sine * beta)
    tiny = jnp.asarray(jnp.finfo(beta.dtype).tiny, beta.dtype)
    gamma = jnp.maximum(jnp.hypot(bar, beta), tiny)
    rotation = rotation._replace(cosine=bar / gamma, sine=beta / gamma)
    w = add_scaled(add_scaled(state.v, -epsilon, state.w_before), -diagonal, state.w)
    w = _divided(w, gamma)
    x = add_scaled(state.x, rotation.cosine * state.phi, w)
    phi = rotation.sine * state.phi
    largest = jnp.maximum(state.largest, jnp.hypot(alpha, jnp.maximum(beta, state.beta)))
    steps = state.steps + 1
    ended = (beta <= eps * largest) | (phi <= tiny)
    rounding = eps / 4 * largest * norm(x) * state.metric
    look = ended | (phi <= jnp.maximum(state.goal, rounding)) | (steps >= limits.max_steps)
    status = jnp.where(square < -eps * dot(y, y), NOT_POSITIVE, RUNNING)
    finite = jnp.isfinite(alpha) & jnp.isfinite(square)
    return state._replace(
        x=x, last=y, before=state.last, v=_divided(z, jnp.maximum(beta, tiny)), w=w, w_before=state.w, beta=beta,
        beta_before=state.beta, phi=phi, rotation=rotation, look=look, steps=steps, products=state.products + 1,
        largest=largest, status=jnp.where(finite, status, NOT_FINITE).astype(jnp.int32),
    )  # fmt: skip


def _divided(x: Tree, by: Array) -> Tree:
    return add_scaled(zeros_like(x), 1 / by, x)

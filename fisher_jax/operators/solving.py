"""`solve`: ``(C + damping I) x = b`` for the products of this room, with bounds of the error."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from fisher_jax._support.errors import InputError
from fisher_jax._support.jax_internals import is_traced
from fisher_jax._support.meshes import laid_out, places
from fisher_jax._support.outline import outline
from fisher_jax.kronecker.numbers import check_numbers
from fisher_jax.operators import conjugate_gradients, minimal_residuals
from fisher_jax.operators.conjugate_gradients import NOT_FINITE, NOT_POSITIVE, RUNNING, Limits
from fisher_jax.operators.preconditioners import preconditioner_of
from fisher_jax.operators.tree_vectors import add_scaled, check_like, each, norm, number_of, scalar_dtype, widened

__all__ = ["Solution", "solve"]

Tree = Any
_METHODS = {"cg": conjugate_gradients, "minres": minimal_residuals}
_REASONS = ("running", "converged", "limited by rounding", "limited by max_steps", "not positive", "not finite")


class Solution(NamedTuple):
    """What `fj.solve` found. Arrays have one entry for each right-hand side where there are several.

    Attributes:
        x: a tree like ``b``, at least float32, which lies on devices as ``b`` does; NaN where the product is not
            positive or not finite.
        residual: ``|b - (C + damping I) x|``, computed from ``x`` by a product of its own.
        relative_residual: ``residual / |b|``; 0 for ``b = 0``.
        error_bound: at least ``sqrt(e^T (C + damping I) e)``, ``e = x - (C + damping I)^-1 b``, for a positive
            semi-definite ``C``; infinite without damping, and with ``method="minres"``. Then
            ``|e| <= error_bound / sqrt(damping)``.
        num_products: products with ``C``.
        status: 1 converged, 2 rounding allows no more, 3 ``max_steps`` reached, 4 not positive, 5 not finite.
    """

    x: Tree
    residual: Float[Array, "..."]
    relative_residual: Float[Array, "..."]
    error_bound: Float[Array, "..."]
    num_products: Int[Array, "..."]
    status: Int[Array, "..."]

    @property
    def converged(self) -> Bool[Array, "..."]:
        """Whether the relative residual is at most ``rtol``."""
        return self.status == 1

    @property
    def reason(self) -> str | list[str]:
        """Why it ended, in words; outside of ``jit``."""
        found = [_REASONS[int(s)] for s in jnp.ravel(self.status)]
        return found if jnp.ndim(self.status) else found[0]

    def __repr__(self) -> str:
        return outline(self)


def solve(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    damping: float | Array,
    preconditioner: Any = None,
    method: Literal["cg", "minres"] = "cg",
    rtol: float | Array = 1e-5,
    max_steps: int = 1000,
    x0: Tree | None = None,
    several: bool = False,
    jit: bool = True,
) -> Solution:
    """``x = (C + damping I)^-1 b`` by conjugate gradients, with the true residual and an upper bound of the error.

    One product with ``C`` a step. When the residual of the recursion is small enough, another product computes it
    anew; the recursion starts again from there as long as that helps, so that the answer is as good as rounding
    allows: a relative residual of about ``eps |C| |x| / |b|``.

    The bound is that of Gauss and Radau from the numbers of the recursion (Golub and Meurant 2010; Meurant and Tichy
    2013), given that no eigenvalue of ``C + damping I`` is below ``damping``, plus what rounding did to the
    recursion; or ``residual / sqrt(damping)``, where that is smaller. It costs no product.

    Args:
        matvec: ``v -> C v``, symmetric: a product of `fj.operators`, or your own. Several batches:
            `fj.operators.over_batches`, with ``jit=False``.
        b: a tree as ``matvec`` takes it, floating, ``None`` where nothing moves.
        damping: not negative, in the units of ``C``.
        preconditioner: an approximate inverse of ``C + damping I``:

            - the result of `fj.kfac_factors` (EK-FAC too), with the damping given here: block by block the inverse of
              `fj.precondition`;
            - a tree like ``b`` with a diagonal that is not negative, such as a diagonal Fisher (`fj.mean` of a state
              by entries): ``v / (diagonal + damping)``;
            - a function ``v -> M v``, symmetric and positive. Its bound is ``residual / sqrt(damping)``.
        method: ``"cg"`` for a positive ``C + damping I``: GGN, Fisher, a Hessian with enough damping. ``"minres"``
            (Paige and Saunders 1975) for any symmetric ``C``, without bounds.
        rtol: the relative residual ``|b - (C + damping I) x| / |b|`` that is enough.
        max_steps: of all recursions together.
        x0: where to start; zeros.
        several: leaves of ``b`` (and ``x0``) have a leading axis of right-hand sides, which are solved side by side.
        jit: one compiled loop. ``False`` for a ``matvec`` that runs on the host: one product at a time, and one
            right-hand side after the other in each.

    Returns:
        `Solution`. Not converged is told by ``status``, and by the bound.

    Raises:
        ValueError: trees that do not fit, negative damping, a method that does not exist.
        InputError: outside of ``jit`` a product or a preconditioner that is not positive, or not finite numbers.
            Inside, ``x`` is NaN and ``status`` says so.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x @ params["kernel"]
        >>> params = {"kernel": jnp.zeros((2, 1))}
        >>> batch = fj.Batch(jnp.diag(jnp.array([2.0, 1.0])), jnp.array([[1.0], [1.0]]))
        >>> matvec = fj.operators.ggn(apply_fn, fj.gaussian, params, batch)  # diag(2, 1/2)
        >>> found = fj.solve(matvec, {"kernel": jnp.ones((2, 1))}, damping=0.5)
        >>> [round(float(x), 4) for x in found.x["kernel"][:, 0]], found.reason
        ([0.4, 1.0], 'converged')
        >>> factors = fj.kfac_factors(apply_fn, fj.gaussian, params, batch)
        >>> found = fj.solve(matvec, {"kernel": jnp.ones((2, 1))}, damping=0.5, preconditioner=factors)
        >>> int(found.num_products)  # K-FAC is exact here: one step, and one look at the residual
        2
    """
    if method not in _METHODS:
        raise ValueError(f"method is one of {', '.join(_METHODS)}, found {method!r}")
    check_numbers(damping=damping)
    if max_steps < 1:
        raise ValueError(f"max_steps is at least 1, found {max_steps}")
    b = widened(b, "b")
    lead = number_of(b, "several right-hand sides") if several else None
    x0 = None if x0 is None else check_like(x0, b, "x0")
    matvec = matvec if isinstance(matvec, Partial) else Partial(matvec)
    one = jax.tree.map(lambda x: x[0], b) if several else b
    dtype = scalar_dtype(b)
    damping = jnp.asarray(damping, dtype)
    given, smallest = preconditioner_of(preconditioner, one, damping)
    # A little below: the bound divides by differences that vanish where the least eigenvalue is the damping.
    limits = (damping, smallest * jnp.asarray(1 - 1e-3, dtype), jnp.asarray(rtol, dtype), jnp.asarray(max_steps))
    if jit:
        jax.eval_shape(_checked, matvec, one)  # shape errors come before the loop
        state = _run(method, matvec, given, b, x0, limits, lead is not None)
    else:
        state = _run_on_host(method, matvec, given, b, x0, limits, lead is not None)
    return _solution(state, b, lead is not None)


def _checked(matvec: Partial, v: Tree) -> Tree:
    return check_like(matvec(v), v, "the product's result")


def _damped(product: Tree, v: Tree, damping: Array) -> Tree:
    return add_scaled(product, damping, v)


@functools.partial(jax.jit, static_argnums=(0, 6))
def _run(method: str, matvec: Partial, given: Partial, b: Tree, x0: Tree, limits: tuple, several: bool) -> Any:
    algorithm = _METHODS[method]

    def one(b, x0):
        found = Limits(b, *limits)

        def step(state):
            v = algorithm.next_vector(state)
            return algorithm.step(state, _damped(_checked(matvec, v), v, found.damping), found, given)

        first = algorithm.start(found, x0, given)
        return jax.lax.while_loop(lambda state: state.status == RUNNING, step, first)

    return each(one)(b, x0) if several else one(b, x0)


def _run_on_host(method, matvec, given, b, x0, limits, several: bool) -> Any:
    state = _first(method, given, b, x0, limits, several)
    while bool(jnp.any(state.status == RUNNING)):
        v = _vector(method, state, several)
        if several:
            count = number_of(b, "several right-hand sides")
            products = [_checked(matvec, jax.tree.map(lambda x, i=i: x[i], v)) for i in range(count)]
            product = jax.tree.map(lambda *x: jnp.stack(x), *products)
        else:
            product = _checked(matvec, v)
        state = _next(method, given, b, limits, state, v, product, several)
    return state


@functools.partial(jax.jit, static_argnums=(0, 5))
def _first(method, given, b, x0, limits, several: bool) -> Any:
    def one(b, x0):
        return _METHODS[method].start(Limits(b, *limits), x0, given)

    return jax.vmap(one)(b, x0) if several else one(b, x0)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _vector(method: str, state: Any, several: bool) -> Tree:
    next_vector = _METHODS[method].next_vector
    return jax.vmap(next_vector)(state) if several else next_vector(state)


@functools.partial(jax.jit, static_argnums=(0, 7))
def _next(method, given, b, limits, state, v, product, several: bool) -> Any:
    def one(b, state, v, product):
        found = Limits(b, *limits)
        return _METHODS[method].step(state, _damped(product, v, found.damping), found, given)

    return jax.vmap(one)(b, state, v, product) if several else one(b, state, v, product)


def _solution(state: Any, b: Tree, several: bool) -> Solution:
    bad = (state.status == NOT_POSITIVE) | (state.status == NOT_FINITE)
    if not is_traced(state.status):
        _raise_for(state)
    size = jax.vmap(norm)(b) if several else norm(b)

    def blanked(x):
        where = bad.reshape(bad.shape + (1,) * (x.ndim - bad.ndim))
        return jnp.where(where, jnp.full_like(x, jnp.nan), x)

    residual = jnp.where(bad, jnp.full_like(state.residual, jnp.nan), state.residual)
    relative = jnp.where(size == 0, jnp.zeros_like(size), residual / size)
    bound = jnp.where(bad, jnp.full_like(state.bound, jnp.nan), state.bound)
    leaves, treedef = jax.tree.flatten(b)
    x = laid_out(jax.tree.leaves(jax.tree.map(blanked, state.x)), places(leaves))
    return Solution(jax.tree.unflatten(treedef, x), residual, relative, bound, state.products, state.status)


def _raise_for(state: Any) -> None:
    statuses = [int(s) for s in jnp.ravel(state.status)]
    if NOT_POSITIVE in statuses:
        raise InputError(
            f"C + damping I or the preconditioner is not positive: found at product {int(jnp.max(state.products))}. "
            "Use more damping, a GGN or Fisher in place of a Hessian, or method='minres'"
        )
    if NOT_FINITE in statuses:
        raise InputError(
            f"b, the product or the preconditioner is not finite at product {int(jnp.max(state.products))}: look at "
            "the parameters and the batch, for example with fj.check"
        )

"""Models merged by the Kronecker factors of their curvature, which know how parameters go together."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fisher_jax._support.dtypes import wide
from fisher_jax._support.outline import outline
from fisher_jax.kronecker.curvature.factors import Factors, precondition
from fisher_jax.kronecker.curvature.product import curvature_product
from fisher_jax.kronecker.optimizer.quadratic import tree_dot
from fisher_jax.uses.merging import scales_of, weighted_mean
from fisher_jax.uses.trees import check_alike

Tree = Any


class KFACMerge(NamedTuple):
    """What `merge_kfac` found.

    Attributes:
        params: the merged model, a tree like the first, in its dtypes.
        residual: ``|b - C x| / |b|`` of the linear system, a scalar; 0 where the models are equal.
        num_steps: int32, steps of conjugate gradients taken.
    """

    params: Tree
    residual: Float[Array, ""]
    num_steps: Int[Array, ""]

    def __repr__(self) -> str:
        return outline(self)


def merge_kfac(
    params_list: Sequence[Tree],
    factors_list: Sequence[Factors],
    *,
    scales: Sequence[float] | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-5,
) -> KFACMerge:
    """The minimum over ``p`` of ``sum_i c_i (p - p_i)^T (F_i + damping_i I) (p - p_i) / 2``, ``F_i ~ A_i (x) G_i``.

    Where a diagonal Fisher takes a mean entry by entry, this one moves along directions that a task does not care
    for, whichever mix of parameters they are. Solved for the step from ``sum_i c_i p_i / sum_i c_i`` by conjugate
    gradients, with ``sum_i c_i (F_i + damping_i I)^-1`` as preconditioner: no matrix larger than the factors. The
    damping of each `fj.kfac_factors` is what keeps unknown directions at the plain mean.

    Args:
        params_list: trees of floating arrays, alike in shapes and dtypes.
        factors_list: one for each, from `fj.kfac_factors` at these parameters, with ``form`` other than factored.
            An embedding that is tied to its head, and the low-rank true Fisher of a head, may be among the blocks.
        scales: ``c_i``, not negative; ``None``: all 1. As in `fj.merge_params`.
        max_steps: of conjugate gradients at most.
        tolerance: stop at this residual.

    Returns:
        `KFACMerge`. Look at ``residual``: above ``tolerance`` the steps were too few, or float32 has no more to give.
        Works under ``jit``.

    Raises:
        ValueError: no model, another number of factors or scales, trees, shapes or dtypes that differ, a negative
            scale; a low-rank true Fisher of a head of too many columns to be inverted, named by `fj.precondition`.

    See Tam, Bansal and Raffel (2023), Merging by matching models in task parameter subspaces.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x @ params["w"]
        >>> models = [{"w": jnp.array([[1.0], [0.0]])}, {"w": jnp.array([[0.0], [1.0]])}]
        >>> inputs = [jnp.array([[1.0, 0.0]] * 2), jnp.array([[0.0, 1.0]] * 2)]  # each task sees one feature
        >>> batches = [fj.Batch(x, apply_fn(p, x) + jnp.array([[1.0], [-1.0]])) for x, p in zip(inputs, models)]
        >>> factors = [fj.kfac_factors(apply_fn, fj.gaussian, p, b) for p, b in zip(models, batches)]
        >>> fj.kfac_tools.merge_kfac(models, factors).params["w"].round(2).ravel().tolist()
        [1.0, 1.0]
    """
    counts = scales_of(params_list, scales)
    if len(factors_list) != len(params_list):
        raise ValueError(f"{len(params_list)} models need as many factors, found {len(factors_list)}")
    if max_steps < 1:
        raise ValueError(f"max_steps is at least 1, found {max_steps}")
    for i, factors in enumerate(factors_list):
        if not isinstance(factors, Factors):
            raise TypeError(f"factors {i} are those of fj.kfac_factors, found {type(factors).__name__}")
        if factors.form == "factored":
            raise ValueError(f"factors {i} have form='factored', which only inverts; use form='exact'")
    inverses = [dataclasses.replace(f, form="exact", power=-1.0) for f in factors_list]
    models = [jax.tree.map(wide, params) for params in params_list]
    weights = [jnp.asarray(c, jnp.result_type(float)) for c in counts]
    middle = jax.tree.map(lambda *x: weighted_mean(list(x), weights, counts), *models)

    def curved(factors: Factors, tree: Tree) -> Tree:
        # Not a power of the preconditioner: a tied leaf and a softmax head have products, but no other power.
        products = curvature_product(factors, tree)
        return jax.tree.map(lambda f, x: f + factors.damping.astype(x.dtype) * x, products, tree)

    def summed(function: Any, every: list[Factors], trees: list[Tree]) -> Tree:
        parts = [function(f, tree) for f, tree in zip(every, trees, strict=True)]
        return jax.tree.map(lambda *x: sum(w.astype(y.dtype) * y for w, y in zip(weights, x, strict=True)), *parts)

    offsets = [jax.tree.map(jnp.subtract, params, middle) for params in models]
    rhs = summed(curved, list(factors_list), offsets)
    check_alike(rhs, middle, "the factors", "the parameters")
    step, residual, num_steps = _conjugate_gradients(
        lambda x: summed(curved, list(factors_list), [x] * len(models)), rhs,
        lambda x: summed(precondition, inverses, [x] * len(models)), max_steps, tolerance,
    )  # fmt: skip
    merged = jax.tree.map(lambda m, s, p: (m + s).astype(jnp.result_type(p)), middle, step, params_list[0])
    return KFACMerge(merged, residual, num_steps)


def _conjugate_gradients(product: Any, rhs: Tree, precondition_by: Any, max_steps: int, tolerance: float) -> Any:
    """``product(x) = rhs`` by preconditioned conjugate gradients (Hestenes and Stiefel 1952) from zero."""
    size = tree_dot(rhs, rhs)

    def add(x, scale, y):
        return jax.tree.map(lambda a, b: a + scale.astype(a.dtype) * b, x, y)

    def step(carry):
        x, r, direction, rz, k = carry
        curved = product(direction)
        rate = rz / tree_dot(direction, curved)
        x, r = add(x, rate, direction), add(r, -rate, curved)
        z = precondition_by(r)
        new = tree_dot(r, z)
        return x, r, add(z, new / rz, direction), new, k + 1

    def unsolved(carry):
        return (tree_dot(carry[1], carry[1]) > tolerance**2 * size) & (carry[4] < max_steps)

    z = precondition_by(rhs)
    start = (jax.tree.map(jnp.zeros_like, rhs), rhs, z, tree_dot(rhs, z), jnp.zeros((), jnp.int32))
    x, _, _, _, k = jax.lax.while_loop(unsolved, step, start)
    # The true one: the recurrence's own drifts below it.
    left = jax.tree.map(jnp.subtract, rhs, product(x))
    return x, jnp.where(size > 0, jnp.sqrt(tree_dot(left, left) / jnp.where(size > 0, size, 1)), 0), k

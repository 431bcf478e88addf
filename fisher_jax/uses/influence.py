"""Influence functions: what every token of a training text does to the loss of a query."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import require_usable
from fisher_jax.likelihoods import Likelihood
from fisher_jax.operators import Solution, products
from fisher_jax.operators.tree_vectors import number_of

__all__ = ["influence"]

Tree = Any


def influence(
    apply_fn: Callable[[Tree, Any], Array],
    likelihood: Likelihood,
    params: Tree,
    batch: Batch,
    direction: Tree | Solution,
    *,
    several: bool = False,
    remat: bool | Callable = False,
) -> Float[Array, "..."]:
    """Influence of every token of ``batch`` on a query: ``-w_t g_query^T (C + damping I)^-1 g_t``, in nats.

    ``g_t = -d log p(y_t) / d params`` and ``g_query`` is the gradient of the query's loss, so that
    ``direction = (C + damping I)^-1 g_query`` is what `fj.solve` finds, and the score of a token is the derivative of
    its log-likelihood along it, times its weight: one forward derivative for all tokens at once, no gradient of a
    token is formed. Negative: more weight on this token lowers the query's loss.

    To first order in ``eps``, for parameters at a minimum of ``sum_t w_t loss_t / W + damping / 2 |params|^2``: the
    tokens of a document with the weight ``1 + eps`` change the query's loss by ``eps / W`` times the sum of their
    scores. ``W`` is the weight of the whole training text, the one that ``C`` is the mean over
    (`fj.operators.total_weight`). Elsewhere than at a minimum it says so of the quadratic model there (Koh and Liang
    2017; Bae et al. 2022).

    Args:
        apply_fn, likelihood, params: the model, as in `fj.operators.ggn`.
        batch: some of the training text, or any other. A token of weight 0 has the score 0.
        direction: of `fj.solve`, or its ``x``: a tree like ``fj.operators.restrict(params, parameters)``. Leaves that
            are ``None`` do not move.
        several: leaves of the direction have a leading axis of queries.
        remat: as in `fj.operators.ggn`.

    Returns:
        One number for each token, in the leading shape of the outputs; with ``several`` behind an axis of queries. At
        least float32. The units are those of the query's loss, nats (per token where it is a mean).

    Raises:
        ValueError: shapes that do not fit, each named.
        RejectedBatchError: as `fj.operators.empirical_fisher`. Inside ``jit`` all scores are NaN.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> model = lambda params, x: x @ params["kernel"]
        >>> params = {"kernel": jnp.zeros((2, 1))}
        >>> text = fj.Batch(jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), jnp.array([[1.0], [1.0], [-1.0]]))
        >>> query = fj.Batch(jnp.array([[1.0, 0.0]]), jnp.array([[1.0]]))
        >>> matvec = fj.operators.ggn(model, fj.gaussian, params, text)
        >>> loss_gradient = fj.operators.gradient(model, fj.gaussian, params, query)
        >>> direction = fj.solve(matvec, loss_gradient, damping=0.1)
        >>> [round(float(x), 2) for x in fj.influence(model, fj.gaussian, params, text, direction)]  # the third harms
        [-1.61, 0.7, 0.91]
    """
    direction = direction.x if isinstance(direction, Solution) else direction
    if several:
        number_of(direction, "several directions")
    moving = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(direction)}

    def chosen(path: str, _: Any) -> bool:
        return path in moving

    operator, params = products.operator_of("empirical", apply_fn, likelihood, params, batch, chosen, None, remat)
    part, bad = products.tokens(operator, params, batch)
    require_usable(bad, part.total_weight)
    return products.directional_log_probs(operator, params, batch, direction, several=several)

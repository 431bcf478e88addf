"""Laplace posteriors: a Gaussian over the parameters from a curvature that is easily inverted."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fisher_jax._support.dtypes import is_floating, wide, wide_dtype
from fisher_jax._support.outline import outline
from fisher_jax._tracing.alone import Asking, check_apart
from fisher_jax._tracing.structure import Structures
from fisher_jax.kronecker.curvature.factors import Factors, precondition
from fisher_jax.kronecker.curvature.spectrum import kfac_spectrum
from fisher_jax.kronecker.numbers import check_scalar
from fisher_jax.uses.trees import check_not_negative

__all__ = ["Posterior", "laplace"]

Tree = Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["mean", "curvature", "weight", "prior_precision"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Posterior:
    """A Gaussian over the parameters with the precision ``W C + prior_precision I``, see `fj.laplace`. A pytree.

    Attributes:
        mean: the parameters.
        curvature: ``C``, per weighted token: `fj.kfac_factors`, or a tree of diagonals.
        weight: ``W``, of the training text.
        prior_precision: of every parameter.
    """

    mean: Tree
    curvature: Factors | Tree
    weight: Array
    prior_precision: Array

    def __repr__(self) -> str:
        return outline(self)

    def covariance(self, v: Tree) -> Tree:
        """``(W C + prior_precision I)^-1 v``, for a tree like the parameters; ``None`` and integers stay."""
        return self._power(v, -1.0)

    def sqrt_covariance(self, v: Tree) -> Tree:
        """``(W C + prior_precision I)^(-1/2) v``, the symmetric root.

        Raises:
            ValueError: a block without a closed form of the root, as an embedding tied to its head.
        """
        return self._power(v, -0.5)

    def _power(self, v: Tree, power: float) -> Tree:
        damping, scale = self.prior_precision / self.weight, self.weight**power
        if isinstance(self.curvature, Factors):
            found = precondition(dataclasses.replace(self.curvature, damping=damping, power=power), v)
        else:
            found = jax.tree.map(
                lambda x, d: (wide(d) + damping.astype(wide(d).dtype)) ** power * wide(x) if _moves(x, d) else x,
                v, self.curvature, is_leaf=lambda x: x is None,
            )  # fmt: skip
        return jax.tree.map(lambda x: x * scale.astype(x.dtype) if is_floating(x) else x, found)

    def sample(self, key: Key[Array, ""]) -> Tree:
        """Parameters drawn from the posterior: ``mean + sqrt_covariance(normal)``, in the dtypes of the mean.

        Raises:
            ValueError: as `sqrt_covariance`.
        """
        leaves, treedef = jax.tree.flatten(self.mean)
        keys = jax.random.split(key, len(leaves))
        noise = [
            jax.random.normal(k, x.shape, wide_dtype(x.dtype)) if is_floating(x) else x
            for k, x in zip(keys, leaves, strict=True)
        ]
        moved = jax.tree.leaves(self.sqrt_covariance(jax.tree.unflatten(treedef, noise)))
        pairs = zip(leaves, moved, strict=True)
        return jax.tree.unflatten(treedef, [(wide(x) + y).astype(x.dtype) if is_floating(x) else x for x, y in pairs])

    def log_determinant(self, key: Key[Array, ""] | None = None) -> float:
        """``log det (W C + prior_precision I)``, over all floating parameters. On the host.

        Args:
            key: as for `fj.kfac_tools.kfac_spectrum`, where a block is left to Lanczos (which then is refused, since
                it finds the largest eigenvalues only).

        Raises:
            ValueError: a block whose eigenvalues are not all known.
        """
        size = sum(x.size for x in jax.tree.leaves(self.mean) if is_floating(x))
        weight, prior = float(self.weight), float(self.prior_precision)
        if isinstance(self.curvature, Factors):
            values = kfac_spectrum(self.curvature, key=key).eigenvalues
            if np.isnan(values).any():
                raise ValueError(
                    "not all eigenvalues of the factors are known: a block is too large for a closed form"
                )
        else:
            values = np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(self.curvature)])
        known = np.log(weight * np.maximum(values, 0) + prior).sum()
        return float(known + (size - len(values)) * math.log(prior))

    def log_marginal_likelihood(self, log_likelihood: float | Array, key: Key[Array, ""] | None = None) -> float:
        """Laplace's approximation of the log evidence, in nats. On the host.

        ``log_likelihood - prior_precision |mean|^2 / 2 + (P log prior_precision - log_determinant) / 2`` over ``P``
        floating parameters, with ``log_likelihood = sum_t w_t log p(y_t)`` at the mean (MacKay 1992; Immer et al.
        2021). The prior precision that makes it largest is the one to take.
        """
        floating = [x for x in jax.tree.leaves(self.mean) if is_floating(x)]
        size = sum(x.size for x in floating)
        square = sum(float(jnp.sum(wide(x) ** 2)) for x in floating)
        prior = float(self.prior_precision)
        inside = size * math.log(prior) - self.log_determinant(key) - prior * square
        return float(log_likelihood) + inside / 2

    def predictive_covariance(
        self, apply_fn: Callable[[Tree, Any], Array], inputs: Any, *, rows_independent: bool | None = None
    ) -> Float[Array, "... outputs outputs"]:
        """Covariance of the linearised outputs of every token, ``J_t (W C + prior_precision I)^-1 J_t^T``.

        ``J_t = d outputs_t / d params`` at the mean (Immer, Korzepa and Bauer 2021). A row at a time: what is held is
        as many gradients as a row has outputs.

        Args:
            apply_fn: ``apply_fn(params, inputs) -> outputs [rows, ..., K]``.
            inputs: a tree of arrays with a leading axis of rows.
            rows_independent: as for `fj.group_fisher`.

        Returns:
            ``[rows, ..., K, K]``, at least float32. The variance of an observation comes on top.

        Raises:
            ValueError: rows that depend on each other; shapes that do not fit.

        Example:
            >>> import fisher_jax as fj, jax.numpy as jnp
            >>> model = lambda params, x: x @ params["kernel"]
            >>> posterior = fj.laplace({"kernel": jnp.zeros((2, 1))}, {"kernel": jnp.ones((2, 1))}, weight=3.0,
            ...                        prior_precision=1.0)
            >>> posterior.predictive_covariance(model, jnp.array([[2.0, 0.0]])).tolist()  # 2 * 2 / (3 + 1)
            [[[1.0]]]
        """
        who = "the covariance of outputs runs rows of the batch alone"
        check_apart(
            Asking(apply_fn, Structures(), rows_independent, who, "give one row at a time"), self.mean, inputs, 1
        )
        leaves, treedef = jax.tree.flatten(self.mean)
        moves = [is_floating(x) for x in leaves]

        def of_row(row: Any) -> Array:
            def outputs(moving: list) -> Array:
                following = iter(moving)
                joined = [next(following) if m else x for x, m in zip(leaves, moves, strict=True)]
                return apply_fn(jax.tree.unflatten(treedef, joined), jax.tree.map(lambda x: x[None], row))[0]

            found, pullback = jax.vjp(outputs, [x for x, m in zip(leaves, moves, strict=True) if m])
            number = found.shape[-1]
            directions = jnp.eye(found.size, dtype=found.dtype).reshape(found.size, *found.shape)

            def spread(direction: Array) -> tuple[list, list]:
                gradient = list(map(wide, pullback(direction)[0]))
                following = iter(gradient)
                whole = [next(following) if m else x for x, m in zip(leaves, moves, strict=True)]
                moved = jax.tree.leaves(self.covariance(jax.tree.unflatten(treedef, whole)))
                return gradient, [x for x, m in zip(moved, moves, strict=True) if m]

            gradients, moved = jax.vmap(spread)(directions)
            tokens = found.size // number

            def by_token(x: Array) -> Array:
                return x.reshape(tokens, number, -1)

            parts = [
                jnp.einsum("tkp,tlp->tkl", by_token(a), by_token(b), precision=jax.lax.Precision.HIGHEST)
                for a, b in zip(gradients, moved, strict=True)
            ]
            total = functools.reduce(jnp.add, parts)
            return total.reshape(*found.shape[:-1], number, number)

        return jax.lax.map(of_row, inputs)


def _moves(x: Any, diagonal: Any) -> bool:
    return diagonal is not None and is_floating(x)


def laplace(
    params: Tree, curvature: Factors | Tree, *, weight: float | Array, prior_precision: float | Array
) -> Posterior:
    """Laplace's approximation: a Gaussian at ``params`` with the precision ``W C + prior_precision I``.

    ``C`` is a Fisher or GGN per weighted token and ``W`` the weight of the training text, so that ``W C`` is the
    curvature of ``-sum_t w_t log p(y_t)``; ``prior_precision / 2 |params|^2`` is its prior (MacKay 1992; Ritter,
    Botev and Barber 2018 for Kronecker factors; Daxberger et al. 2021).

    Args:
        params: at a minimum of that sum, such as parameters trained with a weight decay of ``prior_precision / W`` in
            the mean loss.
        curvature: of `fj.kfac_factors`, corrected eigenvalues (EK-FAC) too; its own damping is not used. Or a tree
            like the parameters with a diagonal that is not negative, such as the mean of a true Fisher by entries.
        weight: ``W``: `fj.operators.total_weight`, or the number of tokens.
        prior_precision: of every parameter. `Posterior.log_marginal_likelihood` judges it.

    Returns:
        `Posterior`: samples, covariance, log-determinant, evidence, and the covariance of outputs.

    Raises:
        ValueError: numbers that are not positive; a diagonal that does not fit the parameters or is negative.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> model = lambda params, x: x @ params["kernel"]
        >>> batch = fj.Batch(jnp.diag(jnp.array([2.0, 1.0])), jnp.array([[1.0], [1.0]]))
        >>> params = {"kernel": jnp.zeros((2, 1))}
        >>> factors = fj.kfac_factors(model, fj.gaussian, params, batch)  # diag(2, 1/2)
        >>> posterior = fj.laplace(params, factors, weight=2.0, prior_precision=1.0)
        >>> [round(float(x), 4) for x in posterior.covariance({"kernel": jnp.ones((2, 1))})["kernel"][:, 0]]
        [0.2, 0.5]
        >>> round(posterior.log_determinant(), 4), posterior.sample(jax.random.key(0))["kernel"].shape  # log(5 * 2)
        (2.3026, (2, 1))
    """
    check_scalar("weight", weight, positive=True)
    check_scalar("prior_precision", prior_precision, positive=True)
    if not isinstance(curvature, Factors):
        _check_diagonal(curvature, params)
    return Posterior(params, curvature, jnp.asarray(weight, float), jnp.asarray(prior_precision, float))


def _check_diagonal(curvature: Tree, params: Tree) -> None:
    found = dict(jax.tree_util.tree_leaves_with_path(curvature))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if not is_floating(x):
            continue
        if path not in found:
            raise ValueError(f"the diagonal has no entries for {name}")
        if jnp.shape(found[path]) != jnp.shape(x):
            raise ValueError(
                f"the diagonal of {name} has shape {list(jnp.shape(found[path]))}, wanted {list(jnp.shape(x))}"
            )
    check_not_negative(curvature, "curvature")

"""Curvature as a product with a vector: GGN, true and empirical Fisher, Hessian, K-FAC, on pytrees.

Nothing is stored but parameters and batch. Every product is a mean over weighted tokens; with several rows at a time
(``microbatch_size``) the sums are the same, and a model whose rows depend on each other is refused.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from fisher_jax._support.selection import Chosen, select
from fisher_jax._tracing.alone import Asking, check_apart
from fisher_jax._tracing.structure import Structures
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import has_weight, require_usable
from fisher_jax.kronecker.curvature.factors import Factors
from fisher_jax.kronecker.curvature.product import curvature_product
from fisher_jax.likelihoods import Likelihood
from fisher_jax.operators import products
from fisher_jax.operators.solving import Solution

__all__ = [
    "Solution", "empirical_fisher", "fisher", "ggn", "gradient", "hessian", "kfac", "over_batches", "restrict",
    "total_weight",
]  # fmt: skip

Tree = Any
Matvec = Callable[[Tree], Tree]


class Options(TypedDict, total=False):
    """Options of every operator of a model and a batch, with the defaults and the words of `ggn`."""

    parameters: Chosen
    microbatch_size: int | None
    remat: bool | Callable
    keep_linearization: bool
    rows_independent: bool | None


def ggn(
    apply_fn: Callable[[Tree, Any], Array],
    likelihood: Likelihood,
    params: Tree,
    batch: Batch,
    *,
    parameters: Chosen = None,
    microbatch_size: int | None = None,
    remat: bool | Callable = False,
    keep_linearization: bool = False,
    rows_independent: bool | None = None,
) -> Partial:
    """Generalised Gauss-Newton products: ``v -> sum_t w_t J_t^T H_t J_t v / sum_t w_t``.

    ``J_t = d outputs_t / d params`` and ``H_t`` is the Fisher matrix of the likelihood in the outputs, which is the
    Hessian of ``-log p`` there (Schraudolph 2002; Martens 2020, section 8). Symmetric and positive semi-definite.

    A product is one linearisation, its transpose and ``likelihood.fisher_product``: about 4/3 of
    ``jax.value_and_grad`` of the mean loss. A model with a ``jax.custom_vjp`` of its own has no forward derivative,
    and JAX says so.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs [..., K]``.
        likelihood: ``fj.categorical``, ``fj.bernoulli`` or ``fj.gaussian``.
        params: a tree of arrays. Leaves that are not floating are frozen.
        batch: weights as everywhere: a token of weight 0 does not count, whatever its target and outputs are; what is
            not finite in the inputs of padding (``real``) or of a row without weight is not read.
        parameters: the leaves that move; the others are frozen, and ``None`` in every tangent. See `restrict`.
        microbatch_size: this many rows at a time (``jax.lax.scan``); must divide the number of rows. A model whose
            rows depend on each other (statistics over the batch) is refused. ``None``: all at once.
        remat: ``True`` recomputes the model's activations in the backward pass (``jax.checkpoint``); a function is
            its policy, as in ``jax.checkpoint_policies``.
        keep_linearization: linearise now and keep what that takes (all that a backward pass over the whole batch
            keeps, per operator, for as long as it lives); a product then costs about ``value_and_grad`` without its
            forward pass. Not with ``microbatch_size``.
        rows_independent: for ``microbatch_size``, as for `fisher_jax.group_fisher`: ``None`` asks the program, and
            values where it does not say; ``True`` is your word.

    Returns:
        A ``jax.tree_util.Partial``: ``matvec(v) -> C v``. ``v`` is a tree like ``restrict(params, parameters)``, of
        floating leaves, rounded to the dtypes of the parameters; the result has at least float32, and lies on devices
        as the parameters do. Parameters and batch are its leaves: pass it to a jitted function, and an operator with
        new numbers does not recompile (as long as ``apply_fn`` is the same object). bf16 parameters give products of
        the bf16 model, symmetric to bf16's rounding.

    Raises:
        ValueError: complex parameters, no floating one, shapes that do not fit (each named); a tangent of another
            structure, shape or kind, when it is multiplied.
        RejectedBatchError: an empty batch, a negative weight. Inside ``jit`` values cannot raise: every product is
            then NaN.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> params = {"kernel": jnp.zeros((2, 3))}
        >>> batch = fj.Batch(jnp.array([[1.0, 0.0]]), jnp.array([2]))
        >>> matvec = fj.operators.ggn(lambda p, x: x @ p["kernel"], fj.categorical, params, batch)
        >>> [round(float(x), 3) for x in matvec({"kernel": jnp.ones((2, 3)).at[0, 0].set(4.0)})["kernel"][0]]
        [0.667, -0.333, -0.333]
    """
    return _operator(
        "ggn", apply_fn, likelihood, params, batch, parameters=parameters, microbatch_size=microbatch_size,
        remat=remat, keep_linearization=keep_linearization, rows_independent=rows_independent,
    )  # fmt: skip


def fisher(
    apply_fn: Callable[[Tree, Any], Array],
    likelihood: Likelihood,
    params: Tree,
    batch: Batch,
    **options: Unpack[Options],
) -> Partial:
    """True Fisher products: ``v -> sum_t w_t E_y[s_t (s_t . v)] / sum_t w_t``, with ``y`` from the model.

    Exact, without sampling: for likelihoods of natural-parameter outputs it equals `fj.operators.ggn` (Martens 2020,
    section 9.2), and is computed so.

    Args:
        apply_fn, likelihood, params, batch, options: see `fj.operators.ggn`.

    Returns:
        The product, as `fj.operators.ggn` returns it.

    Raises:
        ValueError, RejectedBatchError: as `fj.operators.ggn`. The labels of the batch are not read.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> batch = fj.Batch(jnp.array([[3.0], [1.0]]), jnp.zeros((2, 1)))
        >>> matvec = fj.operators.fisher(lambda p, x: x * p, fj.gaussian, jnp.zeros(1), batch)
        >>> matvec(jnp.ones(1)).tolist()
        [5.0]
    """
    return ggn(apply_fn, likelihood, params, batch, **options)


def empirical_fisher(
    apply_fn: Callable[[Tree, Any], Array],
    likelihood: Likelihood,
    params: Tree,
    batch: Batch,
    **options: Unpack[Options],
) -> Partial:
    """Empirical Fisher products: ``v -> sum_t w_t s_t (s_t . v) / sum_t w_t``, ``s_t = d log p(y_t) / d params``.

    The labels are those of the batch, and scores are per token: not the square of a mean gradient.

    Args:
        apply_fn, likelihood, params, batch, options: see `fj.operators.ggn`.

    Returns:
        The product, as `fj.operators.ggn` returns it.

    Raises:
        ValueError: as `fj.operators.ggn`; targets that do not fit the outputs.
        RejectedBatchError: as `fj.operators.ggn`; a label out of range where the weight is not 0.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> batch = fj.Batch(jnp.array([[3.0], [1.0]]), jnp.array([[2.0], [1.0]]))
        >>> matvec = fj.operators.empirical_fisher(lambda p, x: x * p, fj.gaussian, jnp.zeros(1), batch)
        >>> matvec(jnp.ones(1)).tolist()  # (6**2 + 1**2) / 2
        [18.5]
    """
    return _operator("empirical", apply_fn, likelihood, params, batch, **options)


def hessian(
    apply_fn: Callable[[Tree, Any], Array],
    likelihood: Likelihood,
    params: Tree,
    batch: Batch,
    **options: Unpack[Options],
) -> Partial:
    """Hessian products: ``v -> d^2 L v``, of the mean loss ``L = -sum_t w_t log p(y_t) / sum_t w_t``.

    Forward over reverse (Pearlmutter 1994), about 2.5 times ``jax.value_and_grad``. Indefinite in general.

    Args:
        apply_fn, likelihood, params, batch, options: see `fj.operators.ggn`.

    Returns:
        The product, as `fj.operators.ggn` returns it.

    Raises:
        ValueError: as `fj.operators.ggn`; targets that do not fit the outputs.
        RejectedBatchError: as `fj.operators.ggn`; a label out of range where the weight is not 0.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> batch = fj.Batch(jnp.array([[3.0], [1.0]]), jnp.array([[2.0], [1.0]]))
        >>> matvec = fj.operators.hessian(lambda p, x: x * p, fj.gaussian, jnp.zeros(1), batch)
        >>> matvec(jnp.ones(1)).tolist()
        [5.0]
    """
    return _operator("hessian", apply_fn, likelihood, params, batch, **options)


def kfac(factors: Factors) -> Partial:
    """K-FAC products: ``v -> F v`` with the block diagonal ``F`` of Kronecker factors, without damping.

    For a kernel ``M -> G M A`` on its matrix ``[out, in]``, a bias joined to it as one more input; with corrected
    eigenvalues (EK-FAC) ``V [(V^T M P) * E] P^T``; a tied embedding's rows and the diagonals of scales are added as
    they are. ``U U^T`` is applied by its columns. Normalised as the factors are, per weighted token. What the inverse
    of `fj.precondition` undoes, but for the damping: ``precondition(factors, F v + damping v) = v`` where its damping
    is exact.

    Args:
        factors: of `fj.kfac_factors`; a training state's are `fj.kfac_tools.kfac_factors_from_state`.

    Returns:
        ``matvec(v)``: ``v`` is a tree like ``restrict(params)``, the result has at least float32. A
        ``jax.tree_util.Partial`` with the factors as its leaves, for `fj.lanczos`, `fj.spectra.trace` and
        `fj.spectral_density`; `fj.kfac_tools.kfac_spectrum` gives its eigenvalues without any product.

    Raises:
        TypeError: no `Factors`.
        ValueError: a tangent with other leaves or shapes, when it is multiplied.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> batch = fj.Batch(jnp.diag(jnp.array([2.0, 1.0])), jnp.array([[1.0], [1.0]]))
        >>> params = {"kernel": jnp.zeros((2, 1))}
        >>> factors = fj.kfac_factors(lambda p, x: x @ p["kernel"], fj.gaussian, params, batch)
        >>> fj.operators.kfac(factors)({"kernel": jnp.ones((2, 1))})["kernel"].round(4).tolist()
        [[2.0], [0.5]]
    """
    if not isinstance(factors, Factors):
        raise TypeError(
            f"expected the result of fj.kfac_factors, found {type(factors).__name__}; for an optimizer's state use "
            "fj.kfac_tools.kfac_factors_from_state(state, apply_fn, likelihood, params, batch)"
        )
    return Partial(curvature_product, factors)


def gradient(
    apply_fn: Callable[[Tree, Any], Array],
    likelihood: Likelihood,
    params: Tree,
    batch: Batch,
    *,
    parameters: Chosen = None,
) -> Tree:
    """Gradient of the mean loss, ``-sum_t w_t d log p(y_t) / d params / sum_t w_t``.

    Weights and padding mean what they mean to the products; the result is a tree that they take.

    Args:
        apply_fn, likelihood, params, batch, parameters: see `fj.operators.ggn`.

    Returns:
        A tree like ``restrict(params, parameters)``, at least float32, laid out as the parameters are.

    Raises:
        ValueError, RejectedBatchError: as `fj.operators.empirical_fisher`.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> batch = fj.Batch(jnp.array([[3.0], [1.0]]), jnp.array([[2.0], [1.0]]))
        >>> fj.operators.gradient(lambda p, x: x * p, fj.gaussian, jnp.zeros(1), batch).tolist()  # -(6 + 1) / 2
        [-3.5]
    """
    operator, params = products.operator_of("empirical", apply_fn, likelihood, params, batch, parameters)
    part, bad = products.tokens(operator, params, batch)
    require_usable(bad, part.total_weight)
    return products.gradient(operator, params, batch)


def restrict(params: Tree, parameters: Chosen = None) -> Tree:
    """The leaves that an operator with the same ``parameters`` moves, and ``None`` for the others.

    This is the tree that its products take and return, and what ``fj.lanczos`` wants as ``like``.

    Args:
        params: a tree of arrays.
        parameters: a regular expression, searched in the path that ``jax.tree_util.keystr`` writes; a predicate
            ``(path, leaf) -> bool``; or a tree of booleans (a prefix of the parameters will do). ``None``: all.

    Raises:
        ValueError: nothing floating is chosen, a chosen leaf is complex, or is named and cannot be differentiated.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> params = {"embed": jnp.zeros((4, 2)), "head": jnp.zeros((2, 4)), "step": jnp.array(3)}
        >>> tree = fj.operators.restrict(params, "head")
        >>> tree["embed"] is None, tree["head"].shape, tree["step"] is None
        (True, (2, 4), True)
    """
    return select(params, parameters).restrict(params)


def total_weight(matvec: Partial) -> Float[Array, ""]:
    """``sum_t w_t`` that an operator of this module divides by, at least float32.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> batch = fj.Batch(jnp.ones((3, 1)), jnp.zeros((3, 1)), jnp.array([1.0, 0.5, 0.0]))
        >>> float(fj.operators.total_weight(fj.operators.ggn(lambda p, x: x * p, fj.gaussian, jnp.zeros(1), batch)))
        1.5
    """
    if not isinstance(matvec, Partial) or len(matvec.args) != 3 or not isinstance(matvec.args[0], products.Operator):
        raise TypeError(f"expected a product of fj.operators, found {type(matvec).__name__}")
    return products.weight(*matvec.args) if matvec.func is products.product else matvec.args[2][2]


def over_batches(make_matvec: Callable[[Batch], Partial], batches: Iterable[Batch]) -> Matvec:
    """One operator over many batches: ``v -> sum_b W_b C_b v / sum_b W_b``, per weighted token of all of them.

    Every product runs over all batches again, on the host, one at a time: the memory is that of one. A batch without
    any weight is passed over.

    Args:
        make_matvec: ``batch -> matvec``, an operator of this module:
            ``lambda batch: fj.operators.ggn(apply_fn, likelihood, params, batch)``.
        batches: something that can be gone through again and again and gives the same batches, such as a list.

    Returns:
        ``matvec(v)``, a plain function for use outside ``jit`` (inside, it would be unrolled over the batches).

    Raises:
        TypeError: an iterator, which would be empty at the second product.
        RejectedBatchError: no batch has any weight.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> batches = [fj.Batch(jnp.full((n, 1), 1.0 * n), jnp.zeros((n, 1))) for n in (1, 2)]
        >>> matvec = fj.operators.over_batches(
        ...     lambda batch: fj.operators.ggn(lambda p, x: x * p, fj.gaussian, jnp.zeros(1), batch), batches
        ... )
        >>> matvec(jnp.ones(1)).tolist()  # (1 + 4 + 4) / 3
        [3.0]
    """
    if iter(batches) is batches:
        raise TypeError(
            f"batches are gone through once per product, found the iterator {type(batches).__name__}: pass a list or "
            "an object that starts anew each time"
        )

    def matvec(v: Tree) -> Tree:
        total, sums = jnp.zeros(()), None
        for batch in batches:
            if not has_weight(batch):
                continue
            product = make_matvec(batch)
            weight = total_weight(product)
            part = jax.tree.map(lambda x, w=weight: w.astype(x.dtype) * x, product(v))
            total, sums = total + weight, part if sums is None else jax.tree.map(jnp.add, sums, part)
        if sums is None:
            require_usable(jnp.zeros((), jnp.int32), jnp.zeros(()))
        return jax.tree.map(lambda x: x / total.astype(x.dtype), sums)

    return matvec


def _operator(
    kind: str, apply_fn, likelihood, params, batch, *, parameters=None, microbatch_size=None, remat=False,
    keep_linearization=False, rows_independent=None,
) -> Partial:  # fmt: skip
    operator, params = products.operator_of(
        kind, apply_fn, likelihood, params, batch, parameters, microbatch_size, remat
    )
    if microbatch_size is not None and keep_linearization:
        raise ValueError(
            "keep_linearization holds what a backward pass over the whole batch holds: no microbatch_size"
        )
    part, bad = products.tokens(operator, params, batch)
    products.chunks(part, microbatch_size)
    if microbatch_size is not None and microbatch_size < part.weights.shape[0]:
        who, way_out = "microbatch_size runs some rows of the batch at a time", "leave microbatch_size out"
        check_apart(
            Asking(apply_fn, Structures(), rows_independent, who, way_out), params, part.inputs, microbatch_size
        )
    require_usable(bad, part.total_weight)
    if not keep_linearization:
        return Partial(products.product, operator, params, batch)
    kept = products.linearize(operator, params, batch)
    return Partial(products.kept_product, operator, operator.selection.restrict(params), kept)

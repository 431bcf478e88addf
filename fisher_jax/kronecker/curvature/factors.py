"""Factors of every block, and the damped natural gradient that they give."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.placement import mesh_of
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import require_usable
from fisher_jax.kronecker.blocks.plan import Block, Rules, choice
from fisher_jax.kronecker.blocks.problem import Problem, block_plan, check_options
from fisher_jax.kronecker.curvature.damped import solve
from fisher_jax.kronecker.curvature.decomposition import BlockFactors, decompose
from fisher_jax.kronecker.statistics.observation import observe
from fisher_jax.likelihoods import Likelihood, categorical

__all__ = ["BlockFactors", "Factors", "check_form", "kfac_factors", "precondition"]

Tree = Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["blocks", "damping"], meta_fields=["plan", "form", "power"]
)
@dataclasses.dataclass(frozen=True)
class Factors:
    """Curvature of a model, see `kfac_factors`.

    Attributes:
        blocks: `BlockFactors`, one for each block of ``plan``.
        damping: what is added to the curvature.
        plan: the blocks, static.
        form, power: how `precondition` uses them.
    """

    blocks: tuple[BlockFactors, ...]
    damping: Array
    plan: tuple[Block, ...]
    form: str = "auto"
    power: float = -1.0


def kfac_factors(
    apply_fn: Callable[[Any, Any], Array],
    params: Tree,
    batch: Batch,
    likelihood: Likelihood = categorical,
    *,
    key: Array | None = None,
    damping: float = 1e-3,
    fisher: str = "empirical",
    policy: str = "auto",
    token_cap: int | None = 1024,
    form: str = "auto",
    power: float = -1.0,
    shared: str = "expand",
    temperature: float = 1.0,
    storage: Any = None,
    diagonal: Callable[[str], bool] | None = None,
    eigenvalue_correction: bool | Callable[[str], bool] = False,
    axis_name: Any = None,
) -> Factors:
    """Kronecker factors of the Fisher matrix of every parameter: ``F ~ A (x) G``, per weighted token.

    For a dense use with inputs ``a_t`` and output gradients ``g_t`` (of the summed log-likelihood, each token's times
    the square root of its weight): ``A = sum_t a_t a_t^T / P`` over the ``P`` real positions and
    ``G = sum_t g_t g_t^T / W``, ``W`` the weight of the tokens; at the head ``A = sum_t w_t a_t a_t^T / W``. A bias
    that is added to the output is an input of 1. An embedding has the frequencies of its rows for ``A``; an embedding
    tied to the head has both parts; scales and lone biases have the diagonal of squares. Layers stacked in a scan
    are stacked factors. A convolution has for inputs what its window sees (channels times places of the window) at
    every position of its output, a grouped one a block for each group (Grosse and Martens 2016).
    ``apply_fn(params, inputs) -> outputs [..., K]``.

    Args:
        params, batch: where the curvature is taken. Padding is ``batch.real``, the loss mask ``batch.weights``.
        key: for labels drawn from the model, and for the columns that ``token_cap`` keeps (without a key the middle
            one of each stratum).
        damping: ``F + damping I`` is what `precondition` inverts.
        fisher: ``"empirical"`` (labels of the batch), ``"sampled"`` (labels from the model), ``"exact_head"`` (the
            true Fisher of a softmax head in closed form, other layers from sampled labels; costs one more forward
            pass) or ``"ggn"`` (exact over labels, one backward pass for each of at most 64 outputs).
        policy: how ``G`` is kept. ``"all"``: by its columns, ``U U^T`` with ``U [out, T]``; ``"never"``: as an
            eigendecomposition; ``"hybrid"``: by columns above 4096 outputs; ``"auto"``: there, and where tokens are
            fewer than outputs, where columns are cheaper to build and to apply.
        token_cap: columns kept at most; from more, one is drawn from each of as many strata of those that are not
            zero, and scaled so that ``U U^T`` keeps its expectation. ``None``: all.
        form: ``"exact"`` inverts ``A (x) G + damping I``; ``"factored"`` adds ``pi sqrt(damping)`` to ``A`` and
            ``sqrt(damping) / pi`` to ``G``; ``"auto"`` is exact, but for the low-rank true Fisher of a softmax head.
            A tied leaf is always exact.
        power: ``(F + damping I)**power``, for example ``-0.5``; only ``-1`` for a tied leaf and a low-rank softmax
            head.
        shared: ``"expand"`` counts every position on its own; ``"reduce"`` sums output gradients and averages inputs
            over the positions of a row, except at the head.
        temperature: labels are drawn from outputs divided by it.
        storage: dtype of ``U``; ``jnp.bfloat16`` halves it, with relative errors of ``2**-8`` in its entries.
        diagonal: ``diagonal(path)`` says which leaves get, in place of a block, the diagonal
            ``(sum_t s_t)**2 / W`` of the batch (scales and biases: squares summed over positions).
        eigenvalue_correction: EK-FAC. Of every kernel and embedding ``a_j g_i`` becomes
            ``sum_t (p_j . a_t)**2 (v_i . g_t)**2 / W``, the diagonal of the second moment of ``vec(g_t a_t^T)`` in
            the same basis: the best one in Frobenius norm. With columns ``U`` the sum is over the tokens that they
            are of, and what they do not span has no curvature, as without. ``eigenvalue_correction(path)`` says
            which leaves; a tied leaf, and the head of ``exact_head``, cannot be among them. Holds the taps of the
            whole backward pass, but for kernels by columns; an embedding takes one number more for each of its own.
            Needs ``form`` other than factored and a ``fisher`` other than ggn.
        axis_name: inside ``jax.shard_map(..., check_vma=False)``, the mesh axes over which rows of the batch are
            spread: sums are summed over them and columns gathered, so that all devices get the factors of the whole
            batch.

    Returns:
        `Factors`, a pytree with static plan.

    Raises:
        ValueError: an unknown option; a parameter without a block, named with its line and the way out; masks of
            another shape; a missing key.
        RejectedBatchError: outside of ``jit`` a batch that is empty or has values that cannot be used.

    See Martens and Grosse (2015); Eschenhagen et al. (2023) for shared weights; George et al. (2018) for EK-FAC.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x @ params["kernel"] + params["bias"]
        >>> params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
        >>> batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
        >>> factors = fj.kfac_factors(apply_fn, params, batch)
        >>> [(block.kind, block.path, block.bias is not None) for block in factors.plan]
        [('dense', "['kernel']", True)]
        >>> fj.precondition(factors, params)["bias"].shape
        (3,)
    """
    check_options(policy, fisher, shared, token_cap, temperature)
    check_form(form, eigenvalue_correction, fisher)
    rules = Rules(policy, token_cap, fisher, shared, choice(eigenvalue_correction), diagonal or (lambda path: False))
    problem = Problem(apply_fn, likelihood, rules, temperature, axis_name)
    blocks = block_plan(problem, params, batch)
    seen = observe(problem, blocks, params, batch, key)
    require_usable(seen.bad, seen.weight)
    found = decompose(blocks, seen, storage, rules, axis_name, mesh_of(params, batch))
    return Factors(found, jnp.asarray(damping), blocks, form, power)


def check_form(form: str, eigenvalue_correction: Any = False, fisher: str = "empirical") -> None:
    """Raise where ``form`` is none of those there are, or cannot go with corrected eigenvalues."""
    if form not in ("auto", "exact", "factored"):
        raise ValueError(f"form is one of auto, exact, factored, found {form!r}")
    if eigenvalue_correction and form == "factored":
        raise ValueError("corrected eigenvalues are no product that factored damping could split; use form='exact'")
    if eigenvalue_correction and fisher == "ggn":
        raise ValueError("eigenvalue_correction needs the taps of one backward pass; use fisher='sampled'")


def precondition(factors: Factors, tree: Tree) -> Tree:
    """``(F + damping I)**power`` times a tree like the parameters, block by block; dtypes are those of the tree.

    Raises:
        ValueError: a tree of other shapes than the parameters; a power that a block has no closed form for.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x * params["scale"]
        >>> batch = fj.Batch(jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [6.0]]))
        >>> factors = fj.kfac_factors(apply_fn, {"scale": jnp.zeros(1)}, batch, fj.gaussian, damping=0.0)
        >>> fj.precondition(factors, {"scale": jnp.ones(1)})["scale"]  # squared scores (1 * 2)**2 and (3 * 6)**2
        Array([0.00609756], dtype=float32)
    """
    leaves, treedef = jax.tree.flatten(tree)
    found = solve(factors.plan, factors.blocks, leaves, factors.damping, factors.form, factors.power)
    return jax.tree.unflatten(treedef, found)

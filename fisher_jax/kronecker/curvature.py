"""Factors of every block, and the damped natural gradient that they give."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from fisher_jax.batch import Batch
from fisher_jax.errors import RejectedBatchError
from fisher_jax.kronecker.blocks import Block, Rules
from fisher_jax.kronecker.corrected import corrected, second_moments
from fisher_jax.kronecker.factors import Diagonal, Eigen, Factor, LowRank, diagonal, eigen, low_rank, wide
from fisher_jax.kronecker.layout import bias_rows, inverse, kernel_matrices, table_matrices
from fisher_jax.kronecker.placement import automatic, spec_of
from fisher_jax.kronecker.problem import Observation, Problem, block_plan, check_options, observe
from fisher_jax.kronecker.tikhonov import diagonal_power, exact, factored
from fisher_jax.kronecker.woodbury import (
    SoftmaxHead,
    head_exact,
    head_factored,
    head_matrix,
    softmax_head,
    tied,
    tied_head,
)
from fisher_jax.likelihoods import Likelihood, categorical
from fisher_jax.rejection import reasons

__all__ = [
    "EXACT_HEAD_LIMIT",
    "BlockFactors",
    "Factors",
    "check_form",
    "decompose",
    "kfac_factors",
    "precondition",
    "solve",
]

Tree = Any
# V T**2 in operations above which exact damping of a softmax head is refused.
EXACT_HEAD_LIMIT = 10**11


class BlockFactors(NamedTuple):
    """Factors of one block; every array has a leading axis, one entry for each of its matrices.

    Attributes:
        A, G: second moments of inputs and of output gradients; ``None`` for a diagonal.
        rows: of a tied leaf, what its use as an embedding adds to each row.
        diagonal: of scales and lone biases, in the shape of the leaf.
        eigenvalues: corrected ones ``[N, out, in]``, in the bases of ``G`` and ``A``.
    """

    A: Factor | None = None
    G: Factor | SoftmaxHead | None = None
    rows: Array | None = None
    diagonal: Array | None = None
    eigenvalues: Array | None = None


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


def decompose(
    blocks: tuple[Block, ...],
    seen: Observation,
    storage: Any = None,
    rules: Rules | None = None,
    axis_name: Any = None,
) -> tuple[BlockFactors, ...]:
    """Normalise the sums of an observation and decompose them; ``rules`` say which eigenvalues are corrected."""
    rules = rules or Rules()

    def run(seen):
        weight = jnp.where(seen.weight > 0, seen.weight, 1)
        found = [_factors(b, sums, weight, seen, storage) for b, sums in zip(blocks, seen.sums, strict=True)]
        for i, block in enumerate(blocks):
            if block.is_corrected(rules):
                taps, masks = seen.taps
                sums = second_moments(block, taps, masks, rules, found[i].A, found[i].G)
                sums = sums if axis_name is None else jax.lax.psum(sums, axis_name)
                found[i] = found[i]._replace(eigenvalues=sums / weight)
        return tuple(found)

    return automatic(run, tuple(_places(b, s, seen, rules) for b, s in zip(blocks, seen.sums, strict=True)), seen)


def _places(block: Block, sums: dict, seen: Observation, rules: Rules) -> Any:
    """Where the factors of a block lie, as a `BlockFactors` of specs: columns as before, all else everywhere."""
    P: Any = PartitionSpec
    if block.kind == "diagonal":
        return BlockFactors(diagonal=P())
    if not block.is_kronecker:
        return BlockFactors()
    A = Diagonal(P()) if block.kind == "embedding" else Eigen(P(), P())
    G: Any = LowRank(P(*spec_of(sums["U"])), P(), P()) if block.low_rank else Eigen(P(), P())
    if block.head and seen.probabilities is not None and block.low_rank:
        vocabulary = spec_of(seen.probabilities[0])[:1] or (None,)
        G = SoftmaxHead(P(None, *vocabulary), P(None, *vocabulary, None))
    corrected_places = P() if block.is_corrected(rules) else None
    return BlockFactors(A, G, P() if block.kind == "tied" else None, eigenvalues=corrected_places)


def _factors(block: Block, sums: dict, weight: Array, seen: Observation, storage: Any) -> BlockFactors:
    if block.kind == "diagonal":
        return BlockFactors(diagonal=sums["squares"] / weight)
    if not block.is_kronecker:
        return BlockFactors()
    if block.head and seen.probabilities is not None:
        G = _true_head(block, *seen.probabilities)
    elif block.low_rank:
        G = jax.vmap(lambda U: low_rank(U, storage))(sums["U"] / jnp.sqrt(weight))
    else:
        G = jax.vmap(eigen)(sums["G"] / weight)
    if block.kind == "embedding":
        return BlockFactors(jax.vmap(diagonal)(_share(sums["frequency"], sums["positions"])), G)
    A = jax.vmap(eigen)(_share(sums["A"], sums["count"]))
    if block.kind == "dense":
        return BlockFactors(A, G)
    trace = sums["square"].sum() / weight
    return BlockFactors(A, G, _share(sums["frequency"], sums["positions"]) * (trace / block.width))


def _share(x: Array, count: Array) -> Array:
    # Every layer of a stack meets the same positions.
    count = jnp.ravel(count)[0]
    return x / jnp.where(count > 0, count, 1)


def _true_head(block: Block, probabilities: Array, weights: Array) -> Factor | SoftmaxHead:
    head = softmax_head(probabilities, weights)
    if block.low_rank:
        return jax.tree.map(lambda x: x[None], head)
    return jax.vmap(eigen)(head_matrix(head)[None])


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
    eigenvalue_correction: bool = False,
    axis_name: Any = None,
) -> Factors:
    """Kronecker factors of the Fisher matrix of every parameter: ``F ~ A (x) G``, per weighted token.

    For a dense use with inputs ``a_t`` and output gradients ``g_t`` (of the summed log-likelihood, each token's times
    the square root of its weight): ``A = sum_t a_t a_t^T / P`` over the ``P`` real positions and
    ``G = sum_t g_t g_t^T / W``, ``W`` the weight of the tokens; at the head ``A = sum_t w_t a_t a_t^T / W``. A bias
    that is added to the output is an input of 1. An embedding has the frequencies of its rows for ``A``; an embedding
    tied to the head has both parts; scales and lone biases have the diagonal of squares. Layers stacked in a scan
    are stacked factors. ``apply_fn(params, inputs) -> outputs [..., K]``.

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
        eigenvalue_correction: EK-FAC. Where both factors of a dense kernel are eigendecomposed, ``a_j g_i`` becomes
            ``sum_t (p_j . a_t)**2 (v_i . g_t)**2 / W``, the diagonal of the second moment of ``vec(g_t a_t^T)`` in
            the same basis: the best one in Frobenius norm. Other blocks stay as they are. Holds the taps of the
            whole backward pass; needs ``form`` other than factored and a ``fisher`` other than ggn.
        axis_name: inside ``jax.shard_map``, the mesh axes over which rows of the batch are spread: sums are summed
            over them and columns gathered, so that all devices get the factors of the whole batch.

    Returns:
        `Factors`, a pytree with static plan.

    Raises:
        ValueError: an unknown option; a parameter without a block, named with its line and the way out; masks of
            another shape; a missing key.

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
    rules = Rules(policy, token_cap, fisher, shared, eigenvalue_correction, diagonal or (lambda path: False))
    problem = Problem(apply_fn, likelihood, rules, temperature, axis_name)
    blocks = block_plan(problem, params, batch)
    seen = observe(problem, blocks, params, batch, key)
    if not isinstance(seen.bad, jax.core.Tracer) and int(seen.bad):
        raise RejectedBatchError(f"the batch has {'; '.join(reasons(int(seen.bad)))}")
    return Factors(decompose(blocks, seen, storage, rules, axis_name), jnp.asarray(damping), blocks, form, power)


def check_form(form: str, eigenvalue_correction: bool = False, fisher: str = "empirical") -> None:
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


def solve(
    plan: tuple[Block, ...], blocks: tuple[BlockFactors, ...], leaves: list, damping: Any, form: str, power: float
) -> list:
    """`precondition` on a list of leaves, which may have ``None`` where no block is."""

    def run(blocks, leaves, damping):
        return _solve(plan, blocks, leaves, damping, form, power)

    out = [None if x is None else spec_of(x) for x in leaves]
    return automatic(run, out, blocks, leaves, jnp.asarray(damping))


def _solve(plan, blocks, leaves: list, damping: Array, form: str, power: float) -> list:
    out = list(leaves)
    for block, found in zip(plan, blocks, strict=True):
        if block.kind == "frozen":
            continue
        M = leaves[block.leaf]
        wanted = M.shape if block.use is None else block.use.segments[0].source.shape
        if M.shape != wanted:
            raise ValueError(f"{block.path} has shape {list(wanted)} in the model, found {list(M.shape)} in the tree")
        if block.kind in ("diagonal", "unused"):
            values = jnp.zeros(M.shape) if found.diagonal is None else found.diagonal
            out[block.leaf] = diagonal_power(values, M, damping, power).astype(M.dtype)
            continue
        arrange = _arrangement(block)
        matrices = arrange(wide(M))
        like = jax.ShapeDtypeStruct(M.shape, M.dtype)
        if block.bias is not None:
            rows, row_like = _bias(block), leaves[block.bias]
            matrices = jnp.concatenate([matrices, rows(wide(row_like))[..., None]], -1)
        X = _apply(block, found, matrices, damping, form, power)
        if block.bias is not None:
            out[block.bias] = inverse(rows, row_like)(X[..., -1]).astype(row_like.dtype)
            X = X[..., :-1]
        out[block.leaf] = inverse(arrange, like)(X).astype(M.dtype)
    return out


def _arrangement(block: Block) -> Callable[[Array], Array]:
    assert block.use is not None
    return functools.partial(table_matrices if block.kind == "embedding" else kernel_matrices, block.use)


def _bias(block: Block) -> Callable[[Array], Array]:
    assert block.bias_use is not None
    return functools.partial(bias_rows, block.bias_use, block.units)


def _apply(block: Block, found: BlockFactors, M: Array, damping: Any, form: str, power: float) -> Array:
    """``[N, out, in]`` to the same."""
    A, G = found.A, found.G
    if isinstance(G, SoftmaxHead) and power != -1:
        raise ValueError(
            f"the low-rank true Fisher of the head {block.path} has a closed form for the inverse only, found power="
            f"{power}; use policy='never' or fisher='sampled'"
        )
    if isinstance(G, SoftmaxHead) and (form == "exact" or found.rows is not None):
        cost = block.units * G.columns.shape[-1] ** 2 * M.shape[-1]
        if cost > EXACT_HEAD_LIMIT:
            raise ValueError(
                f"exact damping of the softmax head {block.path} takes {cost:.0e} operations, at most "
                f"{EXACT_HEAD_LIMIT:.0e} are allowed; lower token_cap, or use fisher='sampled'"
            )
    if found.rows is not None:
        if isinstance(G, SoftmaxHead):
            return jax.vmap(lambda a, g, r, m: tied_head(a, g, r, m, damping))(A, G, found.rows, M)
        return jax.vmap(lambda a, g, r, m: tied(a, g, r, m, damping, power))(A, G, found.rows, M)
    if isinstance(G, SoftmaxHead):
        with_head = head_exact if form == "exact" else head_factored
        return jax.vmap(lambda a, g, m: with_head(a, g, m, damping))(A, G, M)
    if found.eigenvalues is not None:
        with_values = functools.partial(corrected, damping=damping, power=power)
        return jax.vmap(lambda a, g, e, m: with_values(a, g, e, m))(A, G, found.eigenvalues, M)
    rule = factored if form == "factored" else exact
    return jax.vmap(lambda a, g, m: rule(a, g, m, damping, power))(A, G, M)

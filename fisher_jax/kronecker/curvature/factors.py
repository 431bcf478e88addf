"""Factors of every block, and the damped natural gradient that they give."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.outline import outline
from fisher_jax._support.placement import mesh_of
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import check_arguments
from fisher_jax.batch.tokens import require_usable
from fisher_jax.kronecker.blocks.plan import Block
from fisher_jax.kronecker.blocks.problem import Problem, block_plan, problem_of
from fisher_jax.kronecker.curvature.damped import solve
from fisher_jax.kronecker.curvature.decomposition import BlockFactors, decompose
from fisher_jax.kronecker.numbers import check_numbers
from fisher_jax.kronecker.options import Curvature, check_option
from fisher_jax.kronecker.statistics.observation import Observation, observe
from fisher_jax.likelihoods import Likelihood

__all__ = ["BlockFactors", "Factors", "kfac_factors", "precondition", "promised"]

Tree = Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["blocks", "damping"], meta_fields=["plan", "form", "power"]
)
@dataclasses.dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        return outline(self)


def kfac_factors(
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood,
    params: Tree,
    batch: Batch,
    *,
    key: Array | None = None,
    damping: float | Array = 1e-3,
    curvature: Curvature = Curvature(),
    axis_name: Any = None,
) -> Factors:
    """Kronecker factors of the Fisher matrix of every parameter: ``F ~ A (x) G``, per weighted token.

    For a dense use with inputs ``a_t`` and output gradients ``g_t`` (of the summed log-likelihood, each token's times
    the square root of its weight): ``A = sum_t a_t a_t^T / P`` over the ``P`` real positions and
    ``G = sum_t g_t g_t^T / W``, ``W`` the weight of the tokens; at the head ``A = sum_t w_t a_t a_t^T / W``. A bias
    that is added to the output is an input of 1. An embedding has the frequencies of its rows for ``A``; an embedding
    tied to the head has both parts; scales and lone biases have the diagonal of squares. Layers stacked in a scan
    are stacked factors. A convolution has for inputs what its window sees (channels times places of the window) at
    every position of its output, a grouped one a block for each group (Grosse and Martens 2016). Experts of a mixture
    have a block each, whose ``A`` is over those of its tokens that a gradient reaches: what a router sent elsewhere
    is neither an input nor a gradient of an expert (docs/models.md).
    ``apply_fn(params, inputs) -> outputs [..., K]``.

    Args:
        params, batch: where the curvature is taken. Padding is ``batch.real``, the loss mask ``batch.weights``.
            Both lie on the positions they belong to wherever the model moves these (transposes, windows, constant
            gathers, loops).
        key: for labels drawn from the model, and for the columns that ``token_cap`` keeps (without a key the middle
            one of each stratum).
        damping: ``F + damping I`` is what `precondition` inverts.
        curvature: what the factors are of, how they are kept, and how `precondition` inverts them.
        axis_name: inside ``jax.shard_map(..., check_vma=False)``, the mesh axes over which rows of the batch are
            spread: sums are summed over them and columns gathered, so that all devices get the factors of the whole
            batch.

    Returns:
        `Factors`, a pytree with static plan.

    Raises:
        ValueError: a parameter without a block, named with its line and the way out; masks of
            another shape, or that must lie on positions which the model sorts or picks by data; a missing key.
        RejectedBatchError: outside of ``jit`` a batch that is empty or has values that cannot be used.

    See Martens and Grosse (2015); Eschenhagen et al. (2023) for shared weights; George et al. (2018) for EK-FAC.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x @ params["kernel"] + params["bias"]
        >>> params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
        >>> batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
        >>> factors = fj.kfac_factors(apply_fn, fj.categorical, params, batch)
        >>> [(block.kind, block.path, block.bias is not None) for block in factors.plan]
        [('dense', "['kernel']", True)]
        >>> fj.precondition(factors, params)["bias"].shape
        (3,)
    """
    check_arguments(apply_fn, likelihood, batch=batch)
    check_option("curvature", curvature, Curvature)
    check_numbers(damping=damping)
    problem = problem_of(apply_fn, likelihood, curvature, axis_name)
    program, blocks = block_plan(problem, params, batch)
    seen = observe(problem, program, blocks, batch, key)
    require_usable(seen.bad, seen.weight)
    return _factors(problem, blocks, seen, damping, mesh_of(params, batch))


def _factors(problem: Problem, blocks: tuple[Block, ...], seen: Observation, damping: Any, mesh: Any) -> Factors:
    rules = problem.rules
    found = decompose(blocks, seen, problem, rules.factor_dtype, mesh)
    return Factors(found, jnp.asarray(damping), blocks, rules.form, rules.power)


def promised(problem: Problem, params: Tree, batch: Batch) -> tuple[Block, ...]:
    """The blocks of the factors that `kfac_factors` gives, and `precondition` takes, of arrays of these shapes.

    Both are traced, so that whatever they refuse is refused here.
    """
    _, blocks = block_plan(problem, params, batch)

    def traced(params, batch, key):
        program, blocks = block_plan(problem, params, batch)
        return precondition(
            _factors(problem, blocks, observe(problem, program, blocks, batch, key), 1.0, None), params
        )

    jax.eval_shape(traced, params, batch, jax.eval_shape(lambda: jax.random.key(0)))
    return blocks


def precondition(factors: Factors, tree: Tree) -> Tree:
    """``(F + damping I)**power`` times a tree like the parameters, block by block; dtypes are those of the tree.

    Raises:
        ValueError: a tree of other shapes than the parameters; a power that a block has no closed form for.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x * params["scale"]
        >>> batch = fj.Batch(jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [6.0]]))
        >>> factors = fj.kfac_factors(apply_fn, fj.gaussian, {"scale": jnp.zeros(1)}, batch, damping=0.0)
        >>> fj.precondition(factors, {"scale": jnp.ones(1)})["scale"]  # squared scores (1 * 2)**2 and (3 * 6)**2
        Array([0.00609756], dtype=float32)
    """
    leaves, treedef = jax.tree.flatten(tree)
    found = solve(factors.plan, factors.blocks, leaves, factors.damping, factors.form, factors.power)
    return jax.tree.unflatten(treedef, found)

"""The plan of blocks as a table that a person can read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.outline import outline
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import check_arguments
from fisher_jax.kronecker.blocks.plan import Block, Rules
from fisher_jax.kronecker.blocks.problem import problem_of
from fisher_jax.kronecker.curvature.factors import promised
from fisher_jax.kronecker.options import Curvature, check_option
from fisher_jax.likelihoods import Likelihood

__all__ = ["KFACCoverage", "kfac_coverage"]

Tree = Any


@dataclasses.dataclass(frozen=True)
class KFACCoverage:
    """Which block of curvature every parameter leaf gets; ``print`` it.

    Attributes:
        rows: ``(path, shape, block)`` of each leaf, the block in words.
    """

    rows: tuple[tuple[str, tuple[int, ...], str], ...]

    def __repr__(self) -> str:
        return outline(self)

    def __str__(self) -> str:
        paths = max([len(path) for path, _, _ in self.rows], default=0)
        shapes = max([len(str(list(shape))) for _, shape, _ in self.rows], default=0)
        return "\n".join(f"{path:{paths}}  {list(shape)!s:{shapes}}  {block}" for path, shape, block in self.rows)


def kfac_coverage(
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood,
    params: Tree,
    batch: Batch,
    *,
    curvature: Curvature = Curvature(),
) -> KFACCoverage:
    """Which block `fj.kfac_factors`, with the same ``curvature``, gives every parameter; nothing is computed.

    `fj.kfac_factors` and `fj.precondition` are traced on the shapes, so that what they refuse is refused here.

    For a kernel the sizes of its factors, the input of 1 that stands for its bias counted, how ``G`` is kept, and
    whether eigenvalues are corrected; for every other leaf what it gets instead.

    Args:
        params, batch: arrays or ``jax.ShapeDtypeStruct``s.

    Raises:
        ValueError: what `fj.kfac_factors` and `fj.precondition` refuse: a parameter without a block, or positions
            that a mask cannot be laid on, named with their line and the way out.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> apply_fn = lambda params, x: (x * params["scale"]) @ params["kernel"] + params["bias"]
        >>> params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3), "scale": jnp.ones(2)}
        >>> batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
        >>> print(fj.kfac_tools.kfac_coverage(apply_fn, fj.categorical, params, batch))
        ['bias']    [3]     an input of ['kernel']
        ['kernel']  [2, 3]  A [3, 3] (x) G [3, 3], the head
        ['scale']   [2]     diagonal
    """
    check_arguments(apply_fn, likelihood, batch=batch)
    check_option("curvature", curvature, Curvature)
    problem = problem_of(apply_fn, likelihood, curvature)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    told = {}
    for block in promised(problem, params, batch):
        told[block.leaf] = _told(block, problem.rules)
        if block.bias is not None:
            told[block.bias] = f"an input of {block.path}"
    return KFACCoverage(
        tuple((jax.tree_util.keystr(path), jnp.shape(x), told[i]) for i, (path, x) in enumerate(leaves))
    )


def _told(block: Block, rules: Rules) -> str:
    if block.kind == "frozen":
        return "stays: not floating"
    if block.kind == "unused":
        return "no curvature: not used by the loss"
    if block.kind == "diagonal":
        return "diagonal"
    width = block.width + (block.bias is not None)
    inputs = f"frequencies of {width} rows" if block.kind == "embedding" else f"A [{width}, {width}]"
    outputs = f"G [{block.units}, {block.units}]"
    if block.head and rules.estimator == "exact_head":
        outputs += " in closed form" + (f" from {block.columns} tokens" if block.low_rank else "")
    elif block.low_rank:
        outputs += f" by {block.columns} columns"
    parts = [f"{inputs} (x) {outputs}"]
    if block.number > 1:
        parts.append(f"{block.number} of them")
    if block.use is not None and block.use.kind == "conv":
        parts.append("convolution")
    if block.head:
        parts.append("tied to its use as embedding" if block.kind == "tied" else "the head")
    if block.is_corrected(rules):
        parts.append("eigenvalues corrected")
    return ", ".join(parts)

"""The factors inside an optimizer's state, as `Factors`: for their spectrum, for products, for another gradient."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax._support.jax_internals import is_traced
from fisher_jax._support.selection import Chosen, matches
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import check_arguments
from fisher_jax.kronecker.blocks.plan import Block
from fisher_jax.kronecker.blocks.problem import block_plan, problem_of
from fisher_jax.kronecker.curvature.factors import BlockFactors, Factors
from fisher_jax.kronecker.factors.forms import LowRank
from fisher_jax.kronecker.factors.woodbury import SoftmaxHead
from fisher_jax.kronecker.numbers import check_numbers
from fisher_jax.kronecker.optimizer.transformation import KFACState
from fisher_jax.kronecker.options import Curvature, check_option
from fisher_jax.likelihoods import Likelihood

__all__ = ["kfac_factors_from_state"]

Tree = Any


def kfac_factors_from_state(
    state: Any,
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood,
    params: Tree,
    batch: Batch,
    *,
    damping: Any = 1e-3,
    curvature: Curvature = Curvature(),
    parameters: Chosen = None,
) -> Factors:
    """The factors that a state of `fj.scale_by_kfac` or `fj.kfac` holds, as `fj.kfac_factors` gives them.

    The state holds arrays; which block belongs to which parameter is read off the model again, without running it.

    Args:
        state: any optax state that has one `KFACState` in it.
        apply_fn, likelihood, params, batch: the model, its parameters and a batch, or the shapes of both.
        damping: of the result; the state has none.
        curvature: what the transformation was given.
        parameters: under ``optax.masked`` or ``multi_transform`` the part that K-FAC sees: a pattern, a predicate or
            a tree of booleans, as in `fj.operators.restrict`.

    Raises:
        TypeError: an argument in the place of another.
        ValueError: no `KFACState`, or several; one before its first update; blocks that are not those of the model.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x @ params["kernel"]
        >>> batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
        >>> params, tx = {"kernel": jnp.zeros((2, 3))}, fj.scale_by_kfac(apply_fn, example=batch)
        >>> _, state = tx.update(params, tx.init(params), params, batch=batch)
        >>> factors = fj.kfac_tools.kfac_factors_from_state(state, apply_fn, fj.categorical, params, batch)
        >>> round(fj.kfac_tools.kfac_spectrum(factors, 1).trace, 4)  # a.a = 2, times the mean of g.g = 2/3
        1.3333
    """
    check_arguments(apply_fn, likelihood, batch=batch)
    check_option("curvature", curvature, Curvature)
    check_numbers(damping=damping)
    inner = _only(state)
    if not is_traced(inner.age) and int(inner.age) < 0:
        raise ValueError("the K-FAC state has no factors yet: they are there after the first update")
    chosen = dict(zip(_paths(params), matches(params, parameters), strict=True))
    # Which way the Fisher was taken leaves no trace in a plan, but for the options that go with it.
    problem = problem_of(apply_fn, likelihood, curvature.settled("sampled"))
    rules = dataclasses.replace(problem.rules, follow=lambda path: chosen[path])
    _, plan = block_plan(problem._replace(rules=rules), params, batch)
    if len(plan) != len(inner.blocks):
        raise ValueError(
            f"the K-FAC state has {len(inner.blocks)} blocks and the parameters {len(plan)}; pass the curvature= "
            "that it was made with, and parameters= where it saw a part of them"
        )
    kept = tuple(_matched(block, found) for block, found in zip(plan, inner.blocks, strict=True))
    return Factors(inner.blocks, jnp.asarray(damping), kept, curvature.form, curvature.power)


def _only(state: Any) -> KFACState:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, KFACState))
    found = [x for x in leaves if isinstance(x, KFACState)]
    if len(found) != 1:
        raise ValueError(f"wanted an optimizer state with one KFACState in it, found {len(found)}")
    return found[0]


def _paths(params: Tree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def _matched(block: Block, found: BlockFactors) -> Block:
    """The block with the form that its factors have; an error where they are another block's."""
    wanted, seen = _sizes_of_block(block), _sizes(found)
    if wanted != seen:
        raise ValueError(
            f"the block of {block.path} is {block.kind} with sizes {wanted} in the model, and {seen} in the K-FAC "
            "state; pass the curvature= that it was made with, and parameters= where it saw a part of the tree"
        )
    if not isinstance(found.G, LowRank | SoftmaxHead):
        return dataclasses.replace(block, low_rank=False, columns=0)
    return dataclasses.replace(block, low_rank=True, columns=found.G.columns.shape[-1])


def _sizes_of_block(block: Block) -> tuple[int, ...]:
    if block.is_kronecker:
        return block.number, block.units, block.width + (block.bias is not None)
    return block.use.segments[0].source.shape if block.kind == "diagonal" and block.use is not None else ()


def _sizes(found: BlockFactors) -> tuple[int, ...]:
    if found.diagonal is not None:
        return found.diagonal.shape
    if found.A is None or found.G is None:
        return ()
    G = found.G
    units = G.mean if isinstance(G, SoftmaxHead) else G.columns if isinstance(G, LowRank) else G.values
    return found.A.values.shape[0], units.shape[1], found.A.values.shape[1]

"""A model, how its curvature is taken, and its plan of blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisher_jax._support.dtypes import wide_dtype
from fisher_jax._tracing import program
from fisher_jax._tracing.structure import structure
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import check_outputs
from fisher_jax.kronecker.blocks.plan import Block, Rules, plan
from fisher_jax.likelihoods import Likelihood

__all__ = ["GGN_LIMIT", "Problem", "block_plan", "check_options"]

Tree = Any
# Outputs per token above which fisher="ggn" is refused: it costs one backward pass for each.
GGN_LIMIT = 64


class Problem(NamedTuple):
    """A model and how its curvature is taken."""

    apply_fn: Callable
    likelihood: Likelihood
    rules: Rules
    temperature: float = 1.0
    axis_name: Any = None


def check_options(policy: str, fisher: str, shared: str, token_cap: int | None, temperature: float) -> None:
    """Raise where an option is none of those there are."""
    for name, value, known in (
        ("policy", policy, ("all", "auto", "hybrid", "never")),
        ("fisher", fisher, ("empirical", "sampled", "exact_head", "ggn")),
        ("shared", shared, ("expand", "reduce")),
    ):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, found {value!r}")
    if token_cap is not None and token_cap < 1:
        raise ValueError(f"token_cap is at least 1, or None for no cap, found {token_cap}")
    if not temperature > 0:
        raise ValueError(f"temperature is positive, found {temperature}")
    if temperature != 1 and fisher not in ("sampled", "exact_head"):
        raise ValueError("a temperature changes the distribution of sampled labels: it needs fisher='sampled'")


def _devices(axis_name: Any) -> int:
    """Over how many devices the rows of a batch are spread."""
    if axis_name is None:
        return 1
    way_out = "call it, and init and update of scale_by_kfac, inside jax.shard_map(..., check_vma=False)"
    try:
        size = jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(f"axis_name={axis_name!r} is no axis here: {way_out}") from None
    index = jax.lax.axis_index(axis_name)
    if jax.typeof(index) != jax.typeof(jnp.zeros((), index.dtype)):
        # A tap would be summed over devices with the gradient of the perturbation that it comes from.
        raise ValueError(f"axis_name={axis_name!r} is an axis whose varying values are typed: {way_out}")
    return size


def block_plan(problem: Problem, params: Tree, batch: Batch) -> tuple[Block, ...]:
    """The block of every parameter; arrays or ``ShapeDtypeStruct``s."""
    rules = dataclasses.replace(problem.rules, devices=_devices(problem.axis_name))
    out = jax.eval_shape(problem.apply_fn, params, batch.inputs)
    check_outputs(out)
    root = jax.ShapeDtypeStruct(out.shape[:-1], wide_dtype(out.dtype))

    def loss(params, inputs, root):
        outputs = problem.apply_fn(params, inputs)
        return jnp.sum(outputs.astype(root.dtype) * root[..., None])

    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    traced = program.trace(loss, params, (batch.inputs, root), {}, None, lambda i: rules.follow(paths[i]))
    found = structure(problem.apply_fn, params, batch.inputs)
    blocks = plan(traced.probe.specs, traced.leaves, paths, found, rules)
    if rules.fisher == "exact_head" and not (
        found.head_is_last and any(b.head for b in blocks) and problem.likelihood.name == "categorical"
    ):
        raise ValueError(
            "fisher='exact_head' needs a categorical likelihood whose outputs are those of one dense use and its "
            "bias, with nothing after it; use fisher='sampled'"
        )
    if rules.fisher == "ggn" and out.shape[-1] > GGN_LIMIT:
        raise ValueError(
            f"fisher='ggn' costs a backward pass for each of the {out.shape[-1]} outputs, at most {GGN_LIMIT} are "
            "taken; use fisher='sampled' or 'exact_head'"
        )
    return blocks

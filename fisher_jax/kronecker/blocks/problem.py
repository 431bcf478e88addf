"""A model, how its curvature is taken, and its plan of blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisher_jax._tracing import places
from fisher_jax._tracing.places import UnfollowedError
from fisher_jax._tracing.program import Program, trace
from fisher_jax._tracing.structure import Structures
from fisher_jax._tracing.uses import Spec, Use
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import check_outputs
from fisher_jax.kronecker.blocks.plan import Block, Rules, plan
from fisher_jax.kronecker.options import Curvature
from fisher_jax.likelihoods import Likelihood

__all__ = ["GGN_LIMIT", "Problem", "block_plan", "problem_of"]

Tree = Any
# Outputs per token above which estimator="ggn" is refused: it costs one backward pass for each.
GGN_LIMIT = 64


class Problem(NamedTuple):
    """A model, how its curvature is taken, and what is known of the model's programs."""

    apply_fn: Callable
    likelihood: Likelihood
    rules: Rules
    structures: Structures
    axis_name: Any = None


def problem_of(apply_fn: Callable, likelihood: Likelihood, curvature: Curvature, axis_name: Any = None) -> Problem:
    """A model with the curvature that a user chose for it."""
    rules = Rules(**vars(curvature.settled("empirical")))
    return Problem(apply_fn, likelihood, rules, Structures(), axis_name)


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


def _with_positions(program: Program, told: dict[str, tuple[int, ...] | None], lead: tuple[int, ...]) -> Program:
    """The program whose uses have the rows and positions that a user says they have."""
    unknown = sorted(set(told) - set(program.paths))
    if unknown:
        raise ValueError(f"positions= names {', '.join(unknown)}, and the parameters are {', '.join(program.paths)}")

    def change(spec: Spec) -> Use:
        use, path = spec.use, program.paths[spec.leaf]
        if path not in told or use.kind == "generic":
            return use
        met = spec.inputs[0] if use.kind in ("dense", "embedding", "ragged") else spec.output
        try:
            ids = places.told(use, met.shape[len(use.loops) :], told[path], lead)
        except UnfollowedError as error:
            raise ValueError(
                f"positions={{{path!r}: {told[path]}}} does not fit its use at {use.where}: {error}"
            ) from None
        return dataclasses.replace(use, ids=ids)

    return dataclasses.replace(program, structure=program.structure.changed(change))


def block_plan(problem: Problem, params: Tree, batch: Batch) -> tuple[Program, tuple[Block, ...]]:
    """The model's program, and the block of every parameter; arrays or ``ShapeDtypeStruct``s."""
    rules = dataclasses.replace(problem.rules, devices=_devices(problem.axis_name))
    lead = None if batch.real is None else jnp.shape(batch.real)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch.inputs)]
    orders = [lead, (*lead[1::-1], *lead[2:])] if lead else []
    if lead is not None and not any(shape[: len(lead)] == order for shape in shapes for order in orders):
        begin = ", ".join(str(list(shape)) for shape in shapes[:4])
        raise ValueError(
            f"Batch.real has one value per row, or per row and position, of the inputs: its shape {list(lead)}, or "
            f"this with rows and positions the other way round, is not how any of their shapes begins ({begin})"
        )
    program = trace(problem.apply_fn, params, (batch.inputs,), None, problem.structures, lead, follow=rules.follow)
    check_outputs(program.shape)
    if rules.positions:
        (out,) = program.structure.outputs
        program = _with_positions(program, dict(rules.positions), out.shape[:-1] if lead is None else lead)
    found = program.structure
    blocks = plan(found, program.leaves, program.paths, rules)
    (out,) = found.outputs
    check_outputs(out)
    if rules.estimator == "exact_head" and not (
        found.head is not None
        and not found.head.use.loops
        and found.head.is_last
        and any(b.head for b in blocks)
        and problem.likelihood.name == "categorical"
    ):
        raise ValueError(
            "estimator='exact_head' needs a categorical likelihood whose outputs are those of one dense use and its "
            "bias, with nothing after it; use estimator='sampled'"
        )
    if rules.estimator == "ggn" and out.shape[-1] > GGN_LIMIT:
        raise ValueError(
            f"estimator='ggn' costs a backward pass for each of the {out.shape[-1]} outputs, at most {GGN_LIMIT} are "
            "taken; use estimator='sampled' or 'exact_head'"
        )
    return program, blocks

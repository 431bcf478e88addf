"""Statistics of every block on one batch, from one backward pass or from taps of the training step's own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from fisher_jax._support import rejection
from fisher_jax._support.dtypes import wide
from fisher_jax._support.placement import automatic, spec_of
from fisher_jax._tracing.program import Program, differentiate, with_ids
from fisher_jax._tracing.reading import readable_inputs
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import fisher_factor, log_probs, readable, tokens_of
from fisher_jax.kronecker.blocks.plan import Block, Rules
from fisher_jax.kronecker.blocks.problem import Problem
from fisher_jax.kronecker.factors.forms import chosen
from fisher_jax.kronecker.statistics.block_sums import on_any_device, over_columns, over_devices, sums_of_blocks
from fisher_jax.kronecker.statistics.second_moments import Masks, places, statistic
from fisher_jax.likelihoods import Likelihood

__all__ = ["Observation", "observe", "observe_taps"]

Tree = Any


class Observation(NamedTuple):
    """Statistics of one batch.

    Attributes:
        sums: for every block of the plan a dict of arrays, not divided by anything.
        weight: ``W``, sum of the weights of the tokens.
        bad: int32 bits, why the batch cannot be used; 0 if it can.
        probabilities: ``[V, T]`` and weights ``[T]`` of (some of) the tokens, for ``exact_head``.
        taps: the raw taps and their masks, where eigenvalues are to be corrected.
    """

    sums: tuple[dict[str, Array], ...]
    weight: Array
    bad: Array
    probabilities: tuple[Array, Array] | None = None
    taps: tuple[list, Masks] | None = None


def observe(problem: Problem, program: Program, blocks: tuple[Block, ...], batch: Batch, key: Any) -> Observation:
    """Statistics of every block from one backward pass (``ggn``: one for each output)."""
    rules = problem.rules
    (out,) = program.structure.outputs
    tokens, bad = tokens_of(problem.likelihood, out, batch, rules.estimator == "empirical")
    params = jax.tree.unflatten(program.treedef, program.leaves)
    # A real position counts among the inputs of a layer, whether or not its row has a loss.
    inputs, linked = readable_inputs(problem.apply_fn, params, batch)
    bad, program, weights = bad | linked, program.on(inputs), tokens.weights
    masks, label_key = _masks(problem, weights, batch, key)
    sampled = rules.estimator in ("sampled", "exact_head")
    if sampled and key is None:
        raise ValueError(f"estimator={rules.estimator!r} draws labels from the model: pass key=")
    root = jnp.sqrt(weights)
    whole = any(block.needs_taps(rules) for block in blocks)

    def one(column):
        def loss(outputs):
            fixed = jax.lax.stop_gradient(outputs)
            if rules.estimator == "ggn":
                direction = fisher_factor(problem.likelihood, readable(fixed, root), column)
                return jnp.sum(root[..., None] * (direction * readable(outputs, root)))
            targets = tokens.targets
            if sampled:
                draw = functools.partial(problem.likelihood.sample, temperature=rules.temperature)
                targets = automatic(draw, PartitionSpec(), label_key, fixed)
            return automatic(_log_likelihood(problem.likelihood), PartitionSpec(), outputs, targets, root)

        followed = {i for b in blocks for i in (b.leaf, b.bias) if i is not None}
        owner = {i: b for b in blocks for i in (b.leaf, b.bias) if i is not None}

        def kept(tap):
            def sums(inputs, cotangents, iteration, masks):
                full = dataclasses.replace(tap, inputs=inputs, cotangents=cotangents, iteration=iteration)
                return statistic(full, owner[tap.leaf], masks, rules)

            where = places(tap, owner[tap.leaf], rules)
            return automatic(sums, where, tap.inputs, tap.cotangents, tap.iteration, masks)

        reduce = None if whole else kept
        value, _, taps = differentiate(program, loss, reduce=reduce, follow=followed.__contains__)
        found = [(t.leaf, t.use, t.reduced if reduce else _raw(t, owner, masks, rules)) for t in taps]
        found = [(leaf, use, over_devices(x, problem.axis_name)) for leaf, use, x in found]
        return sums_of_blocks(blocks, found, masks, rules), value, taps if whole else []

    if rules.estimator == "ggn":
        sums, values, taps = jax.lax.map(one, jnp.arange(out.shape[-1]))
        sums = tuple(over_columns(found) for found in sums)
        finite = jnp.all(jnp.isfinite(values))
    else:
        sums, value, taps = one(0)
        finite = jnp.isfinite(value)
    finite &= jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(sums)]))
    probabilities = None
    if rules.estimator == "exact_head":
        outputs = program()
        find = functools.partial(_probabilities, problem, blocks)
        vocabulary = spec_of(outputs)[-1:] or (None,)
        out_places = (PartitionSpec(*vocabulary, None), PartitionSpec())
        probabilities = automatic(find, out_places, outputs, weights, masks)
    bad = bad | rejection.reason_mask(non_finite=~finite)
    if probabilities is not None and problem.axis_name is not None:
        p, w = probabilities
        gather = functools.partial(jax.lax.all_gather, axis_name=problem.axis_name, tiled=True)
        probabilities = gather(p, axis=1), gather(w)
    weight, bad = _everywhere(tokens.total_weight, bad, problem.axis_name)
    return Observation(sums, weight, bad, probabilities, (taps, masks) if whole else None)


def observe_taps(
    problem: Problem, program: Program, blocks: tuple[Block, ...], taps: list, scale: Any, batch: Batch, key: Any
) -> Observation:
    """The same from raw taps of the training step's own backward pass; ``scale`` times its loss is the summed one.

    A batch without targets has none to look at.
    """
    rules = problem.rules
    if rules.estimator != "empirical":
        raise ValueError(
            f"taps of the training loss hold its own labels; estimator={rules.estimator!r} needs batch= instead"
        )
    (out,) = program.structure.outputs
    tokens, bad = tokens_of(problem.likelihood, out, batch, batch.targets is not None)
    masks, _ = _masks(problem, tokens.weights, batch, key)
    owner = {i: b for b in blocks for i in (b.leaf, b.bias) if i is not None}
    taps = with_ids([tap for tap in taps if tap.leaf in owner], program.structure)
    for tap in taps:
        if tap.cotangents is None:
            raise ValueError(f"the tap of {tap.path} was reduced; pass the taps of fj.value_grad_and_taps(loss)")
    taps = [dataclasses.replace(tap, cotangents=wide(tap.cotangents) * scale) for tap in taps]
    found = [(tap.leaf, tap.use, _raw(tap, owner, masks, rules)) for tap in taps]
    found = [(leaf, use, over_devices(x, problem.axis_name)) for leaf, use, x in found]
    sums = sums_of_blocks(blocks, found, masks, rules)
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(sums)]))
    bad = bad | rejection.reason_mask(non_finite=~finite)
    whole = any(block.needs_taps(rules) for block in blocks)
    weight, bad = _everywhere(tokens.total_weight, bad, problem.axis_name)
    return Observation(sums, weight, bad, None, (taps, masks) if whole else None)


def _raw(tap: Any, owner: dict[int, Block], masks: Masks, rules: Rules) -> Tree:
    """The statistic of a raw tap, one for each iteration of its loops."""
    block = owner[tap.leaf]

    def run(inputs, cotangents, masks):
        def kept(inputs, cotangents, *iteration):
            whole = dataclasses.replace(tap, inputs=inputs, cotangents=cotangents, iteration=iteration)
            return statistic(whole, block, masks, rules)

        loops = len(tap.use.loops)
        for depth in reversed(range(loops)):
            kept = jax.vmap(kept, (0, 0, *(0 if i == depth else None for i in range(loops))))
        return kept(inputs, cotangents, *map(jnp.arange, cotangents.shape[:loops]))

    looped = [None] * len(tap.use.loops)
    where = {name: PartitionSpec(*looped, *spec) for name, spec in places(tap, block, rules).items()}
    return automatic(run, where, tap.inputs, tap.cotangents, masks)


def _everywhere(weight: Array, bad: Array, axis_name: Any) -> tuple[Array, Array]:
    """The weight of the whole batch, and why any part of it cannot be used."""
    if axis_name is None:
        return weight, bad
    return jax.lax.psum(weight, axis_name), on_any_device(bad, axis_name)


def _log_likelihood(likelihood: Likelihood) -> Callable:
    def total(outputs, targets, root):
        return jnp.sum(root * log_probs(likelihood, outputs, targets, root))

    return total


def _masks(problem: Problem, weights: Array, batch: Batch, key: Any) -> tuple[Masks, Any]:
    """Masks, and a key for the labels; without a key columns are taken from the middle of their strata."""
    size = problem.rules.token_cap or 1
    offsets, label_key = jnp.full(size, 0.5), key
    if key is not None:
        if not isinstance(key, jax.Array):
            raise TypeError(f"key is one of jax.random, such as jax.random.key(0), found {key!r}")
        label_key, offset_key = jax.random.split(key)
        # Of gathered columns all devices must keep the same; labels are each device's own.
        offsets = jax.random.uniform(offset_key, (size,))
        if problem.axis_name is not None:
            label_key = jax.random.fold_in(label_key, jax.lax.axis_index(problem.axis_name))
    rows = weights.shape[0] if weights.ndim else 1
    return Masks(weights, batch.real, offsets, rows, batch.weights is not None), label_key


def _probabilities(problem, blocks, outputs, weights, masks) -> tuple[Array, Array]:
    """Softmax of the outputs, ``[V, T]``: of all tokens, or of as many as a low-rank head keeps."""
    z, w = wide(readable(outputs, weights)).reshape(-1, outputs.shape[-1]), weights.ravel()
    (head,) = [b for b in blocks if b.head]
    cap = problem.rules.token_cap
    if head.low_rank and cap is not None and cap < len(w):
        index, _ = chosen(w > 0, cap, masks.offsets)
        z, w = z[index], w[index]
    return jax.nn.softmax(z).T, w

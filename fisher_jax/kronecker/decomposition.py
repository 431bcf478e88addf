"""From the sums of an observation to the factors of every block."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from fisher_jax.kronecker.blocks import Block, Rules
from fisher_jax.kronecker.corrected import column_weights, second_moments
from fisher_jax.kronecker.factors import Diagonal, Eigen, Factor, LowRank, diagonal, eigen, low_rank
from fisher_jax.kronecker.observation import Observation
from fisher_jax.kronecker.placement import automatic, spec_of
from fisher_jax.kronecker.woodbury import SoftmaxHead, head_matrix, softmax_head

__all__ = ["BlockFactors", "decompose"]


class BlockFactors(NamedTuple):
    """Factors of one block; every array has a leading axis, one entry for each of its matrices.

    Attributes:
        A, G: second moments of inputs and of output gradients; ``None`` for a diagonal.
        rows: of a tied leaf, what its use as an embedding adds to each row.
        diagonal: of scales and lone biases, in the shape of the leaf.
        eigenvalues: corrected ones ``[N, out, in]``, in the bases of ``G`` and ``A``; with a low-rank ``G``
            ``[N, T, in]``, each divided by the eigenvalue of ``G``, as belongs to the basis ``U Q``.
    """

    A: Factor | None = None
    G: Factor | SoftmaxHead | None = None
    rows: Array | None = None
    diagonal: Array | None = None
    eigenvalues: Array | None = None


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
            if block.is_corrected(rules) and block.low_rank:
                values = column_weights(seen.sums[i]["inputs"], found[i].A, found[i].G)
                found[i] = found[i]._replace(eigenvalues=values)
            elif block.is_corrected(rules):
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

"""From the sums of an observation to the factors of every block."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from fisher_jax._support.outline import outline
from fisher_jax._support.placement import automatic, mesh_of, spec_of
from fisher_jax.kronecker.blocks.plan import Block, Rules
from fisher_jax.kronecker.blocks.problem import Problem
from fisher_jax.kronecker.curvature.eigenvalue_correction import column_weights, second_moments
from fisher_jax.kronecker.factors.eigen_stacks import eigen_stacks
from fisher_jax.kronecker.factors.forms import Diagonal, Eigen, Factor, LowRank, diagonal, gram, stored
from fisher_jax.kronecker.factors.woodbury import SoftmaxHead, head_matrix, softmax_head
from fisher_jax.kronecker.statistics.observation import Observation

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

    def __repr__(self) -> str:
        return outline(self)


def decompose(
    blocks: tuple[Block, ...],
    seen: Observation,
    problem: Problem,
    factor_dtype: Any = None,
    mesh: Any = None,
) -> tuple[BlockFactors, ...]:
    """Normalise the sums of an observation and decompose them.

    ``factor_dtype`` is that of columns; ``mesh`` is that of the model's arguments, whose devices share the work.
    """
    rules, axis_name = problem.rules, problem.axis_name

    def run(seen):
        around = mesh_of()  # inside Explicit axes are automatic
        weight = jnp.where(seen.weight > 0, seen.weight, 1)
        parts = [_parts(b, sums, weight, seen, factor_dtype) for b, sums in zip(blocks, seen.sums, strict=True)]
        places = [(i, name) for i, part in enumerate(parts) for name in ("A", "G") if part.get(name) is not None]
        spectra = eigen_stacks([parts[i][name] for i, name in places], around or mesh, axis_name)
        bases: list[dict] = [{} for _ in blocks]
        for (i, name), spectrum in zip(places, spectra, strict=True):
            bases[i][name] = spectrum
        found = [_factors(b, part, basis) for b, part, basis in zip(blocks, parts, bases, strict=True)]
        for i, block in enumerate(blocks):
            if block.is_corrected(rules):
                values = _corrected(block, seen, seen.sums[i], found[i], weight, rules, axis_name)
                found[i] = found[i]._replace(eigenvalues=values)
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


def _parts(block: Block, sums: dict, weight: Array, seen: Observation, factor_dtype: Any) -> dict:
    """What a block's factors are made of, normalised; ``A`` and ``G`` are stacks of matrices to decompose."""
    if block.kind == "diagonal":
        return {"diagonal": sums["squares"] / weight}
    if not block.is_kronecker:
        return {}
    parts: dict[str, Any] = {}
    if block.kind == "dense" or block.kind == "tied":
        # Experts are given tokens of their own.
        count = jnp.repeat(sums["count"], len(sums["A"]) // len(sums["count"]))
        parts["A"] = sums["A"] / jnp.where(count > 0, count, 1)[:, None, None]
    if block.kind == "embedding" or block.kind == "tied":
        parts["frequency"] = _share(sums["frequency"], sums["positions"])
    if block.kind == "tied":
        parts["trace"] = sums["square"].sum() / weight
    if block.head and seen.probabilities is not None:
        head = softmax_head(*seen.probabilities)
        if block.low_rank:
            return parts | {"head": jax.tree.map(lambda x: x[None], head)}
        return parts | {"G": head_matrix(head)[None]}
    if block.low_rank:
        columns = stored(sums["U"] / jnp.sqrt(weight), factor_dtype)
        return parts | {"columns": columns, "G": gram(columns)}
    return parts | {"G": sums["G"] / weight}


def _factors(block: Block, parts: dict, bases: dict) -> BlockFactors:
    if not block.is_kronecker:
        return BlockFactors(diagonal=parts.get("diagonal"))
    G = parts.get("head", bases.get("G"))
    if "columns" in parts:
        G = LowRank(parts["columns"], *bases["G"])
    if block.kind == "embedding":
        return BlockFactors(jax.vmap(diagonal)(parts["frequency"]), G)
    rows = parts["frequency"] * (parts["trace"] / block.width) if block.kind == "tied" else None
    return BlockFactors(bases["A"], G, rows)


def _corrected(
    block: Block, seen: Observation, sums: dict, found: BlockFactors, weight: Array, rules: Rules, axis_name: Any
) -> Array:
    if block.low_rank:
        return column_weights(sums["inputs"], found.A, found.G)
    assert seen.taps is not None
    taps, masks = seen.taps
    total = second_moments(block, taps, masks, rules, found.A, found.G)
    return (total if axis_name is None else jax.lax.psum(total, axis_name)) / weight


def _share(x: Array, count: Array) -> Array:
    # Every layer of a stack meets the same positions.
    count = jnp.ravel(count)[0]
    return x / jnp.where(count > 0, count, 1)

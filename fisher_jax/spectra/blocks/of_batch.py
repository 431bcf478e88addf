"""Spectra of blocks of one batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from fisher_jax._support.selection import Chosen
from fisher_jax._tracing.structure import Structures
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import check_arguments
from fisher_jax.batch.tokens import require_usable
from fisher_jax.likelihoods import Likelihood
from fisher_jax.spectra.blocks import gram
from fisher_jax.spectra.blocks import state as state_room
from fisher_jax.spectra.blocks.capacity import BlockSpectrum
from fisher_jax.spectra.blocks.partition import Grouping, ParameterBlock, partition
from fisher_jax.spectra.blocks.scores import Scoring, check_layout, check_rows, takes_whole_rows

__all__ = ["block_spectrum"]

Tree = Any


def block_spectrum(
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood,
    params: Tree,
    batch: Batch,
    *,
    top_k: int | None = None,
    damping: float = 1e-3,
    unit: str = "token",
    kind: str = "empirical",
    blocks: Grouping = "parameter",
    stacked: Chosen = None,
    parameters: Chosen = None,
    num_samples: int = 1,
    chunk_size: int = 16,
    rows_independent: bool | None = None,
    key: Array | None = None,
) -> dict[str, BlockSpectrum]:
    """Eigenvalues and capacity of every block of the Fisher matrix ``F = sum_t w_t s_t s_t^T / sum_t w_t``.

    ``s_t = d log p(y_t) / d params`` restricted to the block. With ``unit="sequence"`` the scores of a row are summed
    first, ``F = sum_u (sum_{t in u} w_t s_t)(...)^T / sum_t w_t``: another matrix, which contains the correlation of
    a sequence's scores. The trace is the sum of `fj.group_fisher`'s values, by tokens or by
    ``estimator="sequence"``. To take a subsample of tokens give the others weight 0: the mean is over those that
    remain.

    For ``N`` scores of ``P`` parameters it is the smallest of the covariance (``P x P``), the Gram matrix of the
    scores (``N x P`` and ``N x N``) and, where a row has one score, the Gram matrix from taps, for which no gradient
    is formed (dense and embedding leaves that are used once). Every row of the batch runs alone, and a model whose
    rows depend on each other is refused; a token's score is exact in models that mix positions, by one backward pass
    per token that counts.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs [rows, ..., K]``.
        likelihood: ``fj.categorical``, ``fj.bernoulli`` or ``fj.gaussian``.
        params: a tree of arrays; leaves that are not floating are frozen.
        batch: weights as everywhere: 0 = no loss.
        top_k: how many eigenvalues are returned, the largest. Blocks with fewer parameters return all they have.
        damping: of the log-determinant and the damped condition number.
        unit: ``"token"`` or ``"sequence"`` (a row of the batch).
        kind: ``"empirical"`` (the batch's labels) or ``"true"`` (labels drawn from the model with ``key``).
        blocks: ``"parameter"``: every leaf; ``"module"``: leaves that share all of their path but the last key; or a
            function ``path -> name`` of ``jax.tree_util.keystr``'s paths, ``None`` to leave one out.
        stacked: leaves whose leading axis is one of layers (as scanned layers have): one block per layer,
            ``name[layer]``. A pattern, predicate or tree of booleans as in `fisher_jax.operators.restrict`; ``True``:
            those that the model scans over.
        parameters: the leaves to look at, chosen in the same way.
        num_samples: labels drawn per token.
        chunk_size: gradients alive at once.
        rows_independent: as for `fisher_jax.group_fisher`: ``None`` asks the program, and values where it does not
            say; ``True`` is your word.
        key: for ``kind="true"``.

    Returns:
        ``{name: BlockSpectrum}`` of numpy values, see `BlockSpectrum` and `Capacity`. On the host; not under ``jit``.

    Raises:
        ValueError: an unknown option, ``top_k`` below 1 or above the largest block's number of parameters, complex or
            no floating parameters, shapes that do not fit (each named); on a mesh with Explicit axes a model that
            names places (``out_sharding=``), which a row alone cannot have; a model whose rows depend on each other.
        RejectedBatchError: an empty batch, a negative weight, a label out of range, a score that is not finite.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> params = {"kernel": jnp.zeros((2, 3))}
        >>> batch = fj.Batch(jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([0, 2]))
        >>> found = fj.block_spectrum(lambda p, x: x @ p["kernel"], fj.categorical, params, batch, top_k=2)
        >>> [round(float(x), 3) for x in found["['kernel']"].eigenvalues]
        [1.333, 0.333]
    """
    check_arguments(apply_fn, likelihood, batch=batch)
    state_room.check_options(unit, kind, num_samples, chunk_size, 1)
    check_layout(apply_fn, params, batch.inputs)
    structures = Structures()
    found = partition(params, blocks, stacked, parameters, apply_fn, batch, structures)
    largest = max(block.size for block in found.blocks)
    state_room.check_top_k(top_k, damping, largest)
    problem = Scoring(apply_fn, likelihood, found.selection, unit, kind, num_samples, chunk_size)
    key = state_room.key_for(kind, key)
    part, bad = state_room.tokens(problem, params, batch)
    check_rows(apply_fn, params, part.inputs, structures, rows_independent)
    require_usable(bad, part.total_weight)
    num_scores = int(state_room.count_scores(problem, part.weights))
    by_taps = gram.smaller(problem, params, part, found.blocks) if takes_whole_rows(problem, part.weights) else []
    tapped = tuple(found.blocks[i] for i in by_taps)
    grams = gram.grams(problem, tapped, params, part, key) if tapped else []
    spectra: dict[str, BlockSpectrum] = {}
    options, weight = {"top_k": top_k, "damping": damping}, float(part.total_weight)
    for block, matrix in zip(tapped, grams, strict=True):
        spectra |= state_room.spectra_of(block.names(), matrix, weight, block.size, num_scores, "taps", options)
    rest = tuple(block for i, block in enumerate(found.blocks) if i not in by_taps)
    if rest:
        setting = state_room.Setting(*_without(problem, rest), num_scores)
        state = state_room.update(setting, state_room.init(setting, params), params, batch, key)
        spectra |= state_room.finalize(state, top_k, damping, largest)
    names = [name for block in found.blocks for name in block.names()]
    return {name: spectra[name] for name in names}


def _without(problem: Scoring, rest: tuple[ParameterBlock, ...]) -> tuple[Scoring, tuple[ParameterBlock, ...]]:
    """The same blocks, with only their own leaves moving."""
    selection = problem.selection
    moving = [i for i, moves in enumerate(selection.moves) if moves]
    used = sorted({leaf for block in rest for leaf in block.leaves})
    place = {leaf: i for i, leaf in enumerate(used)}
    kept_leaves = {moving[leaf] for leaf in used}
    selection = dataclasses.replace(selection, moves=tuple(i in kept_leaves for i in range(len(selection.moves))))
    blocks = tuple(dataclasses.replace(b, leaves=tuple(place[leaf] for leaf in b.leaves)) for b in rest)
    return problem._replace(selection=selection), blocks

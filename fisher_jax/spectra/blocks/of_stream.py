"""Spectra of blocks over a stream of batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from fisher_jax._support.outline import outline
from fisher_jax._support.selection import Chosen
from fisher_jax._tracing.structure import Structures
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import check_arguments, check_batch
from fisher_jax.likelihoods import Likelihood, categorical
from fisher_jax.spectra.blocks import state as state_room
from fisher_jax.spectra.blocks.capacity import BlockSpectrum
from fisher_jax.spectra.blocks.partition import Grouping, partition
from fisher_jax.spectra.blocks.scores import Scoring, check_layout, check_rows
from fisher_jax.spectra.blocks.state import BlockSpectraState, Setting

__all__ = ["BlockSpectra", "block_spectra"]

Tree = Any


class BlockSpectra(NamedTuple):
    """Pure functions, in the manner of an optax transformation.

    Attributes:
        init: ``init(params) -> BlockSpectraState``, empty; ``jax.eval_shape(init, params)`` tells the memory.
        update: ``update(state, params, batch, key=None) -> BlockSpectraState``, under ``jit`` if you like, with
            the state donated. A bad batch changes nothing but ``rejected``.
        finalize: ``finalize(state, *, top_k=None, damping=1e-3) -> {name: BlockSpectrum}``, on the host.
    """

    init: Callable[[Tree], BlockSpectraState]
    update: Callable[..., BlockSpectraState]
    finalize: Callable[..., dict[str, BlockSpectrum]]

    def __repr__(self) -> str:
        return outline(self)


def block_spectra(
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood = categorical,
    *,
    max_scores: int = 256,
    example: Batch | None = None,
    unit: str = "token",
    kind: str = "empirical",
    blocks: Grouping = "parameter",
    stacked: Chosen = None,
    parameters: Chosen = None,
    num_samples: int = 1,
    chunk_size: int = 16,
    rows_independent: bool | None = None,
) -> BlockSpectra:
    """Spectra of the blocks of the Fisher matrix over a stream of batches, in memory that ``max_scores`` bounds.

    The matrix, its normalisation and all options are those of `block_spectrum`. Of a block of ``P`` parameters the
    state keeps

    - the covariance, ``2 P^2`` numbers, if ``P <= max_scores``: exact for any number of scores;
    - otherwise the scores, ``(max_scores + chunk_size) P`` numbers: exact as long as there are no more than
      ``max_scores`` of them. Beyond that a *frequent directions* sketch (Ghashami, Liberty, Phillips and Woodruff
      2016): eigenvalues are then too small by at most ``error_bound``, which is measured along the way and is never
      above ``(trace - sum of the k largest eigenvalues) / (m + 1 - k)`` for any ``k <= m``, with
      ``m = (max_scores + chunk_size) // 2`` directions; up to float32's rounding, ``eps`` times the largest.

    Args:
        max_scores: see above.
        example: a `Batch` of arrays or ``jax.ShapeDtypeStruct``s, needed for ``stacked=True``.

    Returns:
        `BlockSpectra`: ``init``, ``update``, ``finalize``.

    Raises:
        ValueError: see `block_spectrum`.
        RejectedBatchError: in ``finalize``: a batch was rejected, or no token has any weight.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> stream = fj.spectra.block_spectra(lambda p, x: x @ p["kernel"], fj.gaussian, max_scores=4)
        >>> params = {"kernel": jnp.zeros((2, 1))}
        >>> state = stream.init(params)
        >>> for x, y in (([1.0, 0.0], 2.0), ([0.0, 1.0], 4.0)):
        ...     state = stream.update(state, params, fj.Batch(jnp.array([x]), jnp.array([[y]])))
        >>> stream.finalize(state)["['kernel']"].eigenvalues.tolist()
        [8.0, 2.0]
    """
    check_arguments(apply_fn, likelihood)
    if example is not None:
        check_batch(example, "example")
    state_room.check_options(unit, kind, num_samples, chunk_size, max_scores)

    structures = Structures()

    def setting(params: Tree) -> Setting:
        found = partition(params, blocks, stacked, parameters, apply_fn, example, structures)
        problem = Scoring(apply_fn, likelihood, found.selection, unit, kind, num_samples, chunk_size)
        return Setting(problem, found.blocks, max_scores)

    def init(params: Tree) -> BlockSpectraState:
        if example is not None:
            check_rows(apply_fn, params, example.inputs, structures, rows_independent)
        return state_room.init(setting(params), params)

    def update(state: BlockSpectraState, params: Tree, batch: Batch, key: Array | None = None) -> BlockSpectraState:
        check_batch(batch)
        check_layout(apply_fn, params, batch.inputs)
        check_rows(apply_fn, params, batch.inputs, structures, rows_independent)
        return state_room.update(setting(params), state, params, batch, state_room.key_for(kind, key))

    def finalize(
        state: BlockSpectraState, *, top_k: int | None = None, damping: float = 1e-3
    ) -> dict[str, BlockSpectrum]:
        return state_room.finalize(state, top_k, damping)

    return BlockSpectra(init, update, finalize)

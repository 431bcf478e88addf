"""The state of a stream of batches: what is kept of every block's scores, and what it says in the end."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fisher_jax._support import compensated, rejection
from fisher_jax._support.dtypes import common_dtype, wide_dtype
from fisher_jax._support.errors import RejectedBatchError
from fisher_jax._support.meshes import replicating
from fisher_jax._support.outline import outline
from fisher_jax._tracing.reading import read
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import Tokens
from fisher_jax.spectra.blocks import score_storage
from fisher_jax.spectra.blocks.capacity import BlockSpectrum, spectrum
from fisher_jax.spectra.blocks.partition import ParameterBlock
from fisher_jax.spectra.blocks.scores import Scoring, fold

__all__ = [
    "BlockSpectraState",
    "Setting",
    "check_options",
    "check_top_k",
    "count_scores",
    "finalize",
    "init",
    "key_for",
    "spectra_of",
    "tokens",
    "update",
]  # fmt: skip

Tree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kept", "traces", "weight", "count", "rejected", "reasons"],
    meta_fields=["names"],
)
@dataclasses.dataclass(frozen=True)
class BlockSpectraState:
    """What a stream of batches has shown.

    Attributes:
        kept: for every block what is kept of its scores, with a leading axis of layers.
        traces: for every block the sum of the scores' squared lengths, a pair ``[2, layers]``.
        weight, count: ``sum_t w_t`` and the number of scores, exact pairs ``[2]``.
        rejected, reasons: int32, the batches left out and why (`fisher_jax.check`).
        names: static, for every block the names of its layers' spectra.
    """

    kept: tuple[score_storage.Kept, ...]
    traces: tuple[Array, ...]
    weight: Array
    count: Array
    rejected: Array
    reasons: Array
    names: tuple[tuple[str, ...], ...]

    def __repr__(self) -> str:
        return outline(self)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known before any number is; static, and equal for equal choices, so that nothing recompiles."""

    problem: Scoring
    blocks: tuple[ParameterBlock, ...]
    max_scores: int

    @property
    def chunk(self) -> int:
        return min(self.problem.chunk_size, self.max_scores)


def check_options(unit: str, kind: str, num_samples: int, chunk_size: int, max_scores: int) -> None:
    if unit not in ("token", "sequence"):
        raise ValueError(f"unit is 'token' or 'sequence', found {unit!r}")
    if kind not in ("empirical", "true"):
        raise ValueError(f"kind is 'empirical' or 'true', found {kind!r}")
    for name, x in (("num_samples", num_samples), ("chunk_size", chunk_size), ("max_scores", max_scores)):
        if x < 1:
            raise ValueError(f"{name} is at least 1, found {x}")
    if num_samples > 1 and kind == "empirical":
        raise ValueError("num_samples draws labels: it needs kind='true'")


def check_top_k(top_k: int | None, damping: float, largest: int) -> None:
    if top_k is not None and not 1 <= top_k <= largest:
        raise ValueError(f"top_k is between 1 and the parameters of the largest block, {largest}; found {top_k}")
    if not damping > 0:
        raise ValueError(f"damping is positive, found {damping}")


def key_for(kind: str, key: Array | None) -> Array:
    if kind == "true" and key is None:
        raise ValueError("kind='true' draws labels: pass key=")
    return jax.random.key(0) if key is None else key


def tokens(problem: Scoring, params: Tree, batch: Batch) -> tuple[Tokens, Array]:
    # As the rows will run: a model that looks sharded tokens up may name no place for them there.
    part, bad, _ = read(
        problem.likelihood, lambda p, x: replicating(problem.apply_fn, p, x), params, batch,
        problem.kind == "empirical",
    )  # fmt: skip
    if part.weights.ndim == 0:
        raise ValueError("outputs are [rows, ..., K], found [K] without rows")
    rows = part.weights.shape[0]
    for path, x in jax.tree_util.tree_leaves_with_path((part.inputs, part.targets)):
        if jnp.ndim(x) == 0 or x.shape[0] != rows:
            raise ValueError(
                f"every row runs alone: {('the inputs', 'the targets')[path[0].idx]}{jax.tree_util.keystr(path[1:])} "
                f"have shape {list(jnp.shape(x))}, their first axis should be {rows}"
            )
    return part, bad


def count_scores(problem: Scoring, weights: Array) -> Array:
    """Scores that count."""
    active = weights > 0
    active = active.reshape(active.shape[0], -1).any(1) if problem.unit == "sequence" else active
    return jnp.sum(active) * problem.num_samples


def init(setting: Setting, params: Tree) -> BlockSpectraState:
    leaves = jax.tree.leaves(setting.problem.selection.restrict(params))
    held, traces = [], []
    for block in setting.blocks:
        dtype = wide_dtype(*(leaves[i].dtype for i in block.leaves))
        layers = block.layers or 1
        held.append(score_storage.keep(layers, block.size, setting.max_scores, setting.chunk, dtype))
        traces.append(jnp.zeros((2, layers), dtype))
    dtype = common_dtype(*(x.dtype for x in traces))
    return BlockSpectraState(
        kept=tuple(held), traces=tuple(traces), weight=jnp.zeros(2, dtype), count=jnp.zeros(2, dtype),
        rejected=jnp.zeros((), jnp.int32), reasons=jnp.zeros((), jnp.int32),
        names=tuple(block.names() for block in setting.blocks),
    )  # fmt: skip


@jax.jit
def update(setting: Setting, state: BlockSpectraState, params: Tree, batch: Batch, key: Array) -> BlockSpectraState:
    return replicating(lambda *arguments: _add(setting, *arguments), state, params, batch, key)


def _add(setting: Setting, state: BlockSpectraState, params: Tree, batch: Batch, key: Array) -> BlockSpectraState:
    problem = setting.problem._replace(chunk_size=setting.chunk)
    part, bad = tokens(problem, params, batch)

    def absorb(carry, leaves, live):
        found = []
        for block, held, trace in zip(setting.blocks, *carry, strict=True):
            scores = block.vectors(leaves)
            found.append(
                (score_storage.absorb(held, scores, live, setting.max_scores), trace + score_storage.trace(scores))
            )
        return tuple(zip(*found, strict=True))

    begun = tuple(map(score_storage.begin, state.kept)), tuple(jnp.zeros_like(x[0]) for x in state.traces)
    held, traces = fold(problem, params, part, key, absorb, begun)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in traces]))
    bad = bad | rejection.reason_mask(non_finite=~finite)

    def add(pair, x):
        return compensated.add(pair, compensated.from_value(x.astype(pair.dtype)))

    new = dataclasses.replace(
        state,
        kept=tuple(map(score_storage.combine, state.kept, held)),
        traces=tuple(map(add, state.traces, traces)),
        weight=add(state.weight, part.total_weight),
        count=add(state.count, count_scores(problem, part.weights)),
    )
    new = jax.tree.map(lambda a, b: jnp.where(bad == 0, a, b), new, state)
    rejected = state.rejected + (bad != 0).astype(jnp.int32)
    return dataclasses.replace(new, rejected=rejected, reasons=state.reasons | bad)


def finalize(
    state: BlockSpectraState, top_k: int | None, damping: float, largest: int | None = None
) -> dict[str, BlockSpectrum]:
    rejection.check(state)
    weight, num_scores = (float(np.sum(np.asarray(x, np.float64))) for x in (state.weight, state.count))
    if not num_scores:
        raise RejectedBatchError("the stream is empty: no token has any weight, and a mean over none is not defined")
    sizes = [(x.sums if isinstance(x, score_storage.Covariance) else x.rows).shape[-1] for x in state.kept]
    check_top_k(top_k, damping, max(sizes) if largest is None else largest)
    options: dict[str, Any] = {"top_k": top_k, "damping": damping}
    spectra: dict[str, BlockSpectrum] = {}
    for names, held, pair, size in zip(state.names, state.kept, state.traces, sizes, strict=True):
        traces = np.sum(np.asarray(pair, np.float64), 0) / weight
        if isinstance(held, score_storage.Covariance):
            matrix, method, lost = compensated.value(held.sums), "covariance", np.zeros(traces.size)
        else:
            rows = held.rows[:, : int(held.filled)]
            matrix = jnp.einsum("lrp,lsp->lrs", rows, rows, precision=jax.lax.Precision.HIGHEST)
            lost = np.asarray(held.lost, np.float64) / weight
            method = "sketch" if int(held.filled) < num_scores else "gram"
        spectra |= spectra_of(names, matrix, weight, size, int(num_scores), method, options, lost, traces)
    return spectra


def spectra_of(
    names: tuple[str, ...],
    matrices: Array,
    weight: float,
    size: int,
    num_scores: int,
    method: str,
    options: dict[str, Any],
    lost: np.ndarray | None = None,
    traces: np.ndarray | None = None,
) -> dict[str, BlockSpectrum]:
    """One spectrum per layer; the small symmetric problems are solved in float64 on the host."""
    eps, found = float(jnp.finfo(matrices.dtype).eps), {}
    for i, name in enumerate(names):
        matrix = np.asarray(matrices[i], np.float64)
        if not np.isfinite(matrix).all():
            raise RejectedBatchError(f"block {name}: {rejection.reasons(rejection.NON_FINITE)[0]}")
        found[name] = spectrum(
            np.linalg.eigvalsh(matrix) / weight, size, num_scores, method, eps=eps, **options,
            error_bound=0.0 if lost is None else float(lost[i]), trace=None if traces is None else float(traces[i]),
        )  # fmt: skip
    return found

"""Eigenvalues of the curvature that Kronecker factors describe, from those of the factors."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fisher_jax._support.dtypes import wide_dtype
from fisher_jax._support.outline import outline
from fisher_jax.kronecker.blocks.plan import Block
from fisher_jax.kronecker.curvature.factors import BlockFactors, Factors
from fisher_jax.kronecker.curvature.product import block_product
from fisher_jax.kronecker.factors.forms import Eigen, LowRank
from fisher_jax.kronecker.factors.woodbury import SoftmaxHead
from fisher_jax.spectra import lanczos

__all__ = ["DENSE_LIMIT", "BlockEigenvalues", "KFACSpectrum", "kfac_spectrum"]

# in out**3 in operations above which a block without a closed form is left to Lanczos.
DENSE_LIMIT = 10**10


class BlockEigenvalues(NamedTuple):
    """Eigenvalues of one block of a K-FAC curvature. float64 numpy.

    Attributes:
        kind: of the block, as in ``factors.plan``.
        eigenvalues: the largest ones, descending, each as often as it occurs; NaN where Lanczos found none.
        residuals: what bounds their errors beyond the rounding of the factors: 0 but where Lanczos was used.
        dimension: entries of the block, its bias included.
        num_zero: eigenvalues that are zero to the rounding of the factors; -1 where that is not known.
        trace: sum of all eigenvalues.
    """

    kind: str
    eigenvalues: np.ndarray
    residuals: np.ndarray
    dimension: int
    num_zero: int
    trace: float

    def __repr__(self) -> str:
        return outline(self)


class KFACSpectrum(NamedTuple):
    """What `kfac_spectrum` found.

    Attributes:
        eigenvalues: the largest ones of all blocks together, descending.
        paths: the block that each of them belongs to, by the path of its kernel.
        blocks: ``{path: BlockEigenvalues}``.
        trace, dimension: of all blocks.
    """

    eigenvalues: np.ndarray
    paths: tuple[str, ...]
    blocks: dict[str, BlockEigenvalues]
    trace: float
    dimension: int

    def __repr__(self) -> str:
        return outline(self)


def kfac_spectrum(factors: Factors, num_eigenvalues: int | None = None, *, key: Any = None) -> KFACSpectrum:
    """Eigenvalues of the block diagonal ``F`` that `fj.kfac_factors` found, without damping and without products.

    Those of a block ``A (x) G`` are the products ``a_j g_i`` of the factors' eigenvalues (``U U^T`` has those of
    ``U^T U``, and zeros); the ``k`` largest are found among the pairs with ``(i + 1)(j + 1) <= k``, so that nothing
    of the size of the block is formed. Corrected eigenvalues (EK-FAC) are listed as they are, and those of scales
    and lone biases are their diagonal. Layers of a stack count together. Units are those of ``F``: per weighted
    token. ``F + damping I`` has the same ones plus ``damping``.
    Leaves that the outputs do not depend on have zeros only, and are not counted.

    An embedding tied to its head, and the true Fisher of a softmax head kept as columns, have no closed form: they
    are decomposed densely up to ``in out**3`` of 1e10 operations (one ``out x out`` matrix for each eigenvalue of
    ``A``), and by `fj.lanczos` beyond, with residual bounds.

    Args:
        factors: of `fj.kfac_factors`, or of a training state by `fj.kfac_tools.kfac_factors_from_state`.
        num_eigenvalues: of all blocks together, and of each block at most; ``None``: all of them.
        key: of Lanczos's start vectors, where it is needed.

    Raises:
        ValueError: fewer than one eigenvalue, or more than the dimension; a block that needs Lanczos without a key.

    See Martens and Grosse (2015); George et al. (2018).

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x @ params["kernel"]
        >>> batch = fj.Batch(jnp.diag(jnp.array([2.0, 1.0])), jnp.array([[1.0], [1.0]]))
        >>> factors = fj.kfac_factors(apply_fn, fj.gaussian, {"kernel": jnp.zeros((2, 1))}, batch)
        >>> found = fj.kfac_tools.kfac_spectrum(factors, 2)  # A = diag(2, 1/2), G = 1
        >>> [round(float(x), 4) for x in found.eigenvalues], found.paths[0], round(found.trace, 4)
        ([2.0, 0.5], "['kernel']", 2.5)
    """
    pairs = [(b, f) for b, f in zip(factors.plan, factors.blocks, strict=True) if b.kind != "frozen"]
    dimension = sum(_dimension(b) for b, _ in pairs)
    k = dimension if num_eigenvalues is None else num_eigenvalues
    if not 1 <= k <= dimension:
        raise ValueError(f"num_eigenvalues is between 1 and the dimension, {dimension}; found {k}")
    blocks = {b.path: _of_block(b, f, min(k, _dimension(b)), key) for b, f in pairs}
    values = np.concatenate([found.eigenvalues for found in blocks.values()])
    owner = np.concatenate([np.full(len(found.eigenvalues), i) for i, found in enumerate(blocks.values())])
    order = np.argsort(-values, kind="stable")[:k]
    names = list(blocks)
    paths = tuple(names[i] for i in owner[order])
    return KFACSpectrum(values[order], paths, blocks, sum(found.trace for found in blocks.values()), dimension)


def _dimension(block: Block) -> int:
    if block.is_kronecker:
        return block.number * block.units * (block.width + (block.bias is not None))
    # Nothing depends on an unused leaf: zeros that are not counted.
    return 0 if block.use is None else math.prod(block.use.segments[0].source.shape)


def _of_block(block: Block, found: BlockFactors, k: int, key: Any) -> BlockEigenvalues:
    if not block.is_kronecker:
        values = np.zeros(0) if found.diagonal is None else found.diagonal
        return _listed(block, _float64(values).ravel(), k, values)
    if found.eigenvalues is not None:
        return _listed(block, _corrected(block, found), k, found.eigenvalues)
    if found.rows is not None or isinstance(found.G, SoftmaxHead):
        cost = block.number * block.units**3 * (block.width if found.rows is not None else 1)
        if cost > DENSE_LIMIT:
            return _by_lanczos(block, found, k, key)
    if found.rows is not None:
        return _listed(block, _tied(found), k, found.rows)
    assert found.A is not None
    a, g = _spectrum(found.A, block.width + (block.bias is not None)), _spectrum(found.G, block.units)
    like = found.A.values
    top = np.concatenate([largest_products(x, y, k) for x, y in zip(a, g, strict=True)])
    nonzero = int(np.sum(np.sum(_nonzero(a, like), 1) * np.sum(_nonzero(g, like), 1)))
    top = np.sort(top)[::-1][:k]
    total = float(np.sum(a.sum(1) * g.sum(1)))
    dimension = _dimension(block)
    return BlockEigenvalues(block.kind, top, np.zeros(len(top)), dimension, dimension - nonzero, total)


def _listed(block: Block, values: np.ndarray, k: int, like: Any) -> BlockEigenvalues:
    top = np.sort(values)[::-1][:k]
    zeros = int(np.sum(~_nonzero(values[None], like))) if len(values) else 0
    return BlockEigenvalues(block.kind, top, np.zeros(len(top)), len(values), zeros, float(values.sum()))


def _corrected(block: Block, found: BlockFactors) -> np.ndarray:
    """All corrected eigenvalues; of columns they are kept relative to those of ``U U^T``, the others are zeros."""
    values = _float64(found.eigenvalues)
    if not isinstance(found.G, LowRank):
        return values.ravel()
    values = np.sort((values * _float64(found.G.values)[..., None]).ravel())[::-1]
    size = _dimension(block)
    return np.pad(values[:size], (0, max(size - len(values), 0)))


def largest_products(a: np.ndarray, g: np.ndarray, k: int) -> np.ndarray:
    """The ``k`` largest products of two lists that are not negative, descending.

    A pair at the places ``(i, j)`` of the sorted lists has ``(i + 1)(j + 1) - 1`` pairs that are not smaller.
    """
    a, g = np.sort(a)[::-1][:k], np.sort(g)[::-1][:k]
    found = [x * g[: k // (i + 1)] for i, x in enumerate(a)]
    return np.sort(np.concatenate(found))[::-1][:k]


def _spectrum(factor: Any, size: int) -> np.ndarray:
    """``[N, size]``, not negative: all eigenvalues of a factor, in any order."""
    if isinstance(factor, SoftmaxHead):
        return np.maximum(np.linalg.eigvalsh(_head(factor)), 0)
    values = np.maximum(_float64(factor.values), 0)
    if not isinstance(factor, LowRank):
        return values
    # With more columns than outputs the Gram matrix has zeros that the factor does not have.
    kept = np.sort(values)[:, ::-1][:, :size]
    return np.pad(kept, ((0, 0), (0, size - kept.shape[1])))


def _head(head: SoftmaxHead) -> np.ndarray:
    mean, columns = _float64(head.mean), _float64(head.columns)
    outer = mean[:, :, None] * mean[:, None, :] + columns @ columns.swapaxes(1, 2)
    return np.eye(mean.shape[1]) * mean[:, :, None] - outer


def _tied(found: BlockFactors) -> np.ndarray:
    """``A (x) G + diag(rows) (x) I``: for each eigenvalue of ``A`` those of ``a G + diag(rows)``."""
    rows, G = _float64(found.rows), found.G
    if isinstance(G, SoftmaxHead):
        dense = _head(G)
    elif isinstance(G, LowRank):
        columns = _float64(G.columns)
        dense = columns @ columns.swapaxes(1, 2)
    else:
        assert isinstance(G, Eigen)
        dense = (_float64(G.vectors) * _float64(G.values)[:, None, :]) @ _float64(G.vectors).swapaxes(1, 2)
    assert found.A is not None
    embedding = np.diag(rows.ravel())
    return np.concatenate([np.linalg.eigvalsh(a * dense[0] + embedding) for a in _float64(found.A.values)[0]])


def _by_lanczos(block: Block, found: BlockFactors, k: int, key: Any) -> BlockEigenvalues:
    if key is None:
        raise ValueError(
            f"the eigenvalues of {block.path}, a {block.kind} block of {block.units} outputs, have no closed form "
            "and are left to Lanczos: pass key=jax.random.key(0)"
        )
    dimension, width = _dimension(block), block.width + (block.bias is not None)
    assert found.A is not None
    like = jax.ShapeDtypeStruct((block.number, block.units, width), found.A.values.dtype)
    steps = min(dimension, max(40, 2 * k))
    seen = lanczos(Partial(block_product, found), like, num_steps=steps, num_eigenvalues=k, key=key)
    head = found.G
    assert head is not None
    if isinstance(head, SoftmaxHead):
        mean = _float64(head.mean)
        trace_g = (mean * (1 - mean)).sum(1) - (_float64(head.columns) ** 2).sum((1, 2))
    else:
        trace_g = _float64(head.values).sum(1)
    total = float(np.sum(_float64(found.A.values).sum(1) * trace_g))
    total += 0.0 if found.rows is None else width * float(_float64(found.rows).sum())
    return BlockEigenvalues(block.kind, seen.eigenvalues, seen.residuals, dimension, -1, total)


def _nonzero(values: np.ndarray, like: Any) -> np.ndarray:
    """Above the rounding of an eigendecomposition in the dtype of ``like``, for each row."""
    eps = float(jnp.finfo(wide_dtype(like.dtype)).eps)
    return values > values.shape[1] * eps * values.max(1, keepdims=True)


def _float64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)

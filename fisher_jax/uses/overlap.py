"""Two tasks side by side: do they use the same parameters, and do they pull them apart?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fisher_jax._support.dtypes import wide
from fisher_jax._support.outline import outline
from fisher_jax.uses import reading
from fisher_jax.uses.group_sums import per_parameter
from fisher_jax.uses.trees import check_alike, check_not_negative

Tree = Any


class Overlap(NamedTuple):
    """How much two Fishers look alike, over all ``N`` entries of their trees.

    Attributes:
        fisher_overlap: ``sum_i sqrt(a_i b_i)`` of the Fishers normalised to sum 1: ``1 - d**2`` with ``d`` the
            Frechet distance of Kirkpatrick et al.
        cosine: ``sum_i a_i b_i / (|a| |b|)``.
        jaccard: shared entries of the two top sets over the entries of either.
        shared: their number.
        expected: what independent rankings would share on average, ``|A| |B| / N``.
        p: the chance that independent rankings share as many or more.
        sizes: ``(|A|, |B|, N)``.
    """

    fisher_overlap: float
    cosine: float
    jaccard: float
    shared: int
    expected: float
    p: float
    sizes: tuple[int, int, int]

    def __repr__(self) -> str:
        return outline(self)


class Conflict(NamedTuple):
    """How two directions meet where it matters; scalars, at least float32.

    Attributes:
        cosine: ``sum w x y / sqrt(sum w x**2 sum w y**2)``: -1 opposed, 0 unrelated, 1 agreed.
        opposed: the share of ``sum w |x y|`` at coordinates where the signs differ, in [0, 1].
    """

    cosine: Float[Array, ""]
    opposed: Float[Array, ""]

    def __repr__(self) -> str:
        return outline(self)


def overlap(a: Any, b: Any, top_fraction: float = 0.1) -> Overlap:
    """Overlap of two tasks: of their Fishers as a whole, and of the entries that matter most to each.

    The top set of a task is its ``round(top_fraction * N)`` largest entries (at least one). Entries that are tied
    with the first one left out are left out too, so that no order of entries decides, and zeros never belong to it.

    ``p`` is exact, without permutations: under the null that one task's ranking is a uniformly random permutation
    with respect to the other's, ``shared`` is hypergeometric, and ``p = P(X >= shared)``. It is discrete: the chance
    of ``p <= x`` is at most ``x``. Entries of one row or layer are no random permutation (rows that are large in
    anything are so in both tasks); compare groups, or a tensor at a time, where that is not the question.

    Args:
        a, b: trees of the same shapes; or Welford states, moments or moving averages, whose means are taken.
        top_fraction: in (0, 1].

    Returns:
        `Overlap` of Python numbers, computed in float64 on the host. With itself a Fisher has overlap, cosine and
        Jaccard index 1; disjoint ones have 0; a Fisher of zeros has NaN, and so has the Jaccard index where ties
        leave both sets empty.

    Raises:
        ValueError: trees or shapes that differ, a negative Fisher, a fraction outside (0, 1].

    See Kirkpatrick et al. (2017), supplementary 4.3.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> found = fj.overlap(jnp.array([4.0, 3.0, 1.0, 0.0]), jnp.array([4.0, 0.0, 1.0, 3.0]), top_fraction=0.5)
        >>> found.shared, found.expected, round(found.jaccard, 3), round(found.p, 3), found.sizes
        (1, 1.0, 0.333, 0.833, (2, 2, 4))
    """
    if not 0 < top_fraction <= 1:
        raise ValueError(f"top_fraction is a share in (0, 1], found {top_fraction}")
    a, b = reading.mean(a), reading.mean(b)
    check_alike(a, b, "the first Fisher", "the second Fisher")
    check_not_negative(a, "the first Fisher")
    check_not_negative(b, "the second Fisher")
    x, y = (np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(t)]) for t in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        # In units of the largest, whose square neither overflows nor vanishes; same inputs give exactly 1.
        x, y = x / x.max(initial=0), y / y.max(initial=0)
        # A root of a product, so that a Fisher with itself is its own sum.
        whole = np.sqrt(x * y).sum() / np.sqrt(x.sum() * y.sum())
        cosine = np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y))
    number = max(1, round(top_fraction * x.size))
    tops = [_top(z, number) for z in (x, y)]
    shared = int(np.count_nonzero(tops[0] & tops[1]))
    one, two = (int(np.count_nonzero(top)) for top in tops)
    either = one + two - shared
    return Overlap(
        float(min(whole, 1.0)), float(min(cosine, 1.0)), shared / either if either else float("nan"), shared,
        one * two / x.size, _chance(shared, one, two, x.size), (one, two, x.size),
    )  # fmt: skip


def _top(values: np.ndarray, number: int) -> np.ndarray:
    """The largest ``number`` entries, without those that are tied with the next."""
    if number >= values.size:
        return values > 0
    next_one = -np.partition(-values, number)[number]
    return values > max(next_one, 0.0)


def _chance(shared: int, one: int, two: int, number: int) -> float:
    import scipy.stats  # slow to import

    return float(min(scipy.stats.hypergeom.sf(shared - 1, number, one, two), 1.0)) if shared else 1.0


def conflict(x: Tree, y: Tree, fisher: Any = None, other: Any = None) -> Conflict:
    """Whether two directions (gradients, task vectors) agree or pull against each other, weighted by importance.

    With weights ``w``: ``cosine = <x, y>_w / (|x|_w |y|_w)`` with ``<x, y>_w = sum_i w_i x_i y_i``, and ``opposed``
    the share of ``sum_i w_i |x_i y_i|`` where signs differ; ``opposed`` can be large where the cosine is near 0.

    Args:
        x, y: trees of the same shapes.
        fisher: ``w = F``: a tree like ``x``, of its shapes or of sums over groups, or a state (`fj.mean`). ``None``:
            ``w = 1``.
        other: the same of the second task: ``w = sqrt(F_x F_y)``, which counts what matters to both.

    Returns:
        `Conflict`; NaN where a direction has no weight. Works under ``jit``.

    Raises:
        ValueError: trees or shapes that differ, a negative Fisher, ``other`` alone.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> x, y = jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])
        >>> found = fj.shift.conflict(x, y, jnp.array([1.0, 3.0]))
        >>> float(found.cosine), float(found.opposed)
        (-0.5, 0.75)
    """
    check_alike(x, y, "the first direction", "the second direction")
    weights = _weights(x, fisher, other)
    xy, xx, yy, size, against = (jnp.zeros(()) for _ in range(5))
    for p, q, w in zip(*map(jax.tree.leaves, (x, y, weights)), strict=True):
        p, q = wide(p), wide(q)
        products = w * p * q
        xy, size = xy + jnp.sum(products), size + jnp.sum(jnp.abs(products))
        xx, yy = xx + jnp.sum(w * p * p), yy + jnp.sum(w * q * q)
        against = against + jnp.sum(jnp.where(products < 0, -products, 0))
    return Conflict(xy / (jnp.sqrt(xx) * jnp.sqrt(yy)), against / size)


def _weights(x: Tree, fisher: Any, other: Any) -> Tree:
    if fisher is None:
        if other is not None:
            raise ValueError("other= is the Fisher of the second task: give that of the first as fisher=")
        return jax.tree.map(lambda _: jnp.ones(()), x)
    one = _per_parameter(fisher, x)
    return (
        one if other is None else jax.tree.map(lambda f, g: jnp.sqrt(f) * jnp.sqrt(g), one, _per_parameter(other, x))
    )


def _per_parameter(fisher: Any, x: Tree) -> Tree:
    values = reading.mean(fisher)
    check_not_negative(values, "the Fisher")
    return per_parameter(values, x)

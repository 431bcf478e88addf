"""`spectral_density`: how the eigenvalues of an operator are distributed, by stochastic Lanczos quadrature."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special
from jaxtyping import Array, Float64, Key

from fisher_jax._support.outline import outline
from fisher_jax.spectra.krylov import basis_passes, process
from fisher_jax.spectra.krylov.layout import layout_of, product, random_vector

Tree = Any
Cells = Float64[np.ndarray, " cells"]
Edges = Float64[np.ndarray, " cells+1"]


class Density(NamedTuple):
    """What `spectral_density` found. float64 numpy.

    ``density[i]`` is the mean density over the cell ``edges[i] .. edges[i + 1]`` around ``grid[i]``, per unit of
    eigenvalue; ``sum(density * diff(edges)) = 1``. The nodes carry weight ``weights`` each (1 in total per probe;
    entries beyond a probe's last node have weight 0) and are not broadened: a spike stays a spike.
    """

    grid: Cells
    density: Cells
    standard_error: Cells  # over the probes; NaN with one probe
    cumulative: Cells  # share of the eigenvalues up to edges[i + 1]
    cumulative_error: Cells
    edges: Edges
    width: float  # standard deviation of the Gaussian that replaces each node
    nodes: Float64[np.ndarray, "probes steps"]
    weights: Float64[np.ndarray, "probes steps"]
    mean: float  # trace / dimension, by the same quadrature
    mean_error: float
    num_products: int
    dimension: int

    def __repr__(self) -> str:
        return outline(self)

    def on_log_axis(self, floor: float, num_points: int = 200, width: float = 0.1) -> "LogDensity":
        """Density over ``log10 |eigenvalue|``, from nodes and weights: a spike at zero does not hide the rest.

        Args:
            floor: eigenvalues of smaller size count as zero.
            num_points: cells between ``floor`` and the largest node.
            width: standard deviation of the broadening, in decades.

        Example:
            >>> import fisher_jax as fj, jax, jax.numpy as jnp
            >>> matvec = lambda v: v * jnp.array([100.0, 0.0, 0.0, -1.0])
            >>> found = fj.spectral_density(matvec, jnp.zeros(4), num_steps=4, num_probes=3, key=jax.random.key(0))
            >>> log = found.on_log_axis(floor=1e-3)
            >>> round(log.zero, 3), round(float((log.negative * jnp.diff(log.edges)).sum()), 3)
            (0.5, 0.25)
        """
        sizes = np.abs(self.nodes)
        top = max(float(sizes.max()), 10 * floor)
        edges = np.linspace(math.log10(floor) - 6 * width, math.log10(top) + 6 * width, num_points + 1)
        logs = np.log10(np.maximum(sizes, floor))

        def part(chosen):
            return np.mean(_cells(logs, self.weights * chosen, edges, width), axis=0) / np.diff(edges)

        nonzero, zero = sizes >= floor, float(np.mean(np.sum(self.weights * (sizes < floor), axis=1)))
        grid = (edges[1:] + edges[:-1]) / 2
        return LogDensity(grid, part(nonzero & (self.nodes > 0)), part(nonzero & (self.nodes < 0)), zero, edges)


class LogDensity(NamedTuple):
    """Shares of the eigenvalues: ``positive`` and ``negative`` per decade over ``grid = log10 |eigenvalue|``.

    ``sum((positive + negative) * diff(edges)) + zero = 1``.
    """

    grid: Cells
    positive: Cells
    negative: Cells
    zero: float
    edges: Edges

    def __repr__(self) -> str:
        return outline(self)


def spectral_density(
    matvec: Callable[[Tree], Tree],
    like: Tree,
    *,
    num_steps: int,
    num_probes: int,
    key: Key[Array, ""],
    width: float | None = None,
    num_points: int = 500,
    matvec_dtype: Any = None,
    storage: str = "auto",
    basis_dtype: Any = None,
    jit: bool = True,
) -> Density:
    """Density of the eigenvalues of a symmetric operator: ``(1/n) sum_i delta(x - lambda_i)``, broadened.

    Stochastic Lanczos quadrature (Lin, Saad and Yang 2016, 3.2.1; Golub and Meurant 2010): for each random vector of
    signs the Lanczos process gives nodes ``theta_k`` and weights ``s_1k**2``, a Gauss quadrature that is exact for
    polynomials of degree ``2 num_steps - 1``; the mean over probes is unbiased for the trace of such functions, and
    its standard error is that of the mean over probes. Each node becomes a Gaussian of standard deviation ``width``.
    Normalised to 1 over all eigenvalues. Takes ``num_steps * num_probes`` products, and
    one more where noise must be measured.

    Args:
        matvec, like, matvec_dtype, storage, basis_dtype, jit: see `fj.lanczos`.
        num_steps: products per probe; a probe ends early where its Krylov space is exhausted, and is then exact.
        num_probes: random vectors. Standard errors need two.
        key: of the probes.
        width: of the broadening, in units of the eigenvalues. ``None``: a hundredth of the range of the nodes.
        num_points: cells of the grid, which reaches 6 widths beyond the outermost nodes.

    Raises:
        ValueError: as `fj.lanczos`; fewer than one step or probe.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> matvec = jax.tree_util.Partial(lambda d, v: d * v, jnp.array([4.0, 1.0, 1.0, 1.0]))
        >>> found = fj.spectral_density(matvec, jnp.zeros(4), num_steps=4, num_probes=2, key=jax.random.key(0))
        >>> below = found.cumulative[found.edges[1:] < 2.5][-1]
        >>> round(float(below), 3), round(float((found.density * jnp.diff(found.edges)).sum()), 3)
        (0.75, 1.0)
    """
    layout = layout_of(like)
    host = basis_passes.on_host(storage, layout)
    if num_steps < 1 or num_probes < 1:
        raise ValueError(f"num_steps and num_probes are at least 1, found {num_steps} and {num_probes}")
    if width is not None and not width > 0:
        raise ValueError(f"width is positive, found {width}")
    apply, rules = (
        product(matvec, layout, jit),
        process.rules_for(layout, matvec_dtype, basis_dtype)._replace(go_on=False),
    )
    rows = min(num_steps, layout.size)
    basis = basis_passes.allocate(layout, rows, basis_dtype, host)
    nodes, weights, products = np.zeros((num_probes, rows)), np.zeros((num_probes, rows)), 0
    noise = -1.0  # measured once
    for probe in range(num_probes):
        key_of_probe = jax.random.fold_in(key, probe)
        state = process.start(basis, key_of_probe, random_vector(key_of_probe, layout, "signs"))
        state = state._replace(noise=noise)
        while state.size < rows and state.beta > 0 and not state.null:
            state = process.step(state, apply, rules)
        values, vectors, _ = process.ritz(state)
        nodes[probe, : len(values)], weights[probe, : len(values)] = values, vectors[0] ** 2
        nodes[probe, len(values) :] = values[-1]
        basis, noise, products = state.basis, state.noise, products + state.products
    return _density(nodes, weights, width, num_points, products, layout.size)


def _density(nodes, weights, width, num_points: int, products: int, dimension: int) -> Density:
    low, high = float(nodes.min()), float(nodes.max())
    width = width or max((high - low) / 100, abs(high) * 1e-3, abs(low) * 1e-3) or 1.0
    edges = np.linspace(low - 6 * width, high + 6 * width, num_points + 1)
    mass = _cells(nodes, weights, edges, width)
    per_probe = mass / np.diff(edges)
    cumulative = np.cumsum(mass, axis=1)
    means = np.sum(nodes * weights, axis=1)
    return Density(
        grid=(edges[1:] + edges[:-1]) / 2,
        density=per_probe.mean(0),
        standard_error=standard_error(per_probe),
        cumulative=cumulative.mean(0),
        cumulative_error=standard_error(cumulative),
        edges=edges,
        width=width,
        nodes=nodes,
        weights=weights,
        mean=float(means.mean()),
        mean_error=float(standard_error(means)),
        num_products=products,
        dimension=dimension,
    )


def standard_error(values: np.ndarray) -> Any:
    """Of the mean over the leading axis; NaN for fewer than two."""
    n = len(values)
    return np.std(values, axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.full(values.shape[1:], np.nan)


def _cells(nodes: np.ndarray, weights: np.ndarray, edges: np.ndarray, width: float) -> np.ndarray:
    """Mass of the Gaussians in each cell, ``[probes, cells]``: exact, however narrow they are."""
    out = []
    for x, w in zip(nodes, weights, strict=True):
        below = scipy.special.ndtr((edges[:, None] - x) / width)
        out.append(np.diff(below @ w))
    return np.stack(out)

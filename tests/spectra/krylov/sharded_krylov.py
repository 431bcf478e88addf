"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_jax as fj
from fisher_jax.spectra.krylov import spectrum as spectrum_room

MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {"kernel": P("data", "model"), "rows": P(("data", "model")), "whole": P()}
ROWS = 12  # of every basis, so that every pass is compiled once
SHAPES = {"kernel": (8, 6), "rows": (16,), "whole": (3,)}


def params():
    return {k: jnp.zeros(s) for k, s in SHAPES.items()}


def product(scales, v):
    """A diagonal and, between all leaves, a sum of three rank-one parts: symmetric, and talks across devices."""
    diagonal, directions = scales
    out = jax.tree.map(jnp.multiply, diagonal, v)
    for direction in directions:
        part = sum(jax.tree.leaves(jax.tree.map(lambda u, x: jnp.sum(u * x), direction, v)))
        out = jax.tree.map(lambda o, u, part=part: o + part * u, out, direction)
    return out


def scales():
    rng = np.random.default_rng(0)

    def draw(scale):
        return {k: jnp.asarray(rng.standard_normal(s) * scale, jnp.float32) for k, s in SHAPES.items()}

    return jax.tree.map(jnp.abs, draw(1.0)), [draw(s) for s in (0.8, 0.5, 0.3)]


def everything(place):
    """``place`` puts a tree like the parameters on devices."""
    diagonal, directions = scales()
    matvec = jax.tree_util.Partial(product, (place(diagonal), [place(d) for d in directions]))
    like, options = place(params()), {"key": jax.random.key(3), "storage": "device"}
    plain = fj.lanczos(matvec, like, num_steps=ROWS, num_eigenvalues=3, which="both", eigenvectors=True, **options)
    short = fj.lanczos(matvec, like, num_steps=60, num_eigenvalues=5, max_basis=ROWS, tol=1e-4, **options)
    density = fj.spectral_density(matvec, like, num_steps=ROWS, num_probes=1, **options)
    found = {
        "plain": plain.eigenvalues,
        "bounds": plain.residuals,
        "restarted": short.eigenvalues,
        "density": density.density,
        "trace": [fj.spectra.trace(matvec, like, num_products=3 * ROWS, **options).value],
    }
    return {k: np.asarray(v).tolist() for k, v in found.items()}, plain, short.num_restarts


def on_mesh(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)

    def place(tree):
        return {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()}

    seen = []
    original = spectrum_room.process.step

    def watched(state, *rest):
        state = original(state, *rest)
        seen.extend(
            x.sharding.is_equivalent_to(NamedSharding(mesh, P(None, *SPECS[k])), x.ndim)
            for k, x in zip(sorted(SPECS), state.basis.leaves, strict=True)
        )
        return state

    spectrum_room.process.step = watched
    try:
        with jax.set_mesh(mesh):
            found, plain, _ = everything(place)
            seen, whole = seen[:], len(seen)
            placed = jax.tree_util.Partial(product, _placed_scales(place))
            options = {"num_steps": ROWS, "num_eigenvalues": 3, "which": "both", "key": jax.random.key(3)}
    finally:
        spectrum_room.process.step = original
    with jax.set_mesh(mesh):
        host = fj.lanczos(placed, place(params()), storage="host", **options)
    found["host"] = host.eigenvalues.tolist()
    found["steps"] = whole // len(SPECS)
    found["basis_sharded"] = all(seen)
    found["vectors_sharded"] = all(
        x.sharding.is_equivalent_to(NamedSharding(mesh, P(None, *SPECS[k])), x.ndim)
        for k, x in plain.eigenvectors.items()
    )
    return found


def _placed_scales(place):
    diagonal, directions = scales()
    return place(diagonal), [place(d) for d in directions]


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:  # a finding like any other: the test that reads it fails with these words
        return {"failed": f"{type(error).__name__}: {error}"[:1500]}


def main():
    assert jax.device_count() == 8
    found = {name: attempt(on_mesh, kind) for name, kind in MESHES.items()}
    one, _, restarts = everything(lambda tree: tree)
    size = sum(int(np.prod(s)) for s in SHAPES.values())
    diagonal, directions = scales()
    matrix = np.diag(flat(diagonal)) + sum(np.outer(flat(d), flat(d)) for d in directions)
    found["one"], found["restarts"] = one, restarts
    found["truth"] = np.linalg.eigvalsh(matrix).tolist()
    assert len(matrix) == size
    json.dump(found, sys.stdout)


def flat(tree):
    return np.concatenate([np.asarray(tree[k], np.float64).reshape(-1) for k in sorted(tree)])


if __name__ == "__main__":
    main()

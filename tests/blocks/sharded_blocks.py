"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_jax as fj

CASES = [("auto", "sequence"), ("explicit", "sequence"), ("explicit", "token")]
# On Explicit axes this plain model takes its parameters whole: nothing in it says where a product should lie.
MESHES = {
    "auto": (AxisType.Auto, {"a": P(None, "model"), "b": P("model"), "c": P("model", None)}),
    "explicit": (AxisType.Explicit, {"a": P(), "b": P(), "c": P()}),
}


def problem():
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 8), "b": (8,), "c": (8, 4)}
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    weights = jnp.asarray(rng.integers(0, 3, (8, 3)) * 0.5, jnp.float32)
    x, y = (
        jnp.asarray(rng.standard_normal((8, 3, 8)), jnp.float32),
        jnp.asarray(rng.integers(0, 4, (8, 3)), jnp.int32),
    )
    return params, fj.Batch(x, y, weights)


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]


def on_mesh(kind, specs, unit):
    params, batch = problem()
    wanted = fj.block_spectrum(apply_fn, fj.categorical, params, batch, unit=unit)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)
    batch = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), batch)
    with jax.set_mesh(mesh):
        found = fj.block_spectrum(apply_fn, fj.categorical, params, batch, unit=unit)
    errors = [np.abs(found[k].eigenvalues - x.eigenvalues).max() / x.eigenvalues[0] for k, x in wanted.items()]
    return {"error": float(max(errors)), "methods": [x.method for x in found.values()]}


def main():
    assert jax.device_count() == 8
    found = {f"{mesh} {unit}": on_mesh(*MESHES[mesh], unit) for mesh, unit in CASES}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

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


def laid_out():
    """What is said of an embedding whose rows are looked up into a place of the mesh; and the model without that."""
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in (("e", (6, 4)), ("h", (4, 3)))}
    batch = fj.Batch(jnp.asarray(rng.integers(0, 6, (8, 2))), jnp.asarray(rng.integers(0, 3, (8, 2))))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def model(out_sharding):
        return lambda p, x: jnp.tanh(p["e"].at[x].get(out_sharding=out_sharding)) @ p["h"]

    wanted = fj.block_spectrum(model(None), fj.categorical, params, batch)
    params = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), params)
    batch = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), batch)
    said = []
    with jax.set_mesh(mesh):
        stream = fj.spectra.block_spectra(model(P("data")), fj.categorical, max_scores=16)
        for run in (
            lambda: fj.block_spectrum(model(P("data")), fj.categorical, params, batch, unit="sequence"),
            lambda: fj.block_spectrum(model(P("data", None, "model")), fj.categorical, params, batch),
            lambda: stream.update(stream.init(params), params, batch),
        ):
            try:
                run()
            except ValueError as error:
                said.append(str(error))
        found = fj.block_spectrum(model(None), fj.categorical, params, batch)
    errors = [np.abs(found[k].eigenvalues - x.eigenvalues).max() / x.eigenvalues[0] for k, x in wanted.items()]
    return {"error": float(max(errors)), "said": said}


def main():
    assert jax.device_count() == 8
    found = {f"{mesh} {unit}": on_mesh(*MESHES[mesh], unit) for mesh, unit in CASES}
    found["laid out"] = laid_out()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

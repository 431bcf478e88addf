"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_jax as fj

MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {
    "params": {"embed": P(None, "model"), "layers": {"up": P(None, None, "model"), "bias": P(None, "model"),
               "down": P(None, "model", None)}, "scale": P()},
    "x": P("data", None), "out": P("data", None, "model"),
}  # fmt: skip


def problem():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    params = {"embed": draw(8, 4), "layers": {"up": draw(2, 4, 8), "bias": draw(2, 8), "down": draw(2, 8, 4)},
              "scale": draw(4)}  # fmt: skip
    return params, jnp.asarray(rng.integers(0, 8, (4, 3)), jnp.int32)


def loss(p, tokens, place=lambda x, spec: x):
    """Places of results that Explicit axes ask for are given by ``place``."""
    x = place(p["embed"], P()).at[tokens].get(out_sharding=place(None, P("data")))

    @jax.checkpoint
    def layer(x, w):
        hidden = jnp.einsum("bsd,df->bsf", x, w["up"], out_sharding=place(None, P("data", None, "model")))
        down = jnp.tanh(hidden + w["bias"])
        return x + jnp.einsum("bsf,fd->bsd", down, w["down"], out_sharding=place(None, P("data"))), None

    x = jax.lax.scan(layer, x, p["layers"])[0] * (1 + p["scale"])
    logits = jnp.einsum("bsd,vd->bsv", x, place(p["embed"], P()), out_sharding=place(None, P("data")))
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2)


def squares(inputs, cotangents):
    return jnp.sum(cotangents**2)


def everything(place):
    def run(params, tokens):
        def placed(params, tokens):
            return loss(params, tokens, place)

        value, taps = fj.capture(placed)(params, tokens)
        reduced = [tap.reduced for tap in fj.capture(placed, reduce=squares)(params, tokens)[1]]
        return {"value": value, "rebuilt": fj.gradients_from_taps(taps, params), "reduced": reduced}

    return jax.jit(run)


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y))) / np.abs(np.asarray(y)).max()) for x, y in pairs)


def on_mesh(kind, wanted):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)

    def place(x, spec):
        if kind == AxisType.Auto:
            return x
        return spec if x is None else jax.reshard(x, spec)

    params, tokens = problem()
    params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, SPECS["params"])
    tokens = jax.device_put(tokens, NamedSharding(mesh, SPECS["x"]))
    with jax.set_mesh(mesh):
        found = everything(place)(params, tokens)
    return {key: distance(found[key], wanted[key]) for key in found}


def under_shard_map(wanted):
    """Each device captures its own rows; the parameters are the same on all."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    params, tokens = problem()

    def run(params, tokens):
        _, taps = fj.capture(loss)(params, tokens)
        varying = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), params)
        _, own = fj.capture(loss)(varying, tokens)
        return {
            "rebuilt": fj.gradients_from_taps(taps, params),
            "summed": jax.lax.psum(fj.gradients_from_taps(own, varying), "data"),
        }

    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(params, tokens)
    return {key: distance(found[key], wanted["rebuilt"]) for key in found}


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:  # a finding like any other: the test that reads it fails with these words
        return {"failed": f"{type(error).__name__}: {error}"[:1500]}


def main():
    assert jax.device_count() == 8
    params, tokens = problem()
    wanted = everything(lambda x, spec: x)(params, tokens)
    wanted["rebuilt"] = jax.jit(jax.grad(loss))(params, tokens)
    found = {name: attempt(on_mesh, kind, wanted) for name, kind in MESHES.items()}
    found["shard_map"] = attempt(under_shard_map, wanted)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

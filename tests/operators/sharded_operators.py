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
ALL_ONES = "all weights one"
SOLVED, SEVERAL = "solved", "several solved"
OPTIONS = {
    "plain": {}, "micro-batches": {"microbatch_size": 4}, "kept": {"keep_linearization": True}, ALL_ONES: {},
    SOLVED: {}, SEVERAL: {},
}  # fmt: skip
CASES = [
    ("ggn", "plain"), ("ggn", "micro-batches"), ("ggn", "kept"), ("empirical_fisher", "plain"), ("hessian", "plain"),
    ("hessian", "micro-batches"), ("ggn", ALL_ONES), ("empirical_fisher", ALL_ONES), ("hessian", ALL_ONES),
    ("ggn", SOLVED), ("ggn", SEVERAL),
]  # fmt: skip
SPECS = {
    "embed": P(None, "model"), "layers": {"up": P(None, None, "model"), "down": P(None, "model", None)}, "scale": P(),
}  # fmt: skip


def problem():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    params = {"embed": draw(8, 4), "layers": {"up": draw(2, 4, 8), "down": draw(2, 8, 4)}, "scale": draw(4)}
    tokens, weights = rng.integers(0, 8, (8, 3)), (rng.integers(0, 3, (8, 3)) * 0.5).astype(np.float32)
    return params, jnp.asarray(tokens, jnp.int32), jnp.asarray(weights)


def model(place):
    """Places of results that Explicit axes ask for are given by ``place``."""

    def apply_fn(p, tokens):
        x = place(p["embed"], P()).at[tokens].get(out_sharding=place(None, P("data")))

        def layer(x, w):
            hidden = jnp.einsum("bsd,df->bsf", x, w["up"], out_sharding=place(None, P("data", None, "model")))
            down = jnp.einsum("bsf,fd->bsd", jnp.tanh(hidden), w["down"], out_sharding=place(None, P("data")))
            return x + down, None

        x = jax.lax.scan(layer, x, p["layers"])[0] * (1 + p["scale"])
        return jnp.einsum("bsd,vd->bsv", x, place(p["embed"], P()), out_sharding=place(None, P("data")))

    return apply_fn


def products(apply_fn, params, tokens, weights, kind, options, lay=lambda x: x, solved=None):
    batch = fj.Batch(tokens, jnp.roll(tokens, -1, 1), weights)
    matvec = getattr(fj.operators, kind)(apply_fn, fj.categorical, params, batch, **options)
    v = jax.tree.map(lambda x: lay(jnp.cos(x)), params)
    like = jax.tree.map(jnp.cos, params)
    if solved == SOLVED:
        return fj.solve(matvec, like, damping=1.0, rtol=1e-6).x
    if solved == SEVERAL:
        both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), like)
        found = fj.solve(matvec, both, damping=1.0, rtol=1e-6, several=True).x
        return jax.tree.map(lambda x: x[1] - x[0], found)
    return jax.jit(lambda matvec, v: matvec(v))(matvec, v)


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y))) / np.abs(np.asarray(y)).max()) for x, y in pairs)


def on_mesh(kind, wanted, name, option):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)

    def place(x, spec):
        if kind == AxisType.Auto:
            return x
        return spec if x is None else jax.reshard(x, spec)

    params, tokens, weights = problem()
    options = OPTIONS[option]
    params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, SPECS)
    tokens, weights = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (tokens, weights))
    weights = None if option == ALL_ONES else weights
    with jax.set_mesh(mesh):
        # With automatic axes the vector may lie anywhere; its place must not become that of the product.
        lay = (lambda x: jax.device_put(x, NamedSharding(mesh, P()))) if kind == AxisType.Auto else lambda x: x
        found = products(model(place), params, tokens, weights, name, options, lay, option)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True)
    placed = all(x.sharding.is_equivalent_to(p.sharding, p.ndim) for x, p in leaves)
    return {"error": distance(found, wanted), "placed": placed}


def kind_of(option):
    """What has a result of its own."""
    return option if option in (ALL_ONES, SOLVED, SEVERAL) else "plain"


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:  # a finding like any other: the test that reads it fails with these words
        return {"failed": f"{type(error).__name__}: {error}"[:1500]}


def main():
    assert jax.device_count() == 8
    found = {}
    params, tokens, weights = problem()
    wanted = {
        (name, kind): products(
            model(lambda x, spec: x), params, tokens, None if kind == ALL_ONES else weights, name, {}, solved=kind
        )
        for name, kind in {(name, kind_of(option)) for name, option in CASES}
    }
    for name, option in CASES:
        for mesh, kind in MESHES.items():
            key = f"{mesh} {name} {option}"
            found[key] = attempt(on_mesh, kind, wanted[name, kind_of(option)], name, option)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_jax as fj
from tests.compiled import work_of

ROWS, LENGTH, WIDTH, VOCABULARY = 16, 4, 8, 24
MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
CASES = {
    "sequence, sequence, row": "both",
    "sequence, document, param": "both",
    "sequence, batch, param": "auto",
    "signs, sequence, param": "both",
    "signs, document, column": "auto",
    "sampled, sequence, row": "auto",
    "exact, token, row": "both",
    "exact, document, param": "auto",
    "head, token, row": "auto",
    "head, token, param": "both",
    "head, sequence, column": "auto",
    "head, sequence, param": "auto",
    "head, document, row": "explicit",
}


def problem():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    params = {"embed": draw(VOCABULARY, WIDTH), "mix": draw(WIDTH, WIDTH), "head": draw(VOCABULARY, WIDTH)}
    inputs, targets = (jnp.asarray(rng.integers(0, VOCABULARY, (ROWS, LENGTH)), jnp.int32) for _ in range(2))
    weights = jnp.asarray(rng.integers(0, 4, (ROWS, LENGTH)) * 0.5, jnp.float32)
    # Some documents go through several devices, some end where a device's rows end.
    units = jnp.asarray([0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 6], jnp.int32)
    return params, fj.Batch(inputs, targets, weights, units=units)


def apply_fn(p, x):
    x = p["embed"].at[x].get(out_sharding=jax.typeof(x).sharding if explicit(x) else None)
    return jnp.tanh(x @ p["mix"]) @ p["head"].T


def in_groups(p, x):
    """Tokens go through one of two kernels, by an operation that ``jax.vmap`` does not know."""
    x = p["embed"][x]
    kernels = jnp.stack([p["mix"], 2 * p["mix"]])
    half = jnp.full(2, x.shape[0] * x.shape[1] // 2, jnp.int32)
    return jax.lax.ragged_dot(x.reshape(-1, WIDTH), kernels, half).reshape(x.shape) @ p["head"].T


def interacting(p, x):
    """Rows of the batch depend on each other."""
    x = p["embed"][x]
    return jnp.tanh((x - x.mean(0)) @ p["mix"]) @ p["head"].T


def explicit(x):
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def on_mesh(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params, batch = problem()
    everywhere, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    return mesh, (jax.device_put(params, everywhere), jax.device_put(batch, by_row))


MODELS = {"in groups": in_groups, "interacting": interacting}
# Those that devices cannot divide have the numbers of one device all the same.
WHOLE = {"sequence, sequence, param": "in groups", "exact, token, row": "interacting"}


def compiled(case, arguments, model=apply_fn):
    """The compiled observation of a batch by an estimator that has seen no array."""
    estimator, unit, groups = case.split(", ")
    independent = True if model is in_groups else None
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), problem()[1])
    fisher = fj.group_fisher(
        model, example=like, estimator=estimator, unit=unit, groups=groups, rows_independent=independent
    )
    return jax.jit(lambda p, b: fisher.observe(p, b, jax.random.key(0))).lower(*arguments).compile()


def read(found):
    found = jax.device_get(found)
    statistics = fj.welford.mean(found), fj.welford.standard_error(found)
    exact = fj.welford.count(found), fj.welford.total_weight(found), found.rejected
    return jax.device_get(statistics), [float(x) for x in exact]


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y), initial=0) / np.abs(y).max()) for x, y in pairs)


def compared(case, mesh, arguments, alone, wanted, model=apply_fn):
    """Work and numbers on a mesh beside those of one device."""
    with jax.set_mesh(mesh):
        there = compiled(case, arguments, model)
        statistics, counts = read(there(*arguments))
    one, eight = work_of(alone.as_text()), work_of(there.as_text())
    size = sum(x.nbytes for x in jax.tree.leaves(alone(*problem())))
    return {
        "dots": eight.dots / one.dots,
        "moved": eight.bytes_moved / size,
        "distance": distance(statistics, wanted[0]),
        "counts": counts == wanted[1],
    }


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:  # a finding like any other: the test that reads it fails with these words
        return {"failed": f"{type(error).__name__}: {error}"[:1500]}


def main():
    assert jax.device_count() == 8
    meshes = {name: on_mesh(kind) for name, kind in MESHES.items()}
    found = {}
    for case, where in CASES.items():
        alone = compiled(case, problem())
        wanted = read(alone(*problem()))
        for name, (mesh, arguments) in meshes.items():
            if where in (name, "both"):
                found[f"{name}: {case}"] = attempt(compared, case, mesh, arguments, alone, wanted)
    for case, model in WHOLE.items():
        alone = compiled(case, problem(), MODELS[model])
        wanted = read(alone(*problem()))
        found[model] = attempt(compared, case, *meshes["auto"], alone, wanted, MODELS[model])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

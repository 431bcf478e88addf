"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import json
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_jax as fj

MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {"mix": P(None, "model"), "layers": {"up": P(None, None, "model"), "down": P(None, "model", None)},
         "head": P("model", None)}  # fmt: skip
ESTIMATORS = {
    "exact": {"estimator": "exact"},
    "signs": {"estimator": "signs"},
    "signs by row": {"estimator": "signs", "unit": "sequence", "groups": "row"},
    "sequence": {"estimator": "sequence", "chunk_size": 1},
}
ON = {"auto": ("exact", "signs by row"), "explicit": tuple(ESTIMATORS)}


def problem():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    params = {"mix": draw(4, 8), "layers": {"up": draw(2, 8, 16), "down": draw(2, 16, 8)}, "head": draw(16, 8)}
    weights = jnp.asarray(rng.integers(0, 3, (8, 3)) * 0.5, jnp.float32)
    return params, fj.Batch(draw(8, 3, 4), jnp.asarray(rng.integers(0, 16, (8, 3)), jnp.int32), weights)


def model(placed):
    """Places of results that Explicit axes ask for are given where ``placed``."""

    def out(*axes):
        return {"out_sharding": P(*axes)} if placed else {}

    def apply_fn(p, x):
        rows = jax.typeof(x).sharding.spec[0] if placed else None
        x = jnp.einsum("bsd,df->bsf", x, p["mix"], **out(rows))

        def layer(x, w):
            hidden = jnp.tanh(jnp.einsum("bsd,df->bsf", x, w["up"], **out(rows, None, "model")))
            return x + jnp.einsum("bsf,fd->bsd", hidden, w["down"], **out(rows)), None

        x = jax.lax.scan(layer, x, p["layers"])[0]
        return jnp.einsum("bsd,vd->bsv", x, p["head"], **out(rows))

    return apply_fn


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0) / max(np.abs(np.asarray(y)).max(), 1e-9))
        for x, y in pairs
    )


def answers(state):
    """Read on one device, so that all cases share what is compiled."""
    state = jax.device_get(state)
    return fj.welford.mean(state), fj.welford.standard_error(state), fj.welford.weight(state)


def two_updates(fisher, params, batch):
    """A state after two jitted updates, the second of which must not compile anew."""
    update = jax.jit(fisher.update, donate_argnums=0)
    key = jax.random.key(0)
    state = update(fisher.init(params), params, batch, key)
    state = update(state, params, batch, key)
    before = update._cache_size()
    state = update(state, params, batch, key)
    return state, update._cache_size() == before


def kept(state, params):
    """Whether every entry's mean lies as its parameter does."""
    return all(
        tuple(x.sharding.spec)[1:] == tuple(p.sharding.spec) + (None,) * (p.ndim - len(p.sharding.spec))
        or x.sharding.is_equivalent_to(NamedSharding(p.sharding.mesh, P(None, *p.sharding.spec)), x.ndim)
        for x, p in zip(jax.tree.leaves(state.mean), jax.tree.leaves(params), strict=True)
    )


def on_mesh(kind, names, wanted):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    params, batch = problem()
    params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, SPECS)
    batch = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), batch)
    found = {}
    for name in names:
        options = ESTIMATORS[name]
        fisher = fj.group_fisher(model(kind == AxisType.Explicit), example=batch, **options)
        found[name] = attempt(measured, mesh, fisher, params, batch, wanted[name], "groups" not in options)
    return found


def measured(mesh, fisher, params, batch, wanted, by_entry):
    with jax.set_mesh(mesh):
        state, stable = two_updates(fisher, params, batch)
    result = {"distance": distance(answers(state), wanted), "stable": stable}
    if by_entry:
        result["kept"] = kept(state, params)
        if mesh.axis_types[0] == AxisType.Auto:
            result["restored"] = restored(state, fisher, wanted)
    return result


def restored(state, fisher, wanted):
    """A checkpoint of a state on one mesh, restored onto another."""
    mesh = jax.make_mesh((1, 8), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    other = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), problem()[0], SPECS)
    with tempfile.TemporaryDirectory() as folder:
        fj.checkpoint.save(f"{folder}/state", state)
        like = fisher.init(other)
        back = fj.checkpoint.restore(f"{folder}/state", like=like)
    same = all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(like), strict=True))
    return {"distance": distance(answers(back), wanted), "kept": same}


def under_shard_map(wanted):
    """Each device observes its own rows; its moments are merged by gathering states."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    params, batch = problem()
    fisher = fj.group_fisher(model(False), **ESTIMATORS["exact"])

    def run(params, batch):
        empty = fisher.init(params)
        state = jax.lax.fori_loop(0, 3, lambda _, state: fisher.update(state, params, batch), empty)
        every = jax.lax.all_gather(state, "data")
        return jax.lax.scan(lambda merged, part: (fj.welford.merge(merged, part), None), empty, every)[0]

    run = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    return {"distance": distance(answers(jax.jit(run)(params, batch)), wanted["exact"])}


def in_a_training_step(wanted):
    """Parameters sharded, the state in the optimizer's, under ``jit`` with donation."""
    del wanted
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, batch = problem()
    fisher = fj.group_fisher(model(False), estimator="sequence", groups="row", example=batch)
    tx = optax.chain(fj.track_fisher(fisher), optax.adamw(1e-2))

    def step(params, state, batch):
        def loss(p):
            log_p = fj.categorical.log_prob(model(False)(p, batch.inputs), batch.targets)
            return -jnp.sum(log_p * batch.weights) / batch.weights.sum()

        updates, state = tx.update(jax.grad(loss)(params), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    def train(params):
        run, state = jax.jit(step, donate_argnums=(0, 1)), tx.init(params)
        compiled = []
        for _ in range(4):
            params, state = run(params, state, batch)
            compiled.append(run._cache_size())
        return fj.welford.mean(state[0]), compiled

    alone, _ = train(jax.tree.map(jnp.copy, params))
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, SPECS)
    found, compiled = train(placed)
    return {"distance": distance(found, alone), "stable": compiled[-1] == compiled[1], "n": compiled}


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:  # a finding like any other: the test that reads it fails with these words
        return {"failed": f"{type(error).__name__}: {error}"[:1500]}


def main():
    assert jax.device_count() == 8
    params, batch = problem()
    wanted = {}
    for name, options in ESTIMATORS.items():
        fisher = fj.group_fisher(model(False), example=batch, **options)
        wanted[name] = answers(two_updates(fisher, params, batch)[0])
    found = {
        f"{mesh}, {name}": result
        for mesh, kind in MESHES.items()
        for name, result in on_mesh(kind, ON[mesh], wanted).items()
    }
    found["restored"] = found["auto, exact"].get("restored", found["auto, exact"])
    found["shard_map"] = attempt(under_shard_map, wanted)
    found["training"] = attempt(in_a_training_step, wanted)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

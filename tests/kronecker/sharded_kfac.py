"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_jax as fj

V, D, B, S = 16, 4, 8, 3
EVERYWHERE = {"embed": P(), "w": P(), "b": P(), "head": P()}
BY_VOCABULARY = EVERYWHERE | {"head": P(None, "vocab")}
LAYOUTS = {
    "vocabulary": ((1, 8), BY_VOCABULARY, P()),
    "tokens": ((8, 1), EVERYWHERE, P("data")),
    "both": ((2, 4), BY_VOCABULARY, P("data")),
}


def problem():
    rng = np.random.default_rng(0)
    shapes = {"embed": (V, D), "w": (D, D), "b": (D,), "head": (D, V)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    mask = np.ones((B, S + 1), int)
    mask[3], mask[5, 2:] = 0, 0  # devices with fewer tokens, one with none
    return params, fj.next_token_batch(jnp.asarray(rng.integers(0, V, size=(B, S + 1))), jnp.asarray(mask))


def model(params, tokens, rows=None):
    """``rows``: where Explicit axes want the looked-up rows to lie."""
    x = params["embed"][tokens] if rows is None else params["embed"].at[tokens].get(out_sharding=rows)
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["head"]


def diagonal(explicit):
    # Looked up with out_sharding= an embedding is generic to capture.
    return (lambda path: path == "['embed']") if explicit else None


def tree_for(params):
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)


def worst(found, wanted):
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    )


def one_device(explicit, fisher):
    params, batch = problem()

    @jax.jit
    def run(params, batch):
        factors = fj.kfac_factors(
            model, params, batch, policy="all", damping=0.1, fisher=fisher, key=jax.random.key(0),
            diagonal=diagonal(explicit),
        )  # fmt: skip
        return fj.precondition(factors, tree_for(params))

    return run(params, batch)


def sharded(kind, layout):
    shape, param_specs, batch_spec = LAYOUTS[layout]
    explicit = kind == AxisType.Explicit
    mesh = jax.make_mesh(shape, ("data", "vocab"), axis_types=(kind,) * 2)
    params, batch = problem()
    wanted = one_device(explicit, "empirical")
    with jax.set_mesh(mesh):
        params = {k: jax.device_put(x, NamedSharding(mesh, param_specs[k])) for k, x in params.items()}
        batch = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, batch_spec)), batch)
        apply_fn = functools.partial(model, rows=batch_spec) if explicit else model
        tx = fj.scale_by_kfac(
            apply_fn, example=batch, policy="all", damping=0.1, update_freq=1, diagonal=diagonal(explicit)
        )
        grads = {k: jax.device_put(x, NamedSharding(mesh, param_specs[k])) for k, x in tree_for(params).items()}
        state = jax.jit(tx.init)(params)
        update = jax.jit(tx.update)
        seen = []
        for _ in range(3):
            updates, state = update(grads, state, params, batch=batch)
            seen.append([x.sharding for x in jax.tree.leaves((updates, state))])
        columns = [b.G.columns for b, leaf in zip(state.blocks, range(9), strict=False) if b.G is not None]
        (head,) = [x for x in columns if x.shape[1] == V]
        stable = all(
            a.is_equivalent_to(b, x.ndim)
            for a, b, x in zip(*seen[1:], jax.tree.leaves((updates, state)), strict=True)
        )
        largest = max(s.data.shape[1] for s in head.addressable_shards)
    return {"error": worst(updates, wanted), "stable": stable, "rows_per_device": largest}


def under_shard_map(fisher):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, batch = problem()

    def run(params, batch):
        factors = fj.kfac_factors(
            model, params, batch, policy="all", damping=0.1, fisher=fisher, key=jax.random.key(0), axis_name="data"
        )
        return fj.precondition(factors, tree_for(params))

    # Gathered columns are equal on all devices, which the types of shard_map cannot say.
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    return worst(jax.jit(mapped)(params, batch), one_device(False, fisher))


def main():
    found = {}
    for name, kind in (("auto", AxisType.Auto), ("explicit", AxisType.Explicit)):
        for layout in LAYOUTS:
            found[f"{name} {layout}"] = sharded(kind, layout)
    found["shard_map"] = {"error": under_shard_map("empirical")}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import functools
import json
import pathlib
import sys
import tempfile

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


@functools.cache
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


def setting(kind, layout, fisher="empirical", update_freq=1):
    """A transformation and its arguments, on a mesh."""
    shape, param_specs, batch_spec = LAYOUTS[layout]
    explicit = kind == AxisType.Explicit
    mesh = jax.make_mesh(shape, ("data", "vocab"), axis_types=(kind,) * 2)
    params, batch = problem()
    with jax.set_mesh(mesh):
        params = {k: jax.device_put(x, NamedSharding(mesh, param_specs[k])) for k, x in params.items()}
        batch = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, batch_spec)), batch)
        grads = {k: jax.device_put(x, NamedSharding(mesh, param_specs[k])) for k, x in tree_for(params).items()}
        apply_fn = functools.partial(model, rows=batch_spec) if explicit else model
        tx = fj.scale_by_kfac(
            apply_fn, example=batch, policy="all", damping=0.1, update_freq=update_freq, fisher=fisher,
            diagonal=diagonal(explicit),
        )  # fmt: skip
    return mesh, tx, grads, params, batch


def sharded(kind, layout, fisher="empirical"):
    mesh, tx, grads, params, batch = setting(kind, layout, fisher)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        update = jax.jit(tx.update)
        seen = []
        for _ in range(3):
            updates, state = update(grads, state, params, batch=batch, key=jax.random.key(0))
            seen.append([x.sharding for x in jax.tree.leaves((updates, state))])
        (head,) = [b.G.columns for b in state.blocks if b.G is not None and b.G.columns.shape[1] == V]
        stable = all(
            a.is_equivalent_to(b, x.ndim)
            for a, b, x in zip(*seen[1:], jax.tree.leaves((updates, state)), strict=True)
        )
        largest = max(s.data.shape[1] for s in head.addressable_shards)
    wanted = one_device(kind == AxisType.Explicit, fisher)
    return {"error": worst(updates, wanted), "stable": stable, "rows_per_device": largest}, state


def restored(state, other):
    """``state`` saved on its mesh and restored where ``other`` lies, and what it then gives without a refresh."""
    mesh, tx, grads, params, batch = setting(AxisType.Auto, "vocabulary", update_freq=10)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        path = pathlib.Path(folder) / "kfac"
        fj.checkpoint.save(path, state)
        back = fj.checkpoint.restore(path, other)
        same = all(
            bool(np.array_equal(a, b)) and a.dtype == b.dtype and a.sharding.is_equivalent_to(c.sharding, a.ndim)
            for a, b, c in zip(*map(jax.tree.leaves, (back, state, other)), strict=True)
        )
        updates, after = jax.jit(tx.update)(grads, back, params, batch=jax.tree.map(jnp.zeros_like, batch))
        return {"same": same, "error": worst(updates, one_device(False, "empirical")), "step": int(after.step)}


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
    states = {}
    for layout in LAYOUTS:
        found[f"auto {layout}"], states[layout] = sharded(AxisType.Auto, layout)
    found["explicit both"], _ = sharded(AxisType.Explicit, "both")
    found["exact_head both"], _ = sharded(AxisType.Auto, "both", "exact_head")
    found["restored"] = restored(states["both"], states["vocabulary"])
    found["shard_map"] = {"error": under_shard_map("empirical")}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

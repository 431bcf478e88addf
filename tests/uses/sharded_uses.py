"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_jax as fj

MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def trees():
    rng = np.random.default_rng(0)
    draw = lambda: {"w": rng.standard_normal((16, 4)), "b": rng.standard_normal(8)}  # noqa: E731
    params = [jax.tree.map(np.float32, draw()) for _ in range(2)]
    fishers = [jax.tree.map(lambda x: np.float32(np.exp(x)), draw()) for _ in range(2)]
    return params, fishers


def uses(params, fishers):
    """Everything that works under ``jit``."""
    tx = optax.chain(
        fj.continual.scale_by_fisher(fishers[0], damping=1.0), fj.continual.protect_important(fishers[1], 0.25)
    )
    scaled, _ = tx.update(params[1], tx.init(params[0]))
    saliency = fj.saliency(params[0], fishers[0])
    mask = fj.prune_mask(saliency, 0.4, structured=False)
    return {
        "merged": fj.merge_params(params, fishers, floor=0.1),
        "penalty": jax.value_and_grad(fj.ewc_penalty)(params[0], params[1], fishers[0]),
        "scaled": scaled,
        "pruned": fj.stats.apply_mask(params[0], mask),
        "rows": fj.prune_mask(saliency, 0.4),
        "away": fj.continual.project_away(params[0], fishers[0], 0.3),
        "conflict": fj.shift.conflict(params[0], params[1], *fishers),
    }


def host_uses(state_a, state_b):
    shift = fj.importance_shift(state_a, state_b)
    return {"p": shift.p, "decided": fj.stats.decide(state_a, 1.0).p}


def states(values):
    moments = [fj.welford.observe(x, unit="sequence") for x in values]
    return [fj.welford.add(fj.welford.init(m), m) for m in moments]


def distance(found, wanted):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, float) - np.asarray(b, float)))) for a, b in pairs)


def main():
    params, fishers = trees()
    wanted = jax.jit(uses)(*jax.tree.map(jnp.asarray, (params, fishers)))
    values = [{"w": np.float32(np.random.default_rng(i).gamma(2.0, 1.0, (20, 16)))} for i in range(2)]
    wanted_host = host_uses(*states(values))
    out = {}
    for name, kind in MESHES.items():
        mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            put = lambda x: jax.device_put(x, NamedSharding(mesh, P("d")))  # noqa: B023, E731
            placed = jax.tree.map(put, (params, fishers))
            found = jax.jit(uses)(*placed)
            # Reading states is the same on both.
            columns = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "d"))), values)  # noqa: B023
            host = host_uses(*jax.jit(states)(columns)) if name == "explicit" else wanted_host
        out[name] = {
            "error": distance(found, wanted),
            "host": distance(host, wanted_host),
            "stays": [str(found[use]["w"].sharding.spec) for use in ("merged", "scaled", "pruned", "away")],
        }
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()

"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
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
# Where averages change nothing they are kept too: one device's program is then the same.
AVERAGED = {"factor_decay": 0.7}


def problem():
    """Parameters and three batches; some devices get fewer tokens than others, one none."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (V, D), "w": (D, D), "b": (D,), "head": (D, V)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    mask = np.ones((B, S + 1), int)
    mask[3], mask[5, 2:] = 0, 0
    tokens = rng.integers(0, V, size=(2, B, S + 1))
    masks = mask, mask[::-1]
    first, second = (fj.next_token_batch(*map(jnp.asarray, pair)) for pair in zip(tokens, masks, strict=True))
    return params, [first, second, first]


def model(params, tokens, rows=None):
    """``rows``: where Explicit axes want the looked-up rows to lie."""
    x = params["embed"][tokens] if rows is None else params["embed"].at[tokens].get(out_sharding=rows)
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["head"]


def tree_for(params):
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)


def worst(found, wanted):
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    )


def transformation(example, apply_fn=model, axis_name=None, **options):
    refresh = {name: options.pop(name) for name in ("period", "factor_decay", "factor_rank") if name in options}
    return fj.scale_by_kfac(
        apply_fn,
        example=example,
        damping=0.1,
        kl_clip=None,
        curvature=fj.Curvature(**{"policy": "all"} | options),
        refresh=fj.Refresh(**{"period": 1} | refresh),
        axis_name=axis_name,
    )


@functools.cache
def compiled(**options):
    tx = transformation(problem()[1][0], **options)
    return tx, jax.jit(tx.update)


@functools.cache
def one_device(steps, **options):
    """Updates after some steps."""
    params, batches = problem()
    tx, update = compiled(**options)
    state = tx.init(params)
    for batch in batches[:steps]:
        updates, state = update(tree_for(params), state, params, batch=batch, key=jax.random.key(0))
    return updates


def decomposed_per_device(text):
    """By size, how many matrices each device decomposes: one after the other, in a loop where there are several."""
    sizes = re.findall(r"f32\[(\d+),\d+\]\S*, f32\[\d+\]\S*, s32\[\]\S*\) custom-call", text)
    loops = [
        shape
        for line in text.splitlines()
        if " while(" in line
        for shape in re.findall(r"f32\[(\d+),(\d+),(\d+)\]", line)
    ]
    return {size: max([1, *(int(n) for n, *other in loops if other == [size, size])]) for size in sizes}


def setting(kind, layout, around=True, **options):
    """A mesh (``around`` the computation, or only that of its arguments), a transformation and its arguments."""
    shape, param_specs, batch_spec = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, ("data", "vocab"), axis_types=(kind,) * 2)
    apply_fn = model
    if kind == AxisType.Explicit:
        apply_fn = functools.partial(model, rows=batch_spec)
    params, batches = problem()
    grads = tree_for(params)
    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        params, grads = ({k: put(x, param_specs[k]) for k, x in tree.items()} for tree in (params, grads))
        batches = [jax.tree.map(lambda x: put(x, batch_spec), batch) for batch in batches]
    context = jax.set_mesh(mesh) if around else contextlib.nullcontext()
    return context, transformation(batches[0], apply_fn, **options), grads, params, batches


def sharded(kind, layout, steps, around=True, reference=None, **options):
    """Error against one device, places of the head's rows, and whether places change between the last steps.

    ``reference``: options of one device's transformation where others give the same updates. The last state is
    returned too, and what a step from another state needs.
    """
    context, tx, grads, params, batches = setting(kind, layout, around, **options)
    key, places = jax.random.key(0), []
    with context:
        begun, update = tx.init(params), jax.jit(tx.update)
        state = begun
        first = update.lower(grads, state, params, batch=batches[0], key=key).compile()
        for step, batch in enumerate(batches[:steps]):
            updates, state = (update if step else first)(grads, state, params, batch=batch, key=key)
            places.append([x.sharding for x in jax.tree.leaves((updates, state))])
    leaves = jax.tree.leaves((updates, state))
    (head,) = [b.G.columns for b in state.blocks if b.G is not None and b.G.columns.shape[1] == V]
    wanted = one_device(steps, **(options if reference is None else reference))
    stable = None
    if steps > 2:
        stable = all(a.is_equivalent_to(b, x.ndim) for a, b, x in zip(*places[-2:], leaves, strict=True))
    return (
        {
            "error": worst(updates, wanted),
            "stable": stable,
            "rows_per_device": max(s.data.shape[1] for s in head.addressable_shards),
            "decomposed": decomposed_per_device(first.as_text()),
        },
        state,
        (begun, update, grads, params, batches[0]),
    )


def restored(state, other):
    """``state`` saved on its mesh and restored where a new one of ``other`` lies, and a step without a refresh."""
    other, update, grads, params, batch = other
    empty = dataclasses.replace(batch, weights=jax.device_put(np.zeros_like(batch.weights), batch.weights.sharding))
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(params["w"].sharding.mesh):
        path = pathlib.Path(folder) / "kfac"
        fj.checkpoint.save(path, state)
        back = fj.checkpoint.restore(path, other)
        same = all(
            bool(np.array_equal(a, b)) and a.dtype == b.dtype and a.sharding.is_equivalent_to(c.sharding, a.ndim)
            for a, b, c in zip(*map(jax.tree.leaves, (back, state, other)), strict=True)
        )
        updates, after = update(grads, back, params, batch=empty, key=jax.random.key(0))
        return {"same": same, "error": worst(updates, one_device(3, **AVERAGED)), "step": int(after.step)}


def mapped(run, batch_spec=P("data")):  # noqa: B008
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(), batch_spec), out_specs=P(), check_vma=False))


def by_device(**options):
    """Three steps inside shard_map, each device with its rows; the last batch has a bad label on one of them."""
    params, batches = problem()
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batches[0])
    tx = transformation(example, axis_name="data", **options)
    bad = fj.Batch(batches[0].inputs, batches[0].targets.at[6, 0].set(V), batches[0].weights, batches[0].real)

    def run(params, batches):
        def step(state, batch):
            updates, state = tx.update(tree_for(params), state, params, batch=batch, key=jax.random.key(0))
            return state, (updates, state)

        return jax.lax.scan(step, tx.init(params), batches)[1]

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches[:2], bad)
    program = mapped(run, P(None, "data")).lower(params, stacked).compile()
    updates, states = program(params, stacked)
    states = jax.tree.map(np.asarray, states)
    kept = [bool(np.all(x[1] == x[2])) for x in jax.tree.leaves(states.blocks)]
    return {
        "error": worst(jax.tree.map(lambda x: np.asarray(x)[1], updates), one_device(2, **options)),
        "rejected": states.rejected.tolist(), "reasons": int(states.reasons[2]), "kept": all(kept),
        "decomposed": decomposed_per_device(program.as_text()),
    }  # fmt: skip


def from_taps(**options):
    """Taps of each device's own training step, and factors outside the transformation."""
    params, batches = problem()
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batches[0])
    tx = transformation(example, axis_name="data", **options)

    def loss(params, batch):
        return -jnp.sum(batch.weights * fj.categorical.log_prob(model(params, batch.inputs), batch.targets)) / 7

    def run(params, batch):
        grads = tree_for(params)
        _, _, taps = fj.value_grad_and_taps(loss)(params, batch)
        updates, _ = tx.update(grads, tx.init(params), params, taps=taps, taps_scale=7.0, batch=batch)
        factors = fj.kfac_factors(
            model,
            fj.categorical,
            params,
            batch,
            damping=0.1,
            axis_name="data",
            curvature=fj.Curvature(policy="all", **options),
        )
        return updates, fj.precondition(factors, grads)

    found, outside = mapped(run)(params, batches[0])
    return {"error": worst(found, one_device(1, **options)), "outside": worst(outside, one_device(1, **options))}


def main():
    found, auto = {}, AxisType.Auto
    # The first step refreshes, whatever the period.
    found["auto vocabulary"], _, another = sharded(auto, "vocabulary", 1, True, AVERAGED, period=10, **AVERAGED)
    found["auto both"], state, _ = sharded(auto, "both", 3, **AVERAGED)
    found["auto tokens"], *_ = sharded(auto, "tokens", 1, around=False, **AVERAGED)
    found["explicit both"], *_ = sharded(AxisType.Explicit, "both", 3)
    found["exact_head both"], *_ = sharded(auto, "both", 1, estimator="exact_head")
    found["restored"] = restored(state, another)
    found["shard_map"] = by_device(**AVERAGED)
    found["shard_map taps"] = from_taps(eigenvalue_correction=True)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

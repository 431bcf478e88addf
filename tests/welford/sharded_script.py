"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import functools
import json
import re
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_jax as fj

ROWS, LENGTH, VOCABULARY, WIDTH = 8, 5, 48, 6
KINDS = ("empirical", "true")
# One unit for each group, so that every way through the head is taken once.
WAYS = {"row": "token", "column": "sequence", "tensor": "document", "param": "token", "param by row": "sequence"}
WELFORD = (("auto", "document"), ("explicit", "document"), ("explicit", "token"))
MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def problem():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
    head = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    weights = (rng.integers(0, 4, (ROWS, LENGTH)) * 0.5).astype(np.float32)
    return hidden, head, targets, weights


UNITS = np.array([3, 3, 5, 5, 5, 9, 2, 2], np.int32)


def moments(hidden, head, targets, weights, units, way, **options):
    return fj.lm_head.moments(
        hidden, head, targets, weights, groups=way.split()[0], kind=KINDS, unit=WAYS[way], units=units, **options
    )


def read(found):
    """Mean and standard error of each kind, with what is counted."""
    out = {}
    for kind, x in zip(KINDS, found, strict=True):
        out[kind] = (fj.welford.mean(x), fj.welford.standard_error(x), fj.welford.total_weight(x), x.rejected)
    return out


def distance(a, b):
    """Largest difference between two trees, relative to the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.max(np.abs(np.asarray(x, float) - np.asarray(y, float)) / max(np.abs(np.asarray(y)).max(), 1e-30)))
        for x, y in pairs
    )


def vocabulary_sharded(mesh, way, reference):
    """The head's rows lie on eight devices; the statistic of one device comes out, and the head is not gathered."""
    out_rows = P("v") if way.split()[0] in ("row", "param") else P()
    spec = {kind: (out_rows, out_rows, P(), P()) for kind in KINDS}
    hidden, head, targets, weights = problem()

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("v"), P(), P(), P()), out_specs=spec, check_vma=False
    )
    def run(hidden, head, targets, weights, units):
        return read(moments(hidden, head, targets, weights, units, way, axis_name="v"))

    arguments = [
        jax.device_put(x, NamedSharding(mesh, P("v") if x is head else P()))
        for x in (hidden, head, targets, weights, UNITS)
    ]
    compiled = run.lower(*arguments).compile()
    text = compiled.as_text()
    found = compiled(*arguments)
    mean = found["empirical"][0]
    return {
        "error": distance(found, reference),
        "gathered": gathered_shapes(text),
        "reduced": text.count(" all-reduce("),
        "rows_stay": mean.sharding.is_equivalent_to(NamedSharding(mesh, out_rows), mean.ndim),
    }


def gathered_shapes(text):
    """Shapes of the results of all all-gathers in a compiled program."""
    found = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*\ball-gather", text)
    return [[int(n) for n in shape.split(",") if n] for shape in found]


def head_gathered_on_purpose(mesh):
    """What the search for all-gathers finds where a head is gathered."""

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("v")), out_specs=P(), check_vma=False)
    def run(hidden, head):
        return hidden @ jax.lax.all_gather(head, "v", tiled=True).T

    hidden, head, *_ = problem()
    return {"gathered": gathered_shapes(jax.jit(run).lower(hidden, head).compile().as_text())}


def data_parallel(mesh, unit, reference):
    """Rows lie on eight devices, the head on each."""
    arrays = (*problem(), UNITS)
    specs = (P("v"), P(), P("v"), P("v"), P("v"))
    arguments = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    with jax.set_mesh(mesh):
        found = one_device(unit)(*arguments)
    return {"error": distance(found, reference)}


@functools.cache
def one_device(unit):
    @jax.jit
    def run(hidden, head, targets, weights, units):
        return read(fj.lm_head.moments(hidden, head, targets, weights, kind=KINDS, unit=unit, units=units))

    return run


def stream_of_values():
    rng = np.random.default_rng(1)
    return [{"a": rng.lognormal(0, 1, (4, 16)).astype(np.float32), "b": rng.lognormal(0, 1, 4).astype(np.float32)}
            for _ in range(3)]  # fmt: skip


def observer(unit):
    weights = np.array([1.0, 0.5, 0.0, 2.0], np.float32)
    return jax.jit(lambda v: fj.welford.observe(v, weights, unit=unit, units=UNITS[:4]))


@functools.cache
def statistics_on_one_device(unit):
    moments = list(map(observer(unit), stream_of_values()))
    add, state = jax.jit(fj.welford.add), fj.welford.init(moments[0])
    for m in moments:
        state = add(state, m)
    return reads(state)


def welford_keeps_sharding(mesh, unit):
    """A state whose leaves are sharded has the same types and sharding after every step, from `init` on."""

    def run(values):
        observe_once, add = observer(unit), jax.jit(fj.welford.add, donate_argnums=0)
        moments = [observe_once(v) for v in values]
        average = fj.moving_average.init(moments[0], 0.9)
        states = [fj.welford.init(moments[0])]
        kinds, traces = [describe(states[0])], []
        for m in moments:
            states.append(add(states.pop(), m))
            kinds.append(describe(states[0]))
            traces.append(add._cache_size())
        (state,) = states
        looped = jax.jit(lambda s, m: jax.lax.fori_loop(0, 2, lambda _, s: fj.welford.add(s, m), s))(
            state, moments[0]
        )
        averages = [describe(average), describe(jax.jit(fj.moving_average.add)(average, moments[0]))]
        kinds += [describe(looped), describe(jax.jit(fj.welford.merge)(state, looped))]
        return state, all(k == kinds[0] for k in kinds), averages[0] == averages[1], traces[-1] - traces[0]

    reference = statistics_on_one_device(unit)
    with jax.set_mesh(mesh):
        specs = {"a": P(None, "v"), "b": P()}
        place = lambda v: {k: jax.device_put(v[k], NamedSharding(mesh, specs[k])) for k in v}  # noqa: E731
        placed = [place(v) for v in stream_of_values()]
        state, stable, average_stable, traced_again = run(placed)
        statistics = reads(state)
    return {
        "stable": stable,
        "average_stable": average_stable,
        "traced_again": traced_again,
        "sharded": state.mean["a"].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "v")), 2),
        "error": distance(statistics, reference),
    }


@jax.jit
def reads(state):
    return fj.welford.mean(state), fj.welford.standard_error(state), fj.welford.variance(state)


def describe(tree):
    """Type and place of every leaf."""
    return [(str(jax.typeof(x)), pad(x)) for x in jax.tree.leaves(tree)]


def pad(x):
    spec = getattr(x.sharding, "spec", ())
    return (*spec, *[None] * (x.ndim - len(spec)))


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:  # a finding like any other: the test that reads it fails with these words
        return {"failed": f"{type(error).__name__}: {error}"[:1000]}


def main():
    assert jax.device_count() == 8
    arrays = (*problem(), UNITS)
    found = {}
    meshes = {name: jax.make_mesh((8,), ("v",), axis_types=(kind,)) for name, kind in MESHES.items()}
    for way in WAYS:
        reference = jax.jit(lambda *a, way=way: read(moments(*a, way)))(*arrays)
        for name in ("auto", "explicit") if way == "param" else ("auto",):
            found[f"vocabulary {name} {way}"] = attempt(vocabulary_sharded, meshes[name], way, reference)
    found["gathered on purpose"] = attempt(head_gathered_on_purpose, meshes["auto"])
    for unit in ("sequence", "document"):
        reference = one_device(unit)(*arrays)
        for name, mesh in meshes.items():
            found[f"data {name} {unit}"] = attempt(data_parallel, mesh, unit, reference)
    for name, unit in WELFORD:
        found[f"welford {name} {unit}"] = attempt(welford_keeps_sharding, meshes[name], unit)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

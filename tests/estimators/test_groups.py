"""Rows, columns, tensors and heads of kernels in every layout, and rows measured at their use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax._tracing import program
from fisher_jax._tracing.roles import groupings
from tests.tracing.zoo import ZOO

B, S, V, D, N, H, L = 3, 4, 40, 6, 2, 3, 2


def block(x, p):
    h = x * p["norm"]
    q, k, v = (jnp.einsum("bsd,dnh->bsnh", h, p[name]) for name in "qkv")
    mixed = jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(jnp.einsum("bsnh,btnh->bnst", q, k)), v)
    x = x + jnp.einsum("bsnh,nhd->bsd", mixed, p["o"])
    return x + jnp.tanh(x @ p["up"] + p["up_bias"]) @ p["down"].T, None


def apply_fn(params, inputs):
    """Rematerialised scanned layers, kernels of four orders of axes, a head stored by vocabulary."""
    x = jnp.take(params["embed"], inputs, axis=0) + params["positions"][: inputs.shape[1]]
    x, _ = jax.lax.scan(jax.checkpoint(block), x, params["layers"])
    return x.astype(jnp.float64) @ params["head"].T + params["bias"]


SHAPES = {
    "embed": (V, D),
    "positions": (5, D),
    "layers": {
        "norm": (L, D),
        "q": (L, D, N, H),
        "k": (L, D, N, H),
        "v": (L, D, N, H),
        "o": (L, N, H, D),
        "up": (L, D, 8),
        "up_bias": (L, 8),
        "down": (L, D, 8),
    },
    "head": (V, D),
    "bias": (V,),
}
# For each kernel: its axes of output units, and of inputs, after the axis of layers.
ROWS = {"embed": (0,), "q": (1, 2), "k": (1, 2), "v": (1, 2), "o": (2,), "up": (1,), "down": (0,), "head": (0,)}
COLUMNS = {"embed": (1,), "q": (0,), "k": (0,), "v": (0,), "o": (0, 1), "up": (0,), "down": (1,), "head": (1,)}
SCALES = ("norm",)


def name_of(path):
    return path[-1].key


def summed(squares, kept):
    """Sums of param-level values over all axes but those of ``kept``."""

    def leaf(path, x):
        x, name = np.asarray(x), name_of(path)
        loops = 1 if len(path) == 2 else 0
        own = kept(name, x.ndim - loops)
        return x.sum(tuple(i for i in range(loops, x.ndim) if i - loops not in own))

    return jax.tree_util.tree_map_with_path(leaf, squares)


WANTED = {
    "row": lambda name, ndim: ROWS.get(name, tuple(range(ndim))),
    "column": lambda name, ndim: (0,) if name in SCALES else COLUMNS.get(name, ()),
    "tensor": lambda name, ndim: (),
}


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda s: jnp.asarray(rng.standard_normal(s) * 0.6), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
        )
        inputs, targets = jnp.asarray(rng.integers(0, 5, (B, S))), jnp.asarray(rng.integers(0, V, (B, S)))
        weights = jnp.asarray([[1.0, 0.5, 1, 1], [1, 2, 0, 0], [1, 1, 1, 1]])
    return params, fj.Batch(inputs, targets, weights)


def mean_of(fisher, *arguments):
    """Observed and read in one program."""
    return jax.jit(lambda *given: fj.welford.mean(fisher.observe(*given)))(*arguments)


@functools.cache
def by_entry(estimator, unit):
    params, batch = problem()
    with jax.enable_x64(True):
        fisher = fj.group_fisher(apply_fn, estimator=estimator, unit=unit)
        return mean_of(fisher, params, batch, jax.random.key(0))


@functools.cache
def by_group(group):
    params, batch = problem()
    with jax.enable_x64(True):
        return mean_of(fj.group_fisher(apply_fn, estimator="sequence", groups=group, example=batch), params, batch)


def assert_close(found, wanted, rtol=1e-10):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert x.shape == y.shape, jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("group", ["row", "column", "tensor"])
def test_groups_by_row_are_sums_of_the_entries_whatever_the_route(group):
    """Gram matrices at the head, the embedding and larger kernels; gradients of the smaller ones."""
    assert_close(by_group(group), summed(by_entry("sequence", None), WANTED[group]))


def test_signs_by_row_share_their_draws_with_the_entries():
    params, batch = problem()
    with jax.enable_x64(True):
        fisher = fj.group_fisher(apply_fn, unit="sequence", groups=fj.groups.row, example=batch)
        found = mean_of(fisher, params, batch, jax.random.key(0))
    assert_close(found, summed(by_entry("signs", "sequence"), WANTED["row"]))


def test_group_sizes_count_parameters():
    params, batch = problem()
    with jax.enable_x64(True):
        options = {"estimator": "sequence", "groups": fj.groups.row, "example": batch}
        sizes = fj.group_fisher(apply_fn, **options).group_sizes(params)
    ones = jax.tree.map(np.ones_like, params)
    assert_close(sizes, jax.tree.map(np.float32, summed(ones, WANTED["row"])))


def test_heads_of_every_part():
    params, batch = problem()
    group = fj.groups.head(N)
    with jax.enable_x64(True):
        fisher = fj.group_fisher(apply_fn, estimator="sequence", groups=group, example=batch)
        found = mean_of(fisher, params, batch)
        entries = by_entry("sequence", None)
        for name in "qkv":
            np.testing.assert_allclose(
                found["layers"][name], np.asarray(entries["layers"][name]).sum((1, 3)), rtol=1e-10
            )
        np.testing.assert_allclose(found["layers"]["o"], np.asarray(entries["layers"]["o"]).sum((2, 3)), rtol=1e-10)
        np.testing.assert_allclose(found["layers"]["up"], np.asarray(entries["layers"]["up"]).sum((1, 2)), rtol=1e-10)
        np.testing.assert_allclose(found["head"], np.asarray(entries["head"]).sum(), rtol=1e-10)


def attention(p, x):
    """Grouped-query attention with flat kernels and biases; heads wider than width / heads."""
    q, k, v = (x @ p[n]["kernel"] + p[n]["bias"] for n in ("query", "key", "value"))
    return (q + jnp.tile(k * v, 2)) @ p["attention"]["out"]["kernel"] + p["attention"]["out"]["bias"]


def test_heads_of_grouped_queries_with_flat_kernels_and_biases():
    rng = np.random.default_rng(1)
    sizes = {"query": 4 * 3, "key": 2 * 3, "value": 2 * 3}
    params = {n: {"kernel": rng.standard_normal((5, m)), "bias": rng.standard_normal(m)} for n, m in sizes.items()}
    params["attention"] = {"out": {"kernel": rng.standard_normal((12, 5)), "bias": rng.standard_normal(5)}}
    batch = fj.Batch(jnp.asarray(rng.standard_normal((2, 3, 5))), jnp.asarray(rng.integers(0, 5, (2, 3))))
    params = jax.tree.map(jnp.asarray, params)
    entries = mean_of(fj.group_fisher(attention, estimator="sequence"), params, batch)
    fisher = fj.group_fisher(
        attention, estimator="sequence", groups=fj.groups.head(4, 2, layout="heads"), example=batch
    )
    found = mean_of(fisher, params, batch)
    for name, heads in (("query", 4), ("key", 2), ("value", 2)):
        kernel = np.asarray(entries[name]["kernel"]).reshape(5, heads, 3).sum((0, 2))
        np.testing.assert_allclose(found[name]["kernel"], kernel, rtol=1e-5)
        bias = np.asarray(entries[name]["bias"]).reshape(heads, 3).sum(1)
        np.testing.assert_allclose(found[name]["bias"], bias, rtol=1e-5)
    out = entries["attention"]["out"]
    kernel = np.asarray(out["kernel"]).reshape(4, 3, 5).sum((1, 2))
    np.testing.assert_allclose(found["attention"]["out"]["kernel"], kernel, rtol=1e-5)
    np.testing.assert_allclose(found["attention"]["out"]["bias"], np.asarray(out["bias"]).sum(), rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"taken for the output kernel of 5 heads of 2 by its name, but has 12 units"
    ):
        fj.group_fisher(attention, groups=fj.groups.head(5), example=batch).init(params)
    with pytest.raises(ValueError, match=r"heads of one size, found .* of size 3 and .* of size 6"):
        fj.group_fisher(attention, groups=fj.groups.head(4, 1, layout="heads"), example=batch).init(params)
    nameless = fj.groups.head(4, 2, layout="heads", query="a", key="b", value="c", output="d")
    with pytest.raises(ValueError, match="no parameter is a query, key, value or output kernel by its name"):
        fj.group_fisher(attention, groups=nameless, example=batch).init(params)


@pytest.mark.parametrize("layout", ["q k v", "heads"])
def test_fused_kernels_need_their_layout_said(layout):
    heads, kv, dim, width = 4, 2, 3, 5
    kernel = jnp.asarray(np.random.default_rng(2).standard_normal((width, (heads + 2 * kv) * dim)))
    batch = fj.Batch(jnp.ones((2, 3, width)), jnp.zeros((2, 3), int))

    def model(p, x):
        return jnp.tanh(x @ p["qkv"])

    params = {"qkv": kernel}
    with pytest.raises(ValueError, match="say how with fused_layout="):
        fj.group_fisher(model, groups=fj.groups.head(heads, kv), example=batch).init(params)
    group = fj.groups.head(heads, kv, fused_layout=layout)
    fisher = fj.group_fisher(model, estimator="sequence", groups=group, example=batch)
    found = mean_of(fisher, params, batch)["qkv"]
    entries = mean_of(fj.group_fisher(model, estimator="sequence"), params, batch)["qkv"]
    each = np.asarray(entries).sum(0).reshape(heads + 2 * kv, dim).sum(1)
    places = {
        "q k v": {"query": [0, 1, 2, 3], "key": [4, 5], "value": [6, 7]},
        "heads": {"query": [0, 1, 4, 5], "key": [2, 6], "value": [3, 7]},
    }[layout]
    for name, index in places.items():
        np.testing.assert_allclose(found[name], each[index], rtol=1e-5)


# Leaves of the zoo whose rows are named by hand: axes that stay for "row".
KEPT = {
    "linen": {
        "params/embed/embedding": (0,),
        "params/attention/query/kernel": (1, 2),
        "params/attention/out/kernel": (2,),
        "params/norm/scale": (0,),
        "params/head/kernel": (1,),
    },
    "head_stored_by_vocabulary": {"head": (0,), "bias": (0,)},
    "checkpoint_in_scan": {"q": (0, 2, 3), "o": (0, 3), "down": (0, 2), "norm": (0, 1)},
    "convolutions": {},
    "attention_by_vmap_over_heads": {"q": (1, 2)},
    "embedding_under_vmap": {"table": (0,), "w": (1,)},
    "tied_transformer_with_padding": {"embed": (0,), "position": (0, 1)},
}


@pytest.mark.parametrize("name", KEPT)
def test_rows_are_found_in_models_never_seen(name):
    loss, params, args, _ = ZOO[name]()
    specs = program.trace(loss, params, args).specs
    found = {one.path: one.keep for one in groupings("row", params, lambda: specs)}
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): jax.tree_util.keystr(path)
             for path, _ in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    for leaf, kept in KEPT[name].items():
        assert found[names[leaf]] == kept, leaf


def test_what_cannot_be_told_is_named():
    x = fj.Batch(jnp.ones((2, 3)), jnp.zeros(2, int))

    def both_ways(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    with pytest.raises(ValueError, match=r"axis 0 of parameter \['w'\] is .* in one use and .* in another"):
        fj.group_fisher(both_ways, groups="row", example=x).init({"w": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match=r"parameter \['w'\] is used by .* in no way that tells its rows"):
        fj.group_fisher(lambda p, x: x @ jnp.exp(p["w"]), groups="row", example=x).init({"w": jnp.ones((3, 4))})
    chosen = fj.group_fisher(both_ways, groups=lambda path, shape: lambda s: s.sum(1), example=x)
    assert chosen.init({"w": jnp.ones((3, 4))}).mean["w"].shape == (2, 3)
    mixed = fj.group_fisher(both_ways, groups=lambda path, shape: fj.groups.param, example=x)
    assert mixed.init({"w": jnp.ones((3, 4))}).mean["w"].shape == (2, 3, 4)
    with pytest.raises(ValueError, match="returns a group or a function of squares, found int"):
        fj.group_fisher(both_ways, groups=lambda path, shape: 3, example=x).init({"w": jnp.ones((3, 4))})
    unused = fj.group_fisher(lambda p, x: x @ p["w"], groups="row", example=x)
    assert unused.init({"w": jnp.ones((3, 4)), "u": jnp.ones((2, 2))}).mean["u"].shape == (2,)


def test_a_grouped_convolution_has_rows_and_no_columns():
    def model(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        )
        return y

    batch = fj.Batch(jnp.ones((2, 5, 4)), jnp.zeros((2, 5), int))
    params = {"w": jnp.ones((3, 2, 6))}
    assert fj.group_fisher(model, groups="row", example=batch).init(params).mean["w"].shape == (2, 6)
    with pytest.raises(ValueError, match="grouped convolution"):
        fj.group_fisher(model, groups="column", example=batch).init(params)


def test_several_groups_and_totals_of_layers_in_one_pass():
    params, batch = problem()
    groups = {"head": fj.groups.head(N), "tensor": fj.groups.tensor, "column": fj.groups.column}

    def combine(found):
        layers = found["layers"]
        return {"layers": sum(x["tensor"] for x in layers.values()), "q": layers["q"], "up": layers["up"]}

    with jax.enable_x64(True):
        fisher = fj.group_fisher(apply_fn, estimator="sequence", groups=groups, combine=combine, example=batch)
        state = jax.jit(fisher.update)(fisher.init(params), params, batch)
        found, entries = fj.welford.mean(state), by_entry("sequence", None)["layers"]
        totals = sum(np.asarray(x).reshape(L, -1).sum(1) for x in entries.values())
        np.testing.assert_allclose(found["layers"], totals, rtol=1e-10)
        q, up = np.asarray(entries["q"]), np.asarray(entries["up"])
        np.testing.assert_allclose(found["q"]["head"], q.sum((1, 3)), rtol=1e-10)
        np.testing.assert_allclose(found["q"]["tensor"], q.sum((1, 2, 3)), rtol=1e-10)
        np.testing.assert_allclose(found["q"]["column"], q.sum((2, 3)), rtol=1e-10)
        np.testing.assert_allclose(found["up"]["head"], up.sum((1, 2)), rtol=1e-10)
        assert fj.welford.standard_error(state)["layers"].shape == (L,)


@pytest.mark.parametrize("options", [{"estimator": "sequence"}, {"estimator": "signs"}, {"estimator": "exact"}])
def test_rows_of_leaves_of_every_sort_and_of_one_token(options):
    params = {
        "w": jnp.ones((2, 3)),
        "table": jnp.arange(3),
        "none": None,
        "unused": jnp.ones((2, 2)),
        "empty": jnp.ones((2, 0)),
        "frozen": jnp.ones((2, 3)),
    }

    def model(p, x):
        x = jnp.concatenate([x, x @ p["empty"]], -1)
        return x @ p["w"] + x @ jax.lax.stop_gradient(p["frozen"]) + p["table"][0]

    batch = fj.Batch(jnp.ones((1, 1, 2)), jnp.zeros((1, 1), int))
    fisher = fj.group_fisher(model, groups="row", example=batch, **options)
    state = jax.jit(fisher.update)(fisher.init(params), params, batch, jax.random.key(0))
    found = fj.welford.mean(state)
    assert found["table"] is None
    assert found["none"] is None
    assert found["empty"].shape == (0,)
    assert found["unused"].shape == found["frozen"].shape == ()
    np.testing.assert_array_equal(found["unused"], 0)
    np.testing.assert_array_equal(found["frozen"], 0)
    p = np.full(3, 1 / 3) - np.eye(3)[0]
    np.testing.assert_allclose(found["w"], 2 * p**2, rtol=1e-5)
    padding = fj.Batch(batch.inputs, batch.targets, jnp.zeros((1, 1)))
    after = jax.jit(fisher.update)(state, params, padding, jax.random.key(1))
    assert int(after.rejected) == 0
    assert fj.welford.count(after) == 1


@pytest.mark.parametrize("unpack", [lambda w: list(w), jnp.unstack, lambda w: [w[0], w[1]]])
def test_rows_of_layers_that_are_unpacked(unpack):
    """Each layer keeps rows of its own, however a stack of kernels is taken apart."""

    def model(p, x):
        for w, b in zip(unpack(p["w"]), unpack(p["b"]), strict=True):
            x = jnp.tanh(x @ w + b)
        return x

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(2, 3, 3))), "b": jnp.asarray(rng.normal(size=(2, 3)))}
    batch = fj.Batch(jnp.asarray(rng.normal(size=(4, 3))), jnp.array([0, 1, 2, 0]))

    def mean(groups):
        return fj.group_fisher(model, groups=groups, estimator="exact", example=batch).observe(params, batch).mean

    entries, rows = mean("param"), mean("row")
    np.testing.assert_allclose(rows["w"], entries["w"].sum(1), rtol=1e-5)
    np.testing.assert_allclose(rows["b"], entries["b"], rtol=1e-5)


@pytest.mark.parametrize(("layout", "axis"), [((2, 3), 1), ((3, 2), 2)])
def test_heads_by_name_of_a_kernel_with_axes_of_heads_and_units(layout, axis):
    """A kernel of two heads of size 3 in no attention that the program shows, in either order."""
    rng = np.random.default_rng(0)
    params = {"q": {"kernel": jnp.asarray(rng.normal(size=(4, *layout)), jnp.float32)}}
    batch = fj.Batch(jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), jnp.asarray(rng.integers(0, 6, 5)))

    def apply_fn(params, x):
        return jnp.einsum("bd,dmn->bmn", x, params["q"]["kernel"]).reshape(len(x), 6)

    def mean(group):
        fisher = fj.group_fisher(apply_fn, groups=group, example=batch, unit="batch", estimator="exact")
        return fj.welford.mean(jax.jit(fisher.observe)(params, batch))["q"]["kernel"]

    entries = np.asarray(mean(fj.groups.param))
    found = mean(fj.groups.head(2, head_dim=3))
    np.testing.assert_allclose(found, entries.sum(tuple({0, 1, 2} - {axis})), rtol=1e-5)

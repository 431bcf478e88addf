"""What `capture` does at the edges: empty things, frozen things, bad things, memory, and what it tells the user."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, wanted)


def rebuilt(loss, params, *args, **kwargs):
    value, taps = fj.capture(loss)(params, *args, **kwargs)
    close(value, loss(params, *args, **kwargs))
    return fj.gradients_from_taps(taps, params), taps


def language_model(p, tokens, weights):
    x = p["embed"][tokens]
    logp = jax.nn.log_softmax(jnp.tanh(x @ p["w"] + p["b"]) @ p["embed"].T)
    picked = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights) / jnp.maximum(jnp.sum(weights), 1.0)


LM = {"embed": jnp.arange(12.0).reshape(4, 3) / 9, "w": jnp.eye(3), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [([[0, 1], [2, 3]], [[0.0, 0.0], [0.0, 0.0]]), ([[2]], [[1.0]]), (np.zeros((0, 2), int), np.zeros((0, 2)))],
    ids=["all padding", "one token", "no rows"],
)
def test_small_batches(tokens, weights):
    arguments = jnp.asarray(tokens, jnp.int32), jnp.asarray(weights, jnp.float32)
    found, _ = rebuilt(language_model, LM, *arguments)
    close(found, jax.grad(language_model)(LM, *arguments))
    _, reduced = fj.capture(language_model, reduce=lambda i, g: jnp.sum(g**2))(LM, *arguments)
    assert all(np.isfinite(tap.reduced) for tap in reduced)
    if not np.any(weights):
        assert all(tap.reduced == 0 for tap in reduced)


def test_frozen_empty_and_unused_leaves():
    params = {
        "w": jnp.ones((3, 2)), "empty": jnp.zeros((0, 2)), "table": jnp.array([2, 0, 1]), "flag": jnp.array(True),
        "key": jax.random.key(0), "none": None, "unused": jnp.ones(4), "number": 2.0, "ignored": jnp.ones(2),
    }  # fmt: skip

    def loss(p, x):
        x = x[:, p["table"]] + 0 * jax.random.normal(p["key"], x.shape)
        joined = jnp.concatenate([x @ p["w"], x[:, :0] @ p["empty"]]) * p["number"]
        _ = joined + p["ignored"]
        return jnp.sum(jnp.where(p["flag"], joined, 0.0))

    x = jnp.arange(6.0).reshape(2, 3)
    wanted = jax.grad(loss, allow_int=True)(params, x)
    value, grads, taps = fj.value_grad_and_taps(loss)(params, x)
    assert value == loss(params, x)
    found = fj.gradients_from_taps(taps, params)
    for tree in (grads, found):
        assert jax.tree.structure(tree) == jax.tree.structure(wanted)
        for name in ("table", "flag", "key"):
            assert tree[name].dtype == jax.dtypes.float0
            assert tree[name].shape == params[name].shape
        real = {k: v for k, v in tree.items() if k in ("w", "empty", "unused", "number", "ignored")}
        close(real, {k: wanted[k] for k in real})
    kinds = {path: kinds for path, _, kinds in fj.coverage(loss, params, x).rows}
    assert kinds == {
        "['empty']": ("dense",), "['flag']": (), "['ignored']": ("bias",), "['key']": (), "['number']": ("scale",),
        "['table']": (), "['unused']": (), "['w']": ("dense",),
    }  # fmt: skip
    assert not any(np.any(tap.cotangents) for tap in taps if tap.path == "['ignored']")


@pytest.mark.parametrize("params", [{}, None, {"a": jnp.array(1)}])
def test_nothing_to_differentiate(params):
    value, taps = fj.capture(lambda p, x: jnp.sum(x))(params, jnp.ones(3))
    assert (value, taps) == (3, [])
    value, grads, taps = fj.value_grad_and_taps(lambda p, x: jnp.sum(x))(params, jnp.ones(3))
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert taps == []


@pytest.mark.parametrize("loss", [lambda p: 1.0, lambda p: p, lambda p: -p, lambda p: jnp.float32(2) * p])
def test_a_loss_that_is_hardly_one(loss):
    found, _ = rebuilt(loss, jnp.float32(3))
    close(found, jax.grad(loss)(jnp.float32(3)))


def test_a_parameter_cast_to_integers_or_complex_numbers_is_generic():
    def loss(p, x):
        return jnp.sum(x * p["index"].astype(jnp.int32)) + jnp.sum(jnp.abs(x * p["phase"].astype(jnp.complex64)))

    params, x = {"index": jnp.array([1.5, 2.0]), "phase": jnp.array([1.0, -2.0])}, jnp.ones((3, 2))
    found, taps = rebuilt(loss, params, x)
    close(found, jax.grad(loss)(params, x))
    assert {tap.kind for tap in taps} == {"generic"}


def test_arguments_of_all_kinds():
    def loss(params, batch, repeats, *, key, scale=1.0):
        x = batch["x"] if batch["mask"] is None else batch["x"] * batch["mask"]
        for _ in range(repeats):
            x = x @ params
        return scale * jnp.sum(x * jax.random.normal(key, x.shape))

    arguments = ({"x": np.ones((2, 3), np.float32), "mask": None}, 2)
    named = {"key": jax.random.key(1), "scale": 3}
    params = jnp.eye(3)
    found, taps = rebuilt(loss, params, *arguments, **named)
    assert len(taps) == 2
    close(found, jax.grad(loss)(params, *arguments, **named))
    _, grads, _ = fj.value_grad_and_taps(loss)(params, *arguments, **named)
    close(grads, found)
    assert fj.coverage(loss, params, *arguments, **named).rows[0][2] == ("dense", "dense")


def sizes(p, x, **named):
    return jnp.sum(x["a"] @ p)


BAD = {
    r"argument 1\['b'\] of the loss is of type str": lambda: fj.capture(sizes)(
        jnp.ones(2), {"a": jnp.ones(2), "b": "x"}
    ),
    "argument mode of the loss is of type object": lambda: fj.capture(sizes)(
        jnp.ones(2), {"a": jnp.ones(2)}, mode=object()
    ),
    r"parameter \['f'\] is of type function": lambda: fj.capture(sizes)({"f": jnp.sum}, {"a": jnp.ones(2)}),
    r"parameter \['z'\] has dtype complex64; store": lambda: fj.coverage(lambda p: 0.0, {"z": jnp.ones(2) * 1j}),
    r"one real number, found shape \[2\]": lambda: fj.capture(lambda p: p)(jnp.ones(2)),
    "one real number, found .* dtype int32": lambda: fj.value_grad_and_taps(lambda p: jnp.int32(1))(jnp.ones(2)),
    "one real number, found .* dtype complex64": lambda: fj.capture(lambda p: jnp.sum(p) * 1j)(jnp.ones(2)),
    "one real number, found tuple": lambda: fj.capture(lambda p: (jnp.sum(p), p))(jnp.ones(2)),
    "reduce= returns floating arrays, .* found dtype int32": lambda: fj.capture(
        lambda p, i: jnp.sum(p[i]), reduce=lambda inputs, g: inputs
    )(jnp.ones(2), jnp.array([1])),
    r"the tap of \['w'\] was reduced": lambda: fj.gradients_from_taps(
        fj.capture(lambda p: jnp.sum(p["w"]), reduce=lambda i, g: jnp.sum(g))({"w": jnp.ones(2)})[1],
        {"w": jnp.ones(2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_errors_name_what_is_wrong(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_coverage_names_the_users_line_and_tells_layers_apart():
    def loss(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w["w"]) + p["time"], None

        x = jax.lax.scan(layer, x, p["layers"])[0]
        return jnp.sum(x * jnp.exp(p["log"]))  # the line of the generic use

    lines, start = inspect.getsourcelines(loss)
    line = start + next(i for i, text in enumerate(lines) if "generic use" in text)
    shape = jax.ShapeDtypeStruct
    params = {
        "layers": {"w": shape((5, 3, 3), "float32")},
        "log": shape((3,), "float32"),
        "time": shape((3,), "float32"),
    }
    table = fj.coverage(loss, params, shape((2, 3), "float32"))
    assert table.loops == (((("stacked", 5),),), ((),), ((("shared", 5),),))
    assert table.lines[1] == (f"test_capture_edges.py:{line}",)
    assert str(table).splitlines() == [
        "['layers']['w']  [5, 3, 3]  dense (5 stacked)",
        f"['log']          [3]        generic at test_capture_edges.py:{line}",
        "['time']         [3]        bias (5 shared)",
    ]


def test_taps_of_different_computations_differ_in_structure():
    def loss(p, x, transposed):
        return jnp.sum(x @ (p.T if transposed else p)) if transposed is not None else jnp.sum(p @ x)

    square = jnp.ones((3, 3))
    taps = {which: fj.capture(loss)(square, square, which)[1] for which in (True, False, None)}
    structures = {which: jax.tree.structure(found) for which, found in taps.items()}
    assert len(set(structures.values())) == 3
    assert structures[True] == jax.tree.structure(fj.capture(loss)(square, square, True)[1])


def test_taps_are_carried_by_a_loop():
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"]) + p["b"])

    capture = fj.capture(loss, reduce=lambda inputs, g: jnp.sum(g**2))
    params, xs = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.arange(24.0).reshape(4, 2, 3) / 24
    start = jax.tree.map(jnp.zeros_like, capture(params, xs[0])[1])
    total, _ = jax.lax.scan(lambda t, x: (jax.tree.map(jnp.add, t, capture(params, x)[1]), None), start, xs)
    wanted = [sum(capture(params, x)[1][i].reduced for x in xs) for i in range(2)]
    close([tap.reduced for tap in total], wanted)


def test_a_reduction_may_close_over_traced_arrays():
    def loss(p, x):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
        return jnp.sum(jax.lax.scan(step, x, p)[0])

    def run(p, x, weights):
        return fj.capture(loss, reduce=lambda inputs, g: weights @ g**2)(p, x)[1][0].reduced

    p, x, weights = jnp.ones((4, 3, 3)) / 3, jnp.arange(6.0).reshape(2, 3), jnp.array([1.0, 2.0])
    (tap,) = fj.capture(loss)(p, x)[1]
    close(jax.jit(run)(p, x, weights), jnp.einsum("t,ltd->ld", weights, tap.cotangents**2))


def test_under_vmap():
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p))

    p, x = jnp.arange(6.0).reshape(3, 2) / 6, jnp.arange(12.0).reshape(4, 3) / 12

    def one(x):
        return fj.gradients_from_taps(fj.capture(loss)(p, x[None])[1], p)

    close(jax.vmap(one)(x), jax.vmap(lambda x: jax.grad(loss)(p, x[None]))(x))


def test_reduced_taps_of_rematerialised_layers_fit_where_the_gradient_does():
    layers, tokens, width, hidden = 16, 256, 32, 128
    shapes = {"up": (layers, width, hidden), "down": (layers, hidden, width), "scale": (layers, width)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def loss(p, x):
        def layer(x, w):
            return x + jnp.sin(jnp.tanh((x * w["scale"]) @ w["up"])) @ w["down"], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, p)[0] ** 2)

    def memory(f):
        found = jax.jit(f).lower(params, jax.ShapeDtypeStruct((tokens, width), jnp.float32)).compile()
        analysis = found.memory_analysis()
        return analysis.temp_size_in_bytes, analysis.output_size_in_bytes

    reference, _ = memory(jax.value_and_grad(loss))
    temporary, results = memory(fj.capture(loss, reduce=lambda inputs, g: jnp.sum(g**2, axis=-1)))
    assert temporary <= 1.2 * reference
    assert results < 0.2 * reference
    assert sum(memory(fj.capture(loss))) > 4 * reference

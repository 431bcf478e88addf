"""Taps rebuild the gradient of every parameter, whatever the model looks like (see ``zoo``)."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from tests.tracing.zoo import ZOO, draw

# What is compiled here runs once, on small arrays.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def keep(inputs, cotangents):
    """A reduction that sees everything: squares per row, and a number of each input."""
    return {
        "rows": jnp.sum(cotangents.reshape((*cotangents.shape[:1], -1)) ** 2, axis=-1),
        "inputs": [jnp.sum(jnp.cos(x.astype(cotangents.dtype)) * 2) for x in inputs],
    }


def reduced_after(tap):
    """What `keep` gives on each iteration of a raw tap."""
    reduce = keep
    for _ in tap.use.loops:
        reduce = jax.vmap(reduce)
    return reduce(tap.inputs, tap.cotangents)


def distance(found, wanted):
    """Largest difference of each leaf, relative to its largest entry, over all leaves."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(
        [float(np.max(np.abs(a - b), initial=0) / (np.max(np.abs(b), initial=0) + 1e-300)) for a, b in pairs],
        default=0.0,
    )


def everything(loss):
    """All ways through `capture`, and what each of them should give."""

    def run(params, *args):
        _, taps = fj.capture(loss)(params, *args)
        value, grads, more_taps = fj.value_grad_and_taps(loss)(params, *args)
        _, reduced = fj.capture(loss, reduce=keep)(params, *args)
        found = {
            "values": [fj.capture(loss)(params, *args)[0], value],
            "from taps": fj.gradients_from_taps(taps, params),
            "from the taps of both": fj.gradients_from_taps(more_taps, params),
            "grads": grads,
            "reduced": [tap.reduced for tap in reduced],
        }
        value, grads = jax.value_and_grad(loss)(params, *args)
        wanted = {
            "values": [value, value],
            "from taps": grads,
            "from the taps of both": grads,
            "grads": grads,
            "reduced": [reduced_after(tap) for tap in taps],
        }
        return found, wanted, taps

    return run


def flat_kinds(table):
    """Kinds by the path of a leaf with its keys joined: ``['a'][0].weight`` is ``a/0/weight``."""
    plain = str.maketrans({"'": None, "[": "/", "]": None, ".": "/"})
    return {
        "/".join(filter(None, path.removesuffix(".value").translate(plain).split("/"))): list(kinds)
        for path, _, kinds in table.rows
    }


@pytest.mark.parametrize("name", ZOO)
def test_taps_rebuild_gradients_and_reductions(name):
    loss, params, args, kinds = ZOO[name]()
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    assert flat_kinds(fj.coverage(loss, params, *args)) == kinds
    compiled = jax.jit(everything(loss), compiler_options=QUICK)
    found, wanted, taps = compiled(params, *args)
    # Parts of the decoder compute in float32 whatever its parameters are.
    tolerance = 1e-5 if name.startswith("decoder") else 1e-10
    for key in wanted:
        assert distance(found[key], wanted[key]) < tolerance, key
    # What jit returned and what another trace gives have one structure.
    again = jax.eval_shape(fj.capture(loss), params, *args)[1]
    assert jax.tree.structure(taps) == jax.tree.structure(again)


@pytest.mark.parametrize("name", ["mlp", "nested_scans", "checkpointed_with_a_policy"])
def test_the_same_without_jit(name):
    loss, params, args, _ = ZOO[name]()
    found, wanted, _ = everything(loss)(params, *args)
    assert [float(v) for v in found["values"]] == [float(v) for v in wanted["values"]]
    for key in wanted:
        assert distance(found[key], wanted[key]) < 1e-10, key


def test_float32_parameters_cast_to_bfloat16():
    def loss(p, x):
        def layer(x, w):
            return jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)), None

        x = jax.lax.scan(layer, x.astype(jnp.bfloat16), p["layers"])[0]
        x = x * p["scale"].astype(jnp.bfloat16) + p["bias"].astype(jnp.bfloat16)
        return jnp.sum((x @ p["head"].astype(jnp.bfloat16).T).astype(jnp.float32) ** 2)

    params = {"layers": draw(2, 4, 4), "scale": draw(4), "bias": draw(4), "head": draw(3, 4)}
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    x = draw(5, 4).astype(jnp.float32)
    found, wanted, taps = jax.jit(everything(loss), compiler_options=QUICK)(params, x)
    assert [tap.kind for tap in taps] == ["dense", "scale", "bias", "dense"]
    assert {str(tap.cotangents.dtype) for tap in taps} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(found["from taps"])} == {"float32"}
    for key in ("values", "from taps", "from the taps of both", "grads"):
        assert distance(found[key], wanted[key]) < 0.05, key


def test_values_and_gradients_are_those_of_jax_to_the_bit():
    loss, params, args, _ = ZOO["scanned_layers"]()
    value, grads, _ = jax.jit(fj.value_grad_and_taps(loss))(params, *args)
    wanted = jax.jit(jax.value_and_grad(loss))(params, *args)
    assert float(value) == float(wanted[0])
    assert distance(grads, wanted[1]) < 1e-14


def test_equinox_modules():
    model = equinox.nn.MLP(3, 2, 4, depth=1, key=jax.random.key(0))
    params, static = equinox.partition(model, equinox.is_inexact_array)

    def loss(params, x):
        return jnp.sum(jax.vmap(equinox.combine(params, static))(x) ** 2)

    found, wanted, taps = jax.jit(everything(loss), compiler_options=QUICK)(params, draw(5, 3))
    assert [tap.kind for tap in taps] == ["dense", "bias", "dense", "bias"]
    assert distance(found["from taps"], wanted["from taps"]) < 1e-6

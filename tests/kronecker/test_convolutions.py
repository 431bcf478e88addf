"""Convolutions against patches cut out by loops and a dense inverse, in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from tests import oracle_kronecker as oracle

N, DAMPING = 4, 1e-2
# Layout, strides, padding of either side, dilation of the window, groups.
FIRST = (("NHWC", "HWIO", "NHWC"), (2, 1), ((1, 1), (0, 2)), (1, 1), 1)
SECOND = (("NCHW", "OIHW", "NCHW"), (1, 1), ((0, 0), (2, 1)), (1, 2), 2)
SHAPES = {"k1": (3, 2, 3, 4), "b1": (4,), "k2": (6, 2, 2, 2), "b2": (6, 1, 1), "w": (6, 3)}


def convolve(x, kernel, how):
    layout, strides, padding, dilation, groups = how
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, None, dilation, layout, groups)


def model(params, x, at=None):
    """Two convolutions in different layouts, a mean over positions, a head; ``at`` perturbs what they give."""
    at = at or {"1": 0, "2": 0, "w": 0}
    hidden = jnp.tanh(convolve(x, params["k1"], FIRST) + params["b1"] + at["1"])
    second = convolve(jnp.moveaxis(hidden, 3, 1), params["k2"], SECOND) + params["b2"] + at["2"]
    return jnp.tanh(second).mean((2, 3)) @ params["w"] + at["w"], hidden, second


def setting():
    rng = np.random.default_rng(0)
    params, tree = ({k: rng.normal(size=s) for k, s in SHAPES.items()} for _ in "ab")
    x, y, w = rng.normal(size=(N, 7, 6, 3)), rng.integers(0, 3, size=N), np.array([1.0, 0.5, 0, 2])
    return params, tree, x, y, w, np.array([1, 1, 0, 1])


def cut(x, window, how):
    """``[N, positions, groups, channels of a group * window]`` of ``x [N, H, W, C]``, number by number."""
    _, strides, padding, dilation, groups = how
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    steps = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:3], reach, strides, strict=True)]
    found = np.zeros((len(x), *steps, x.shape[3], *window))
    for i, j, k, m in np.ndindex(*steps, *window):
        at = i * strides[0] + k * dilation[0], j * strides[1] + m * dilation[1]
        found[:, i, j, :, k, m] = x[:, at[0], at[1]]
    return found.reshape(len(x), -1, groups, x.shape[3] // groups * window[0] * window[1])


@functools.cache
def gradients():
    """Inputs of the second convolution, and output gradients of both: derivatives by what is added to them."""
    params, _, x, y, w, _ = setting()

    @jax.jit
    def run(params, x, w):
        def loss(at):
            outputs, hidden, _ = model(params, x, at)
            return jnp.sum(jnp.sqrt(w) * jax.nn.log_softmax(outputs)[jnp.arange(N), y]), hidden

        shapes = jax.eval_shape(model, params, x)
        at = {k: jnp.zeros(s.shape) for k, s in zip(("w", "1", "2"), shapes, strict=True)}
        return jax.grad(loss, has_aux=True)(at)

    with jax.enable_x64(True):
        g, hidden = jax.device_get(run(params, x, w))
    return hidden, g["1"], g["2"]


def expected(tree, x, w, real, shared):
    """By the definition: inputs and output gradients of every position, and the dense block."""
    hidden, g1, g2 = gradients()
    layers = {
        "1": (cut(x, (3, 2), FIRST), g1.reshape(N, -1, 1, 4)),
        "2": (cut(hidden, (2, 2), SECOND), np.moveaxis(g2, 1, 3).reshape(N, -1, 2, 3)),
    }
    kernels = {"1": tree["k1"].transpose(3, 2, 0, 1).reshape(1, 4, -1), "2": tree["k2"].reshape(2, 3, -1)}
    found = {}
    for name, (a, g) in layers.items():
        if name == "1":
            a = np.concatenate([a, np.ones((*a.shape[:3], 1))], -1)
            kernels[name] = np.concatenate([kernels[name], tree["b1"][None, :, None]], -1)
        if shared == "reduce":
            a, g = a.mean(1, keepdims=True), g.sum(1, keepdims=True)
        A = np.einsum("n,ntgi,ntgj->gij", real, a, a) / (real.sum() * a.shape[1])
        G = np.einsum("ntgi,ntgj->gij", g, g) / w.sum()
        found[name] = [oracle.damped_power(oracle.block(A[i], G[i]), M, DAMPING) for i, M in enumerate(kernels[name])]
    return found


@pytest.mark.parametrize(("shared", "policy"), [("expand", "never"), ("reduce", "all")])
def test_a_convolution_is_the_dense_inverse_of_its_patches(shared, policy):
    params, tree, x, y, w, real = setting()

    @jax.jit
    def run(params, tree, batch):
        apply_fn = lambda params, x: model(params, x)[0]  # noqa: E731
        chosen = fj.Curvature(shared=shared, policy=policy)
        factors = fj.kfac_factors(apply_fn, fj.categorical, params, batch, damping=DAMPING, curvature=chosen)
        return factors, fj.precondition(factors, tree)

    with jax.enable_x64(True):
        batch = fj.Batch(jnp.asarray(x), jnp.asarray(y), jnp.asarray(w), jnp.asarray(real))
        factors, found = jax.device_get(run(jax.tree.map(jnp.asarray, params), tree, batch))
    plan = [(b.path, b.kind, b.number, b.units, b.width, b.bias is not None) for b in factors.plan]
    # A bias is an input of a convolution without groups.
    assert plan[:2] == [("['b2']", "diagonal", 1, 0, 0, False), ("['k1']", "dense", 1, 4, 18, True)]
    assert plan[2] == ("['k2']", "dense", 2, 3, 8, False)
    want = expected(tree, x, w, real, shared)
    first = np.c_[found["k1"].transpose(3, 2, 0, 1).reshape(4, -1), found["b1"]]
    np.testing.assert_allclose(first, want["1"][0], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found["k2"].reshape(2, 3, -1), want["2"], rtol=1e-8, atol=1e-10)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.Conv(4, (3, 3), feature_group_count=4)(x)  # depthwise
        return nn.Conv(5, (1, 1))(x)  # outputs at every position: the head is a convolution


def test_flax_convolutions_have_blocks_and_the_plan_says_which():
    inputs = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(Network().init, jax.random.key(0), inputs)
    targets = jax.ShapeDtypeStruct((2, 4, 4), jnp.int32)
    found = fj.kfac_tools.kfac_coverage(
        Network().apply,
        fj.categorical,
        params,
        fj.Batch(inputs, targets),
        curvature=fj.Curvature(eigenvalue_correction=True),
    )
    assert [row[2] for row in found.rows] == [
        "an input of ['params']['Conv_0']['kernel']",
        "A [28, 28] (x) G [4, 4], convolution, eigenvalues corrected",
        "diagonal",
        "A [9, 9] (x) G [1, 1], 4 of them, convolution, eigenvalues corrected",
        "an input of ['params']['Conv_2']['kernel']",
        "A [5, 5] (x) G [5, 5], convolution, the head, eigenvalues corrected",
    ]


def test_a_convolution_that_groups_examples_is_an_error():
    def grouped(params, x):
        x = jax.lax.conv_general_dilated(x, params["k"], (1,), "SAME", None, None, ("NWC", "WIO", "NWC"), 1, 2)
        return x.mean(1)

    batch = fj.Batch(jnp.ones((4, 5, 3)), jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"\['k'\].*batch_group_count=2.*test_convolutions.py.*diagonal="):
        fj.kfac_tools.kfac_coverage(grouped, fj.categorical, {"k": jnp.ones((3, 3, 4))}, batch)


def test_a_causal_convolution_before_a_product_knows_its_padding():
    """As in a state-space layer: with rows of 5, 3 and 1 tokens, the same as from every row cut to its own length."""
    rng = np.random.default_rng(1)
    lengths, width, classes = (5, 3, 1), 3, 4
    shapes = {"conv": (2, 1, width), "in": (width, width), "out": (width, classes)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(3, 5, width)), jnp.float32)
    y = jnp.asarray(rng.integers(0, classes, (3, 5)))
    layout = ("NWC", "WIO", "NWC")

    def apply_fn(p, x):
        mixed = jax.lax.conv_general_dilated(
            x, p["conv"], (1,), [(1, 0)], dimension_numbers=layout, feature_group_count=width
        )
        return jax.nn.silu(mixed @ p["in"]) @ p["out"]

    def summed(batch):
        """The curvature of each leaf times ones."""
        factors = fj.kfac_factors(apply_fn, fj.categorical, params, batch, curvature=fj.Curvature(policy="never"))
        product = jax.jit(fj.operators.kfac(factors))
        zero = jax.tree.map(jnp.zeros_like, params)
        return {name: product(zero | {name: jnp.ones(params[name].shape)})[name] for name in params}

    real = jnp.arange(5) < jnp.array(lengths)[:, None]
    together = summed(fj.Batch(x, y, real.astype(jnp.float32), real=real))
    padded = fj.Batch(jnp.where(real[..., None], x, jnp.nan), y, real.astype(jnp.float32), real=real)
    for name, found in summed(padded).items():
        np.testing.assert_allclose(found, together[name], rtol=1e-5)
    inputs = np.concatenate([np.asarray(x[i, :n]) for i, n in enumerate(lengths)])
    before = np.concatenate(
        [np.concatenate([np.zeros((1, width)), np.asarray(x[i, : n - 1])]) for i, n in enumerate(lengths)]
    )
    kernel = np.asarray(params["conv"], np.float64)
    mixed = before * kernel[0, 0] + inputs * kernel[1, 0]
    a = mixed.T @ mixed / sum(lengths)
    z = mixed @ np.asarray(params["in"], np.float64)
    labels = np.concatenate([np.asarray(y[i, :n]) for i, n in enumerate(lengths)])
    s = 1 / (1 + np.exp(-z))
    logits = (z * s) @ np.asarray(params["out"], np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    g = (np.eye(classes)[labels] - p) @ np.asarray(params["out"], np.float64).T * (s + z * s * (1 - s))
    wanted = a @ np.ones((width, width)) @ (g.T @ g / sum(lengths))
    np.testing.assert_allclose(together["in"], wanted, rtol=1e-4)

"""Losses of every shape that a model may have, with how each parameter is to be recognised.

A case is made by a function without arguments that returns ``(loss, params, args, kinds)``; ``kinds`` maps the path
of a leaf to the kinds of its uses. Shapes are as small as can be, and no two axes of a parameter are equal.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fisher_jax import models

ZOO = {}


def case(make):
    ZOO[make.__name__] = make
    return make


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) * 0.5)


def tokens(*shape, size):
    return jnp.asarray(np.random.default_rng(list(shape)).integers(0, size, shape), jnp.int32)


def cross_entropy(logits, targets):
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked)


def rms(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


@case
def mlp():
    params = {"w": draw(3, 4), "b": draw(4), "v": draw(4, 2), "c": draw(2)}

    def loss(p, x, y):
        return jnp.sum((jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"] - y) ** 2)

    return loss, params, (draw(5, 3), draw(5, 2)), {"w": ["dense"], "b": ["bias"], "v": ["dense"], "c": ["bias"]}


@case
def linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(7, 4, name="embed")(x)
            x = nn.LayerNorm(name="norm")(x)
            x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
            return nn.Dense(7, name="head")(nn.gelu(x))

    model, ids = Model(), tokens(2, 3, size=7)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    params = jax.tree.map(lambda x: draw(*x.shape), shapes)
    proj = {f"attention/{n}/{k}": v for n in ("query", "key", "value", "out") for k, v in
            (("kernel", ["dense"]), ("bias", ["bias"]))}  # fmt: skip
    kinds = {"embed/embedding": ["embedding"], "norm/scale": ["scale"], "norm/bias": ["bias"], **proj,
             "head/kernel": ["dense"], "head/bias": ["bias"]}  # fmt: skip
    kinds = {f"params/{k}": v for k, v in kinds.items()}
    return lambda p, ids: cross_entropy(model.apply(p, ids), ids[:, ::-1]), params, (ids,), kinds


@case
def nnx_split():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3,), rngs=rngs)
            self.norm = nnx.RMSNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.out = nnx.LinearGeneral((4,), (2, 3), rngs=rngs)

        def __call__(self, x):
            return self.drop(self.out(self.norm(nnx.relu(self.conv(x)))))

    graph, state, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    state = jax.tree.map(lambda x: draw(*x.shape), state)

    def loss(state, rest, x):
        return jnp.sum(jnp.tanh(nnx.merge(graph, state, rest)(x)))

    kinds = {"conv/kernel": ["conv"], "conv/bias": ["bias"], "norm/scale": ["scale"], "out/kernel": ["dense"],
             "out/bias": ["bias"]}  # fmt: skip
    return loss, state, (rest, draw(2, 5, 2)), kinds


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["activation"])
class Linear:
    """As in equinox: the module itself is the pytree, kernels are ``[out, in]`` and models see one example."""

    def __init__(self, weight, bias, activation):
        self.weight, self.bias, self.activation = weight, bias, activation

    def __call__(self, x):
        return self.activation(self.weight @ x + self.bias)


@case
def module_as_pytree():
    model = [Linear(draw(4, 3), draw(4), jnp.tanh), Linear(draw(2, 4), None, jax.nn.silu)]
    model[1].bias = draw(2)

    def loss(model, x):
        return jnp.sum(jax.vmap(lambda one: model[1](model[0](one)))(x))

    kinds = {"0/weight": ["dense"], "0/bias": ["bias"], "1/weight": ["dense"], "1/bias": ["bias"]}
    return loss, model, (draw(5, 3),), kinds


def block(p, x, mask=None):
    """One pre-norm transformer layer, einsum projections with kernels ``[in, heads, dim]``."""
    h = rms(x) * p["norm"]
    q, k, v = (jnp.einsum("bsd,dnh->bsnh", h, p[name]) for name in "qkv")
    logits = jnp.einsum("bsnh,btnh->bnst", q, k)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, -1e9)
    mixed = jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(logits), v)
    x = x + jnp.einsum("bsnh,nhd->bsd", mixed, p["o"])
    return x + jax.nn.silu(rms(x) @ p["up"]) @ p["down"]


def block_params(*lead):
    shapes = {
        "norm": (4,),
        "q": (4, 2, 3),
        "k": (4, 2, 3),
        "v": (4, 2, 3),
        "o": (2, 3, 4),
        "up": (4, 5),
        "down": (5, 4),
    }
    return {name: draw(*lead, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


BLOCK = {"norm": ["scale"], **{name: ["dense"] for name in ("q", "k", "v", "o", "up", "down")}}


@case
def tied_transformer_with_padding():
    params = {"embed": draw(7, 4), "position": draw(6, 4), **block_params()}

    def loss(p, ids, mask):
        x = p["embed"][ids] + p["position"][: ids.shape[1]]
        logits = block(p, x, mask) @ p["embed"].T
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0]
        return -jnp.sum(logp * mask) / jnp.maximum(jnp.sum(mask), 1)

    mask = jnp.asarray([[1, 1, 1], [1, 0, 0]], jnp.int32)
    kinds = {"embed": ["embedding", "dense"], "position": ["bias"], **BLOCK}
    return loss, params, (tokens(2, 3, size=7), mask), kinds


@case
def head_stored_by_vocabulary():
    params = {"head": draw(7, 4), "bias": draw(7)}

    def loss(p, x, y):
        return cross_entropy(x @ p["head"].T + p["bias"], y) + cross_entropy(jnp.dot(x, p["head"].transpose(1, 0)), y)

    return loss, params, (draw(2, 3, 4), tokens(2, 3, size=7)), {"head": ["dense", "dense"], "bias": ["bias"]}


@case
def inside_jit():
    layer = jax.jit(lambda w, b, x: jnp.tanh(x @ w + b))
    twice = jax.jit(lambda p, x: layer(p["w"], p["b"], layer(p["w"], p["b"], x)))
    kinds = {"w": ["dense", "dense"], "b": ["bias", "bias"]}
    return lambda p, x: jnp.sum(twice(p, x)), {"w": draw(3, 3), "b": draw(3)}, (draw(2, 3),), kinds


@case
def checkpointed():
    step = jax.checkpoint(lambda p, x: block(p, x))
    return lambda p, x: jnp.sum(step(p, x) ** 2), block_params(), (draw(2, 3, 4),), BLOCK


@case
def checkpointed_with_a_policy():
    save = jax.checkpoint_policies.save_only_these_names("up")

    @functools.partial(jax.checkpoint, policy=save, prevent_cse=False)
    def step(p, x):
        h = checkpoint_name(x @ checkpoint_name(p["up"], "kernel"), "up")
        return jnp.tanh(h) @ p["down"]

    kinds = {"up": ["dense", "dense"], "down": ["dense", "dense"]}
    params = {"up": draw(4, 5), "down": draw(5, 4)}
    return lambda p, x: jnp.sum(step(p, step(p, x))), params, (draw(3, 4),), kinds


@case
def scanned_layers():
    def loss(p, x, mask):
        return jnp.sum(jax.lax.scan(lambda x, layer: (block(layer, x, mask), None), x, p)[0] ** 2)

    return loss, block_params(3), (draw(2, 3, 4), jnp.asarray([[True] * 3, [True, False, False]])), BLOCK


@case
def checkpoint_in_scan():
    def loss(p, x):
        body = jax.checkpoint(lambda x, layer: (block(layer, x), jnp.mean(x)), prevent_cse=False)
        x, means = jax.lax.scan(body, x, p)
        return jnp.sum(x**2) + jnp.sum(means)

    return loss, block_params(3), (draw(2, 3, 4),), BLOCK


@case
def scan_in_checkpoint():
    @jax.checkpoint
    def stack(p, x):
        return jax.lax.scan(lambda x, layer: (block(layer, x), None), x, p)[0]

    return lambda p, x: jnp.sum(stack(p, x) ** 2), block_params(3), (draw(2, 3, 4),), BLOCK


@case
def nested_scans():
    def loss(p, x):
        def outer(x, group):
            def inner(x, layer):
                return jnp.tanh(x @ layer["w"] + group["b"] + p["shared"] * x), None

            return jax.lax.scan(inner, x, group["inner"])[0], None

        return jnp.sum(jax.lax.scan(outer, x, p["groups"])[0])

    params = {"groups": {"inner": {"w": draw(2, 3, 4, 4)}, "b": draw(2, 4)}, "shared": draw(4)}
    return loss, params, (draw(5, 4),), {"groups/inner/w": ["dense"], "groups/b": ["bias"], "shared": ["scale"]}


@case
def chunked_cross_entropy():
    def loss(p, ids, y):
        x = jnp.tanh(p["embed"][ids] @ p["w"])
        x, y = x.reshape(3, 2, 4), y.reshape(3, 2)

        @jax.checkpoint
        def chunk(total, xy):
            return total + cross_entropy(xy[0] @ p["embed"].T, xy[1]), None

        return jax.lax.scan(chunk, jnp.zeros(()), (x, y))[0]

    params = {"embed": draw(7, 4), "w": draw(4, 4)}
    kinds = {"embed": ["embedding", "dense"], "w": ["dense"]}
    return loss, params, (tokens(6, size=7), tokens(6, 1, size=7)[:, 0]), kinds


@case
def norms():
    def loss(p, x):
        x = rms(x) * (1 + p["rms"])
        x = (x - jnp.mean(x, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5)
        x = x * (0.5 * p["scale"] - 1) / 1.5 + p["bias"] / 3
        return jnp.sum(jnp.tanh(x - p["shift"]) @ p["w"])

    params = {"rms": draw(4), "scale": draw(4), "bias": draw(4), "shift": draw(4), "w": draw(4, 2)}
    kinds = {"rms": ["scale"], "scale": ["scale"], "bias": ["bias"], "shift": ["bias"], "w": ["dense"]}
    return loss, params, (draw(2, 3, 4),), kinds


@case
def convolutions():
    def loss(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        convolve = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=numbers)
        x = convolve(x, p["a"], (2, 1), "SAME", rhs_dilation=(1, 2)) + p["b"]
        return jnp.sum(convolve(jnp.tanh(x), p["grouped"], (1, 1), "VALID", feature_group_count=2) ** 2)

    params = {"a": draw(3, 2, 2, 4), "b": draw(4), "grouped": draw(2, 1, 2, 6)}
    return loss, params, (draw(2, 5, 4, 2),), {"a": ["conv"], "b": ["bias"], "grouped": ["conv"]}


@case
def attention_by_vmap_over_heads():
    def head(q, k, v, x):
        return jax.nn.softmax((x @ q) @ (x @ k).T) @ (x @ v)

    def loss(p, x):
        heads = jax.vmap(head, (1, 1, 1, None), 1)
        return jnp.sum(jax.vmap(lambda one: heads(p["q"], p["k"], p["v"], one))(x) ** 2)

    params = {name: draw(4, 2, 3, seed=i) for i, name in enumerate("qkv")}
    return loss, params, (draw(2, 5, 4),), {name: ["dense"] for name in "qkv"}


@case
def embedding_under_vmap():
    def loss(p, ids):
        return jnp.sum(jax.vmap(lambda one: jnp.tanh(jnp.take(p["table"], one, axis=0)) @ p["w"])(ids))

    return (
        loss,
        {"table": draw(7, 4), "w": draw(4, 2)},
        (tokens(2, 3, size=7),),
        {"table": ["embedding"], "w": ["dense"]},
    )


@case
def functions_of_parameters_alone():
    def loss(p, x):
        kernel = p["v"] / jnp.sqrt(jnp.sum(p["v"] ** 2, axis=0)) * p["g"]
        merged = p["w"] + p["a"] @ jnp.tanh(p["b"])
        return jnp.sum(jnp.tanh(x @ kernel) @ merged) + 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))

    params = {"v": draw(3, 4), "g": draw(4), "w": draw(4, 2), "a": draw(4, 1), "b": draw(1, 2)}
    kinds = {"v": ["generic", "generic", "generic"], **{n: ["generic", "generic"] for n in "gwab"}}
    return loss, params, (draw(5, 3),), kinds


@case
def cut_and_joined():
    def loss(p, x):
        joined = jnp.concatenate([p["q"], p["k"]], axis=1)
        up, gate = jnp.split(p["fused"], 2, axis=1)
        (first, second) = p["pair"]
        left, right = jnp.unstack(p["columns"], axis=1)
        scales = p["scales"][::-1][1:]
        return (
            jnp.sum(jnp.tanh(x @ joined) ** 2)
            + jnp.sum((x @ up) * (x @ gate) * first + second + x[:, :2] * scales)
            + jnp.sum(jnp.sin(x * left + right))
        )

    params = {"q": draw(3, 2), "k": draw(3, 4), "fused": draw(3, 4), "pair": draw(2, 2), "scales": draw(3),
              "columns": draw(3, 2)}  # fmt: skip
    kinds = {"q": ["generic"], "k": ["generic"], "fused": ["dense", "dense"], "pair": ["scale", "bias"],
             "scales": ["scale"], "columns": ["scale", "bias"]}  # fmt: skip
    return loss, params, (draw(5, 3),), kinds


@jax.custom_vjp
def half_gradient(w, x):
    return x @ w


half_gradient.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (0.5 * (kept[1].T @ g), g @ kept[0].T))


@jax.custom_jvp
def straight_through(w):
    return jnp.round(w)


straight_through.defjvp(lambda primals, tangents: (jnp.round(primals[0]), 3 * tangents[0]))


@case
def custom_rules():
    def loss(p, x):
        return jnp.sum(jnp.tanh(half_gradient(p["a"], x)) @ straight_through(p["b"]))

    return loss, {"a": draw(3, 4), "b": draw(4, 2)}, (draw(5, 3),), {"a": ["generic"], "b": ["generic"]}


@case
def branches():
    def loss(p, x, flag):
        x = jax.lax.cond(flag, lambda x: x @ p["a"], lambda x: x @ p["b"], x)
        return jnp.sum(jax.lax.switch(jnp.asarray(1), [jnp.sin, lambda x: x * p["c"]], x))

    params = {"a": draw(3, 4), "b": draw(3, 4, seed=1), "c": draw(4)}
    return loss, params, (draw(5, 3), jnp.asarray(True)), {n: ["generic"] for n in "abc"}


@case
def loops():
    def loss(p, x):
        frozen = jax.lax.stop_gradient(p["a"])
        x = jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ frozen)), (0, x))[1]
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["b"]), x)
        return jnp.sum(jax.lax.map(lambda row: row @ p["c"] + jnp.float32(1), x))

    params = {"a": draw(3, 3), "b": draw(3, 3, seed=1), "c": draw(3, 2)}
    return loss, params, (draw(5, 3),), {"a": [], "b": ["dense"], "c": ["dense"]}


@case
def lstm():
    def loss(p, x):
        def cell(carry, now):
            c, h = carry
            i, f, g, o = jnp.split(now @ p["in"] + h @ p["rec"] + p["bias"], 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        start = jnp.broadcast_to(p["start"], (2, 3))
        (_, last), hs = jax.lax.scan(cell, (start, start), x, reverse=True)
        return jnp.sum(hs**2) + jnp.sum(last)

    params = {"in": draw(2, 12), "rec": draw(3, 12), "bias": draw(12), "start": draw(3)}
    kinds = {"in": ["dense"], "rec": ["dense"], "bias": ["bias"], "start": ["generic", "generic"]}
    return loss, params, (draw(4, 2, 2),), kinds


@case
def parameters_carried_and_returned_by_a_loop():
    def loss(p, x):
        def step(carry, layer):
            x, w = carry
            return (jnp.tanh(x @ w), w * 1.5), layer["b"] * 2

        (x, w), biases = jax.lax.scan(step, (x, p["w"]), p["layers"])
        return jnp.sum((x @ w) * jnp.sum(biases, axis=0))

    params = {"w": draw(3, 3), "layers": {"b": draw(2, 3)}}
    return loss, params, (draw(5, 3),), {"w": ["generic"], "layers/b": ["generic"]}


@case
def odd_uses():
    def loss(p, x, i):
        picked = jax.lax.dynamic_index_in_dim(p["stack"], i, keepdims=False)
        x = x @ picked + p["table"][jnp.array([0, 1, 1]), jnp.array([1, 0, 2])]
        x = jnp.where(x > 0, x, p["slope"] * x) / (2 + p["divisor"] ** 2) + x * p["stack"].sum((0, 1))
        return jnp.sum(x) * p["scalar"] + p["alone"]

    params = {"stack": draw(2, 3, 3), "table": draw(2, 3), "slope": draw(3), "divisor": draw(3),
              "scalar": draw(1)[0], "alone": draw(1)[0]}  # fmt: skip
    kinds = {"stack": ["generic", "generic"], "table": ["generic"], "slope": ["scale"], "divisor": ["generic"],
             "scalar": ["scale"], "alone": ["bias"]}  # fmt: skip
    return loss, params, (draw(3, 3), jnp.asarray(1)), kinds


def decoder(config, kinds):
    apply_fn = models.from_config(config).apply
    params = jax.tree.map(lambda x: x + draw(*x.shape), models.init_params(config, jax.random.key(0)))
    return lambda p, ids: cross_entropy(apply_fn(p, ids), ids), params, (tokens(1, 3, size=7),), kinds


SMALL = dict(vocab_size=7, width=4, num_layers=2, num_heads=2, head_size=2, mlp_size=6, max_positions=5)
PROJECTIONS = ("attention/q", "attention/k", "attention/v", "attention/o", "mlp/up", "mlp/down")


@case
def decoder_like_llama():
    kinds = {"embedding": ["embedding", "dense"], "final_norm/scale": ["scale"]}
    kinds |= {f"layers/{name}/kernel": ["dense"] for name in (*PROJECTIONS, "mlp/gate")}
    kinds |= {f"layers/{name}_norm/scale": ["scale"] for name in ("attention", "mlp")}
    return decoder(models.DecoderConfig(**SMALL, num_kv_heads=1, rope_base=100.0, tied=True), kinds)


@case
def decoder_like_gpt2():
    config = models.DecoderConfig(
        **SMALL, num_kv_heads=2, norm="layer", positions="learned", activation="gelu_tanh", gated=False,
        qkv_bias=True, out_bias=True, mlp_bias=True, tied=False,
    )  # fmt: skip
    kinds = {"embedding": ["embedding"], "positions": ["bias"], "head": ["dense"]}
    kinds |= {f"layers/{name}/kernel": ["dense"] for name in PROJECTIONS}
    kinds |= {f"layers/{name}/bias": ["bias"] for name in PROJECTIONS}
    for name in ("layers/attention_norm", "layers/mlp_norm", "final_norm"):
        kinds |= {f"{name}/scale": ["scale"], f"{name}/bias": ["bias"]}
    return decoder(config, kinds)

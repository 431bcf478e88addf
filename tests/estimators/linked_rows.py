"""Models whose rows depend on each other, and models that look as if they did: ``apply_fn(params, x [B, D])``."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

B, D, K, E = 4, 3, 5, 2


def params():
    rng = np.random.default_rng(0)
    shapes = {"w": (D, D), "head": (D, K), "scale": (D,), "table": (6, D), "gate": (D, E), "experts": (E, D, D)}
    return {name: jnp.asarray(0.7 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def inputs():
    return jnp.asarray(np.random.default_rng(1).standard_normal((B, D)), jnp.float32)


def between(middle):
    """A model with something in the middle: ``middle(params, h)``."""
    return lambda params, x: jnp.tanh(middle(params, x @ params["w"])) @ params["head"]


def normalised(h, axis=0):
    return (h - h.mean(axis, keepdims=True)) * jax.lax.rsqrt(h.var(axis, keepdims=True) + 1e-3)


def linen_batch_norm(running):
    norm = nn.BatchNorm(use_running_average=running, use_bias=False)
    stats = {"mean": jnp.zeros(D), "var": jnp.ones(D)}

    def middle(params, h):
        found, _ = norm.apply(
            {"params": {"scale": params["scale"]}, "batch_stats": stats}, h, mutable=["batch_stats"]
        )
        return found

    return between(middle)


def nnx_batch_norm(running):
    from flax import nnx

    def middle(params, h):
        norm = nnx.BatchNorm(D, use_running_average=running, use_bias=False, rngs=nnx.Rngs(0))
        norm.scale = nnx.Param(params["scale"])
        return norm(h)

    return between(middle)


def keep(key, shape):
    """The same in both precisions."""
    return jax.random.uniform(key, shape, jnp.float32) < 0.6


def dropout(key_of):
    def middle(params, h):
        kept = keep(key_of(h), h.shape)
        return jnp.where(kept, h / 0.6, 0)

    return between(middle)


def scanned_over_rows(params, h):
    return jax.lax.scan(lambda c, x: (0.5 * c + x, c + x), jnp.zeros(D), h)[1]


def layers(mix):
    def middle(params, h):
        return jax.lax.scan(lambda h, w: (jnp.tanh(mix(h) @ w), None), h, params["experts"])[0]

    return between(middle)


def routed(capacity):
    """Sparse experts: every token of the batch goes to its best expert, which takes the first few of them."""

    def middle(params, h):
        gates = jax.nn.softmax(h @ params["gate"])
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), E, dtype=jnp.int32)
        place = jnp.cumsum(chosen, 0) * chosen - 1
        dispatch = jax.nn.one_hot(place, capacity, dtype=h.dtype)
        inside = jnp.einsum("tec,td->ecd", dispatch, h)
        outside = jnp.tanh(jnp.einsum("ecd,edf->ecf", inside, params["experts"]))
        return jnp.einsum("tec,ecf,te->tf", dispatch, outside, gates)

    return between(middle)


def dense_experts(top):
    def middle(params, h):
        gates = jax.nn.softmax(h @ params["gate"])
        gates = jnp.where(gates >= jax.lax.top_k(gates, top)[0][:, -1:], gates, 0)
        return jnp.einsum("te,tef->tf", gates, jnp.einsum("td,edf->tef", h, params["experts"]))

    return between(middle)


def until_all_are_small(params, h):
    held = jax.lax.stop_gradient(h)
    return h + jax.lax.while_loop(lambda h: jnp.any(jnp.abs(h) > 0.3), lambda h: 0.5 * h, held)


@jax.custom_jvp
def centred(h):
    return h - h.mean(0)


centred.defjvp(lambda primals, tangents: (centred(*primals), tangents[0] - tangents[0].mean(0)))


def by_axis_name(params, x):
    def one(x):
        h = x @ params["w"]
        return jnp.tanh(h - jax.lax.pmean(h, "batch")) @ params["head"]

    return jax.vmap(one, axis_name="batch")(x)


def row_keys(h):
    return jax.random.split(jax.random.key(3), h.shape[0])


# What links the rows, and the operation that the sentence names.
LINKED = {
    "batch norm by hand": (between(lambda p, h: p["scale"] * normalised(h)), "reduce_sum"),
    "batch norm of linen": (linen_batch_norm(False), "reduce_sum"),
    "batch norm of nnx": (nnx_batch_norm(False), "reduce_sum"),
    "batch norm of groups": (between(lambda p, h: normalised(h.reshape(2, -1, D), 1).reshape(h.shape)), "reduce_sum"),
    "batch norm under remat": (between(jax.checkpoint(lambda p, h: p["scale"] * normalised(h))), "reduce_sum"),
    "batch norm in layers": (layers(normalised), "reduce_sum"),
    "batch norm without gradient": (
        between(lambda p, h: h - jax.lax.stop_gradient(h.mean(0))), "reduce_sum"),
    "a custom derivative": (between(lambda p, h: centred(h)), "reduce_sum"),
    "a mean over a named axis": (by_axis_name, "psum"),
    "dropout of the batch's shape": (dropout(lambda h: jax.random.key(3)), "random_bits"),
    "dropout with keys by place": (
        between(lambda p, h: jax.vmap(lambda k, x: x * keep(k, x.shape))(row_keys(h), h)),
        "random"),
    "dropout in a map over rows": (
        between(lambda p, h: jax.lax.map(
            lambda given: given[1] * keep(given[0], (D,)), (row_keys(h), h))), "random"),
    "the mean of the batch": (between(lambda p, h: h - h.mean(0)), "reduce_sum"),
    "the largest of the batch": (between(lambda p, h: h / jnp.abs(h).max()), "reduce_max"),
    "softmax over rows": (between(lambda p, h: jax.nn.softmax(h, 0)), "reduce_max"),
    "attention of rows to rows": (between(lambda p, h: jax.nn.softmax(h @ h.T) @ h), "reduce_max"),
    "a row's neighbour": (between(lambda p, h: h + jnp.roll(h, 1, 0)), "add"),
    "the first row": (between(lambda p, h: h - h[:1]), "sub"),
    "a running sum over rows": (between(lambda p, h: jnp.cumsum(h, 0)), "cumsum"),
    "sorted rows": (between(lambda p, h: jnp.sort(h, 0)), "sort"),
    "a scan over rows": (between(scanned_over_rows), "scan"),
    "a matrix over rows": (between(lambda p, h: (p["w"][0, 0] * jnp.ones((B, B))) @ h), "dot_general"),
    "rows reversed": (lambda p, x: between(lambda p, h: h)(p, x)[::-1], "rows 3, 2, 1, 0"),
    "rows rolled": (lambda p, x: jnp.roll(between(lambda p, h: h)(p, x), 1, 0), "rows 3, 0, 1, 2"),
    "a learned table by place": (between(lambda p, h: h + p["table"][: h.shape[0]]), "add"),
    "a constant table by place": (
        between(lambda p, h: h * (1 + jnp.arange(h.shape[0], dtype=h.dtype))[:, None]), "mul"),
    "the number of rows": (between(lambda p, h: h / h.shape[0]), "div"),
    "a branch on the batch": (
        between(lambda p, h: jax.lax.cond(h.mean() > 0, lambda h: h, lambda h: 2 * h, h)), "reduce_sum"),
    "a loop for the whole batch": (between(until_all_are_small), "reduce_or"),
    "experts with room for few": (routed(1), "cumsum"),
}  # fmt: skip


def attention(params, h):
    x = jnp.stack([h, jnp.flip(h, 1), 2 * h], 1)
    real = jnp.arange(3) < 2 + (h[:, :1] > 0)
    scores = jnp.where(real[:, None] & jnp.tril(jnp.ones((3, 3), bool)), jnp.einsum("bqd,bkd->bqk", x, x), -1e9)
    return (jax.nn.softmax(scores) @ x)[:, -1]


def last_token(params, h):
    x = jnp.stack([h, jnp.flip(h, 1), 2 * h], 1)
    return x[jnp.arange(x.shape[0]), 1 + (h[:, 0] > 0)]


def recurrent(params, h):
    x = jnp.stack([h, jnp.flip(h, 1)])
    start = jnp.zeros((h.shape[0], D))
    return jax.lax.scan(lambda c, x: (jnp.tanh(c @ params["w"] + x), None), start, x)[0]


def one_row(params, x):
    return jnp.tanh(x @ params["w"]) @ params["head"]


def forgotten_statistics(params, h):
    found = {"mean": h.mean(0)}
    return h + 0 * len(found)


# Rows stand alone, and the program says so.
OPEN = {
    "vmap": jax.vmap(one_row, (None, 0)),
    "map over rows": lambda p, x: jax.lax.map(functools.partial(one_row, p), x),
    "map over rows, two at once": lambda p, x: jax.lax.map(functools.partial(one_row, p), x, batch_size=2),
    "layers": layers(lambda h: h),
    "remat": between(jax.checkpoint(lambda p, h: jnp.tanh(h * p["scale"]))),
    "attention": between(attention),
    "the last token of every row": between(last_token),
    "a recurrence": between(recurrent),
    "dense experts": dense_experts(E),
    "the best of dense experts": dense_experts(1),
    "running statistics of linen": linen_batch_norm(True),
    "running statistics of nnx": nnx_batch_norm(True),
    "statistics that go nowhere": between(forgotten_statistics),
    "a norm of features": between(lambda p, h: normalised(h, -1)),
    "dropout with one mask for all rows": between(
        lambda p, h: h * keep(jax.random.key(0), (D,))),
    "positions of every row": between(
        lambda p, h: h + p["table"][jnp.tile(jnp.arange(D), (h.shape[0], 1))].sum(-1)),
    "reversed and back": between(lambda p, h: (2 * h[::-1] + 1)[::-1]),
    "a mask of ones": between(lambda p, h: jnp.where(np.ones((h.shape[0], 1), bool), h, 0)),
    "a factor of ones": between(lambda p, h: h * np.ones((h.shape[0], 1), np.float32)),
}  # fmt: skip

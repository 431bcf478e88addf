"""The decoder itself, as Flax nnx modules whose layers are stacked and scanned."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fisher_jax._support.dtypes import wide
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.dense import Dense, along_last, normal
from fisher_jax.models.experts import Experts

__all__ = ["Decoder"]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Norm(nnx.Module):
    """Over the last axis, in float32: ``x / sqrt(mean(x^2) + eps) * scale``, or ``* (1 + scale)``; with
    ``norm="layer"`` the mean is subtracted first and a bias added last. The result has the dtype of ``x``."""

    def __init__(self, shape: tuple[int, ...], config: DecoderConfig, dtype):
        self.config = config
        # What multiplies is one at first.
        start = jnp.zeros if config.norm_plus_one else jnp.ones
        self.scale = nnx.Param(start(shape, dtype)) if config.norm_scale else None
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if config.norm == "layer" and config.norm_bias else None

    def __call__(self, x):
        y = x.astype(jnp.float32)
        if self.config.norm == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.config.norm_eps)
        if self.scale is not None:
            scale = along_last(self.scale[...].astype(jnp.float32), y)
            y = y * (1 + scale if self.config.norm_plus_one else scale)
        if self.bias is not None:
            y = y + along_last(self.bias[...].astype(jnp.float32), y)
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention with grouped key and value heads; logits and softmax in float32."""

    def __init__(self, config: DecoderConfig, dtype, rngs: nnx.Rngs):
        self.config = config
        q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q = Dense(config.width, q_size, config.qkv_bias, dtype, rngs)
        self.k = Dense(config.width, kv_size, config.qkv_bias, dtype, rngs)
        self.v = Dense(config.width, kv_size, config.qkv_bias, dtype, rngs)
        self.o = Dense(q_size, config.width, config.out_bias, dtype, rngs)
        self.q_norm = self.qk_norm(config.num_heads, dtype)
        self.k_norm = self.qk_norm(config.num_kv_heads, dtype)

    def qk_norm(self, num_heads: int, dtype) -> Norm | None:
        size = self.config.head_size
        shapes = {"head": (size,), "heads": (num_heads, size), "width": (num_heads * size,)}
        return Norm(shapes[self.config.qk_norm_scope], self.config, dtype) if self.config.qk_norm else None

    def __call__(self, x, rotary, window):
        rows, length, _ = x.shape
        config = self.config

        def heads(x, norm=None):
            whole = config.qk_norm_scope == "width"
            x = norm(x) if norm is not None and whole else x
            x = x.reshape(rows, length, -1, config.head_size)
            return norm(x) if norm is not None and not whole else x

        q, k, v = heads(self.q(x), self.q_norm), heads(self.k(x), self.k_norm), heads(self.v(x))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mixed = causal_attention(
            q, k, v, scale=config.attention_scale, soft_cap=config.attention_soft_cap, window=window
        )
        return self.o(mixed.reshape(rows, length, -1))


def causal_attention(q, k, v, *, scale: float | None = None, soft_cap: float | None = None, window=None):
    """``softmax(q k^T / sqrt(head_size)) v`` over the present and the past; q ``[B, S, N, H]``, k and v
    ``[B, S, K, H]`` with ``N`` a multiple of ``K``; the result has the shape and dtype of q.

    ``scale`` stands in for ``1 / sqrt(head_size)``, ``soft_cap`` bounds the logits, and ``window`` (a number or a
    scalar of the loop over layers) is how many positions are seen, the present one included.

    Queries go in at most eight blocks of 128 or more, each against the keys up to its own end, so most of the
    masked triangle is never computed; the query heads of one key head are rows of one product. On two CPU
    cores this takes a third to a half of the time of `jax.nn.dot_product_attention`, gradients included.
    """
    rows, length, num_heads, head_size = q.shape
    num_kv_heads, group = k.shape[2], num_heads // k.shape[2]
    q = q.reshape(rows, length, num_kv_heads, group, head_size).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    block = max(128, -(-length // 8))
    mixed = []
    for start in range(0, length, block):
        end = min(start + block, length)
        queries = q[:, :, :, start:end].reshape(rows, num_kv_heads, group * (end - start), head_size)
        logits = jnp.einsum("bkqh,bksh->bkqs", queries, k[:, :, :end], preferred_element_type=jnp.float32)
        logits = logits * (head_size**-0.5 if scale is None else scale)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        past = np.tile(np.arange(start, end)[:, None] - np.arange(end)[None, :], (group, 1))
        seen = past >= 0 if window is None else (past >= 0) & (past < window)
        logits = jnp.where(seen[None, None], logits, -1e30)
        # Softmax does not change with the shift, so neither do its derivatives of any order.
        shift = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - shift)
        values = v[:, :, :end]
        total = jnp.sum(weights, axis=-1, keepdims=True)
        summed = jnp.einsum("bkqs,bksh->bkqh", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
        mixed.append((summed / total).reshape(rows, num_kv_heads, group, end - start, head_size))
    joined = jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4)
    return joined.reshape(rows, length, num_heads, head_size).astype(v.dtype)


def rotary_tables(config: DecoderConfig, length: int, *, local: bool = False):
    """``cos`` and ``sin`` of ``position * frequency``, ``[1, length, 1, rope_size / 2]`` float32.

    ``frequency_i = base^(-2 i / rope_size) / divisor_i``; the angles are taken in float64 on the host,
    since in float32 they would be off by 5e-4 at position 8,192. ``local``: the table of layers with a window.
    """
    size, base = config.rotary_size, config.rope_base
    if local and config.local_rope_base is not None:
        base = config.local_rope_base
    divisors = config.rope_divisors
    if config.rope_original_positions is not None and length > config.rope_original_positions:
        divisors = config.rope_divisors_long
    frequencies = base ** (-2.0 * np.arange(size // 2) / size)
    if divisors is not None and not local:
        frequencies = frequencies / np.array(divisors)
    angles = (np.arange(length)[:, None] * frequencies[None, :])[None, :, None, :]
    amplitude = 1.0 if local else config.rope_amplitude
    return tuple(jnp.asarray(amplitude * f(angles), jnp.float32) for f in (np.cos, np.sin))


def rotate(x, cos, sin):
    """Rotary embedding, half-split form: coordinates ``i`` and ``i + rope_size / 2`` turn by one angle, and those
    from ``rope_size`` on stay."""
    half = cos.shape[-1]
    y = x.astype(jnp.float32)
    first, second = y[..., :half], y[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if x.shape[-1] > 2 * half:
        parts.append(y[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


class Mlp(nnx.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where the configuration is not gated."""

    def __init__(self, config: DecoderConfig, dtype, rngs: nnx.Rngs):
        self.activation = config.activation
        gate = Dense(config.width, config.mlp_size, config.mlp_bias, dtype, rngs) if config.gated else None
        self.gate = gate
        self.up = Dense(config.width, config.mlp_size, config.mlp_bias, dtype, rngs)
        self.down = Dense(config.mlp_size, config.width, config.mlp_bias, dtype, rngs)

    def __call__(self, x):
        act = ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, or both at once; norms where the configuration says."""

    def __init__(self, config: DecoderConfig, dtype, rngs: nnx.Rngs):
        self.config = config

        def norm(wanted: bool) -> Norm | None:
            return Norm((config.width,), config, dtype) if wanted else None

        before, after = (config.norm_placement in (place, "around") for place in ("before", "after"))
        self.attention_norm = norm(before)
        self.attention = Attention(config, dtype, rngs)
        self.attention_post_norm = norm(after)
        self.mlp_norm = norm(before and config.residual != "parallel_one_norm")
        mixed = config.num_experts is not None
        own = ACTIVATIONS[config.activation]
        self.mlp = Experts(config, own, dtype, rngs) if mixed else Mlp(config, dtype, rngs)
        self.mlp_post_norm = norm(after)

    def __call__(self, x, rotary, window):
        def normed(norm, x):
            return x if norm is None else norm(x)

        def added(norm, x):
            x, multiplier = normed(norm, x), self.config.residual_multiplier
            return x if multiplier == 1.0 else x * multiplier

        first = normed(self.attention_norm, x)
        mixed = added(self.attention_post_norm, self.attention(first, rotary, window))
        if self.config.residual == "sequential":
            x = x + mixed
            return x + added(self.mlp_post_norm, self.mlp(normed(self.mlp_norm, x)))
        second = first if self.mlp_norm is None else self.mlp_norm(x)
        return x + mixed + added(None, self.mlp(second))


class Decoder(nnx.Module):
    """Tokens ``[B, S]`` to the hidden states ``[B, S, D]`` that the head multiplies: final-normed, times
    ``logit_multiplier``.

    Everything between the weights is at least float32, whatever they are stored in.

    ``layers`` holds one `Layer` whose parameters have a leading axis of ``num_layers``; it is scanned, so
    compile time does not grow with depth. What differs between layers beside their parameters is scanned too.
    """

    def __init__(self, config: DecoderConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, config.width), dtype))
        learned = config.positions == "learned"
        shape = (config.max_positions, config.width)
        self.positions = nnx.Param(normal(rngs.params(), shape, dtype)) if learned else None
        make_layer = nnx.vmap(lambda keys: Layer(config, dtype, nnx.Rngs(keys)))
        self.layers = make_layer(jax.random.split(rngs.params(), config.num_layers))
        self.final_norm = Norm((config.width,), config, dtype)
        head = None if config.tied else nnx.Param(normal(rngs.params(), (config.vocab_size, config.width), dtype))
        self.head = head
        self.head_bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype)) if config.head_bias else None

    def __call__(self, tokens):
        config, length = self.config, tokens.shape[1]
        x = wide(jnp.take(self.embedding[...], tokens, axis=0))
        if config.embedding_multiplier != 1.0:
            x = x * config.embedding_multiplier
        if self.positions is not None:
            x = x + wide(self.positions[...][None, :length])
        graphdef, stacked = nnx.split(self.layers)
        tables = rotary_choices(config, length) if config.positions == "rotary" else []

        def step(x, scanned):
            layer, kinds = scanned
            rotary = tables[0] if tables else None
            if "other_rotary" in kinds and tables:
                rotary = tuple(jnp.where(kinds["other_rotary"], b, a) for a, b in zip(*tables, strict=True))
            return nnx.merge(graphdef, layer)(x, rotary, kinds.get("window", config.window)), None

        x, _ = jax.lax.scan(step, x, (stacked, layer_kinds(config)))
        x = self.final_norm(x)
        return x if config.logit_multiplier == 1.0 else x * config.logit_multiplier


def rotary_choices(config: DecoderConfig, length: int):
    """The tables of most layers and those of the others, which turn by another base or not at all."""
    tables = rotary_tables(config, length)
    if config.local_rope_base is not None:
        return [tables, rotary_tables(config, length, local=True)]
    return [tables, (jnp.ones_like(tables[0]), jnp.zeros_like(tables[1]))]


def layer_kinds(config: DecoderConfig) -> dict[str, jax.Array]:
    """What differs between layers, ``[L]`` each: the window, and whether the other rotary tables are theirs."""
    kinds, windows = {}, np.array(config.window_layers or (True,) * config.num_layers)
    if config.window is not None and not windows.all():
        kinds["window"] = jnp.asarray(np.where(windows, config.window, np.iinfo(np.int32).max), jnp.int32)
    if config.local_rope_base is not None:
        kinds["other_rotary"] = jnp.asarray(windows)
    elif config.rope_layers is not None:
        kinds["other_rotary"] = ~jnp.asarray(config.rope_layers)
    return kinds

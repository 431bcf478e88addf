"""Small models as the packages of others ship them, or as their tutorials build them.

Each builder takes a length and gives ``(apply_fn, params, inputs)``; sequences have outputs ``[B, S, K]``, the others
``[B, K]``. With a length of 1 every parameter is used at one position.
"""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

os.environ.setdefault("KERAS_BACKEND", "jax")
ROWS, WIDTH, LABELS, VOCABULARY = 3, 6, 4, 9


def features(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def tokens(length):
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, (ROWS, length)), jnp.int32)


def images(length):
    return features(ROWS, length, length, 2)


def haiku_mlp(length):
    import haiku as hk

    del length
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, LABELS], activation=jnp.tanh)(x)))
    x = features(ROWS, WIDTH)
    return model.apply, model.init(jax.random.key(0), x), x


def haiku_lstm(length):
    import haiku as hk

    def forward(x):
        core = hk.LSTM(5)
        hidden, _ = hk.dynamic_unroll(core, jnp.swapaxes(x, 0, 1), core.initial_state(x.shape[0]))
        return hk.Linear(LABELS)(jnp.swapaxes(hidden, 0, 1))

    model, x = hk.without_apply_rng(hk.transform(forward)), features(ROWS, length, WIDTH)
    return model.apply, model.init(jax.random.key(0), x), x


def haiku_attention(length):
    import haiku as hk

    def forward(ids):
        x = hk.Embed(VOCABULARY, WIDTH)(ids)
        causal = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1])))
        attention = hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling(1.0), model_size=WIDTH)
        x = x + attention(hk.LayerNorm(-1, True, True)(x), x, x, mask=causal)
        x = x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(8)(hk.LayerNorm(-1, True, True)(x))))
        return hk.Linear(LABELS)(x)

    model, x = hk.without_apply_rng(hk.transform(forward)), tokens(length)
    return model.apply, model.init(jax.random.key(0), x), x


def haiku_convnet(length):
    import haiku as hk

    def forward(x, is_training=False):
        x = hk.Conv2D(5, 3, with_bias=False)(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training))
        return hk.Linear(LABELS)(x.mean((1, 2)))

    x = images(length)
    model = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = model.init(jax.random.key(0), x, is_training=True)
    return lambda params, x: model.apply(params, state, x)[0], params, x


def equinox_mlp(length):
    import equinox as eqx

    del length
    model = eqx.nn.MLP(WIDTH, LABELS, 8, 2, jax.nn.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, features(ROWS, WIDTH)


def equinox_attention(length):
    import equinox as eqx

    class Block(eqx.Module):
        embed: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
            self.norm = eqx.nn.LayerNorm(WIDTH)
            self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=keys[1])
            self.head = eqx.nn.Linear(WIDTH, LABELS, key=keys[2])

        def __call__(self, ids):
            x = jax.vmap(self.embed)(ids)
            h = jax.vmap(self.norm)(x)
            return jax.vmap(self.head)(x + self.attention(h, h, h, jnp.tril(jnp.ones((len(ids),) * 2, bool))))

    params, static = eqx.partition(Block(jax.random.key(0)), eqx.is_inexact_array)
    return lambda params, ids: jax.vmap(eqx.combine(params, static))(ids), params, tokens(length)


def equinox_mixer(length):
    """The MLP mixer of equinox' examples, of one patch row."""
    import equinox as eqx

    width = WIDTH if length > 1 else 1  # a kernel that mixes patches is used at every channel

    class Mixer(eqx.Module):
        patches: eqx.nn.MLP
        hidden: eqx.nn.MLP
        norm1: eqx.nn.LayerNorm
        norm2: eqx.nn.LayerNorm
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.patches = eqx.nn.MLP(length, length, 5, depth=1, key=keys[0])
            self.hidden = eqx.nn.MLP(width, width, 8, depth=1, key=keys[1])
            self.norm1, self.norm2 = eqx.nn.LayerNorm((width, length)), eqx.nn.LayerNorm((width, length))
            self.head = eqx.nn.Linear(width, LABELS, key=keys[2])

        def __call__(self, y):
            y = y + jax.vmap(self.patches)(self.norm1(y))
            y = self.norm2(y).T
            y = (y + jax.vmap(self.hidden)(y)).T
            return self.head(y.mean(1))

    params, static = eqx.partition(Mixer(jax.random.key(0)), eqx.is_inexact_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, features(ROWS, width, length)


def nnx_attention(length):
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
            self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
            self.head = nnx.Linear(WIDTH, LABELS, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            return self.head(x + self.attention(self.norm(x), mask=nnx.make_causal_mask(ids)))

    graph, params, rest = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)
    return lambda params, ids: nnx.merge(graph, params, rest, copy=True)(ids), params, tokens(length)


def linen_attention(length):
    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(VOCABULARY, WIDTH)(ids)
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=nn.make_causal_mask(ids))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
            return nn.Dense(LABELS)(x)

    model, x = Block(), tokens(length)
    return model.apply, model.init(jax.random.key(0), x), x


def linen_lstm(length):
    import flax.linen as nn

    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(LABELS)(nn.RNN(nn.LSTMCell(5))(x))

    model, x = Recurrent(), features(ROWS, length, WIDTH)
    return model.apply, model.init(jax.random.key(0), x), x


def linen_convnet(length):
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(5, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            return nn.Dense(LABELS)(x.mean((1, 2)))

    model, x = Net(), images(length)
    variables = model.init(jax.random.key(0), x)
    statistics = variables["batch_stats"]
    return lambda params, x: model.apply({"params": params, "batch_stats": statistics}, x), variables["params"], x


def penzai_mlp(length):
    from penzai import pz
    from penzai.models import simple_mlp

    del length
    model = simple_mlp.MLP.from_config(
        name="mlp", init_base_rng=jax.random.key(0), feature_sizes=[WIDTH, 8, LABELS], activation_fn=jnp.tanh
    )
    model, params = pz.unbind_params(model, freeze=True)

    def apply_fn(params, x):
        x = pz.nx.wrap(x).tag("batch", "features")
        return pz.bind_variables(model, params)(x).unwrap("batch", "features")

    return apply_fn, params, features(ROWS, WIDTH)


def keras_dense(length):
    import keras

    del length
    model = keras.Sequential(
        [keras.layers.Input((WIDTH,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(LABELS)]
    )
    return _keras(model), [v.value for v in model.trainable_variables], features(ROWS, WIDTH)


def keras_attention(length):
    import keras

    ids = keras.layers.Input((length,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH)(ids)
    h = keras.layers.LayerNormalization()(x)
    x = x + keras.layers.MultiHeadAttention(2, 3)(h, h, use_causal_mask=True)
    model = keras.Model(ids, keras.layers.Dense(LABELS)(x))
    return _keras(model), [v.value for v in model.trainable_variables], tokens(length)


def keras_convnet(length):
    import keras

    model = keras.Sequential(
        [
            keras.layers.Input((length, length, 2)),
            keras.layers.Conv2D(5, 3, padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(LABELS),
        ]
    )
    return _keras(model), [v.value for v in model.trainable_variables], images(length)


def _keras(model) -> Callable:
    fixed = [v.value for v in model.non_trainable_variables]
    return lambda params, x: model.stateless_call(params, fixed, x, training=False)[0]


def gemma_decoder(length):
    from gemma import gm
    from gemma.gm.nn import _config, _modules

    config = _config.TransformerConfig(
        final_logit_softcap=None, num_embed=VOCABULARY, embed_dim=WIDTH, hidden_dim=8, num_heads=2, head_dim=4,
        num_kv_heads=1, use_post_attn_norm=True, use_post_ffw_norm=True,
        attention_types=[_modules.AttentionType.GLOBAL],
    )  # fmt: skip
    model = gm.nn.Transformer(config=config, dtype=jnp.float32)
    x = tokens(length)
    params = model.init(jax.random.key(0), x)["params"]
    return lambda params, ids: model.apply({"params": params}, ids).logits, params, x


STRANGERS = {
    name: built
    for name, built in list(globals().items())
    if name.startswith(("haiku_", "equinox_", "nnx_", "linen_", "penzai_", "keras_", "gemma_"))
}

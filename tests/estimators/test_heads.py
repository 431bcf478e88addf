"""Heads of attention in every form that kernels have: the program says which kernel is what, not its name."""

import functools
import re

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fisher_jax as fj

B, S, D, V = 2, 3, 6, 5
# Heads, key-value heads, and size of a head; a fused kernel has another number of units than any other.
N, K, H = 4, 2, 2

CASES = {}


def case(make):
    """``make() -> (apply_fn, params, num_heads, num_kv_heads, {leaf: (shape of units, axes of heads)})``.

    The sums of a leaf are those of its squared scores, reshaped, over all axes but the named ones; or a dict of such.
    """
    CASES[make.__name__] = make
    return make


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) * 0.5)


def redrawn(tree, seed=0):
    """Other numbers in every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [draw(*x.shape, seed=seed + i) for i, x in enumerate(leaves)])


def batch_of(features=D):
    rng = np.random.default_rng(7)
    weights = jnp.asarray([[1.0, 0.5, 1], [1, 2, 0]])
    return fj.Batch(
        jnp.asarray(rng.standard_normal((B, S, features))), jnp.asarray(rng.integers(0, V, (B, S))), weights
    )


def causal(scores):
    return jnp.where(np.tril(np.ones((S, S), bool)), scores, -1e30)


def attend(q, k, v):
    """``[B, S, N, H]`` each."""
    scores = causal(jnp.einsum("bsnh,btnh->bnst", q, k) / np.sqrt(q.shape[-1]))
    return jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(scores), v)


def rotated(x):
    """Rotary positions: halves of each head are mixed."""
    half = x.shape[-1] // 2
    angle = np.arange(S)[:, None, None] * 0.3 ** np.arange(half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def rms(x, scale=1.0):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def path_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.cache
def scores_of(name):
    """``sum_t w_t s_t**2 / sum_t w_t`` of every entry, from a loop of ``jax.grad``."""
    apply_fn, params, *_ = CASES[name]()
    batch = batch_of()

    @jax.jit
    def score(row, position):
        return jax.grad(lambda p: jax.nn.log_softmax(apply_fn(p, batch.inputs))[
            row, position, batch.targets[row, position]])(params)  # fmt: skip

    total = jax.tree.map(np.zeros_like, params)
    for row, position in np.ndindex(B, S):
        weight = float(batch.weights[row, position])
        total = jax.tree.map(lambda t, s, w=weight: t + w * np.square(s), total, score(row, position))
    return jax.tree.map(lambda t: t / float(batch.weights.sum()), total)


def summed(squares, how):
    shape, axes = how
    x = np.asarray(squares).reshape(shape)
    return x.sum(tuple(i for i in range(x.ndim) if i not in axes))


def found_of(name, **options):
    apply_fn, params, heads, kv, _ = CASES[name]()
    group = fj.groups.head(heads, kv, **options)
    fisher = fj.group_fisher(apply_fn, estimator="exact", groups=group, example=batch_of(), chunk_size=6)
    return jax.jit(fisher.observe)(params, batch_of()).mean


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_heads(name, found):
    rtol = 1e-6 if name == "nnx_split" else 1e-9  # parts of nnx compute in float32
    _, params, _, _, wanted = CASES[name]()
    wanted = dict(wanted)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    squares = jax.tree.leaves(scores_of(name))
    own = jax.tree.structure(params).flatten_up_to(found)
    for (path, _), x, y in zip(leaves, squares, own, strict=True):
        how = wanted.pop(path_of(path), None)
        if isinstance(how, dict):
            parts = {part: summed(x[index], one) for part, (index, one) in how.items()}
            assert set(parts) == set(y), path_of(path)
            for part, values in parts.items():
                np.testing.assert_allclose(y[part], values, rtol=rtol, atol=1e-13, err_msg=f"{path_of(path)} {part}")
        else:
            values = np.sum(x) if how is None else summed(x, how)
            assert np.shape(y) == np.shape(values), path_of(path)
            np.testing.assert_allclose(y, values, rtol=rtol, atol=1e-13, err_msg=path_of(path))
    assert not wanted, "leaves that are not there"


@case
def nnx_split():
    """Paths end in ``.value``, or in nothing; the last layer is called ``out`` and is no attention."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, D, qkv_features=8, decode=False, rngs=rngs)
            self.out = nnx.Linear(D, V, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(x + self.attention(x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    state = redrawn(state)
    wanted = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(state):
        name = path_of(path)
        for part in ("query", "key", "value"):
            if name.startswith(f"attention/{part}/kernel"):
                wanted[name] = (D, 2, 4), (1,)
            if name.startswith(f"attention/{part}/bias"):
                wanted[name] = (2, 4), (0,)
        if name.startswith("attention/out/kernel"):
            wanted[name] = (2, 4, D), (0,)
    return lambda p, x: nnx.merge(graph, p)(x), state, 2, 2, wanted


@case
def linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(num_heads=N, qkv_features=N * H, name="attention")(x)
            return nn.Dense(V, name="output")(jnp.tanh(nn.Dense(N * H, name="value")(x)))

    model = Model()
    params = redrawn(jax.eval_shape(model.init, jax.random.key(0), jnp.ones((B, S, D)))["params"])
    wanted = {f"attention/{part}/kernel": ((D, N, H), (1,)) for part in ("query", "key", "value")}
    wanted |= {f"attention/{part}/bias": ((N, H), (0,)) for part in ("query", "key", "value")}
    wanted["attention/out/kernel"] = (N, H, D), (0,)
    return lambda p, x: model.apply({"params": p}, x), params, N, N, wanted


@case
def bert():
    """``attention/output/dense`` follows attention, ``output/dense`` of the same size does not."""

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def apply_fn(p, x):
        own = p["layer"]["attention"]
        q, k, v = (dense(own["self"][n], x).reshape(-1, S, N, H) for n in ("query", "key", "value"))
        x = rms(x + dense(own["output"]["dense"], attend(q, k, v).reshape(-1, S, N * H)))
        x = x + dense(p["layer"]["output"]["dense"], jax.nn.gelu(dense(p["layer"]["intermediate"]["dense"], x)))
        return dense(p["output"], x)

    def layer(inside, outside, seed=0):
        return {"kernel": draw(inside, outside, seed=seed), "bias": draw(outside, seed=seed)}

    names = ("query", "key", "value")
    params = {
        "layer": {
            "attention": {
                "self": {n: layer(D, N * H, i) for i, n in enumerate(names)},
                "output": {"dense": layer(N * H, D)},
            },
            "intermediate": {"dense": layer(D, N * H, 4)},
            "output": {"dense": layer(N * H, D, 5)},
        },
        "output": layer(D, V),
    }
    wanted = {f"layer/attention/self/{n}/kernel": ((D, N, H), (1,)) for n in names}
    wanted |= {f"layer/attention/self/{n}/bias": ((N, H), (0,)) for n in names}
    wanted["layer/attention/output/dense/kernel"] = (N, H, D), (0,)
    return apply_fn, params, N, N, wanted


@case
def gemma():
    """Key and value in one kernel, rotary positions, groups of queries, ``w`` under ``attn_vec_einsum``."""

    def apply_fn(p, x):
        own = p["attn"]
        q = rotated(jnp.einsum("BTD,NDH->BTNH", x, own["q_einsum"]["w"]))
        k, v = jnp.einsum("BSD,CKDH->CBSKH", x, own["kv_einsum"]["w"])
        q = q.reshape(-1, S, K, N // K, H)
        scores = causal(jnp.einsum("BTKGH,BSKH->BKGTS", q, rotated(k)))
        mixed = jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores), v).reshape(-1, S, N, H)
        x = x + jnp.einsum("BTNH,NHD->BTD", mixed, own["attn_vec_einsum"]["w"])
        hidden = jnp.einsum("BTD,CDF->CBTF", rms(x), p["mlp"]["gating_einsum"]["w"])
        return (x + (jax.nn.gelu(hidden[0]) * hidden[1]) @ p["mlp"]["linear"]["w"]) @ p["output"]

    params = {
        "attn": {
            "q_einsum": {"w": draw(N, D, H)},
            "kv_einsum": {"w": draw(2, K, D, H)},
            "attn_vec_einsum": {"w": draw(N, H, D)},
        },
        "mlp": {"gating_einsum": {"w": draw(2, D, 7)}, "linear": {"w": draw(7, D)}},
        "output": draw(D, V),
    }
    wanted = {
        "attn/q_einsum/w": ((N, D, H), (0,)),
        "attn/kv_einsum/w": {"key": (0, ((K, D, H), (0,))), "value": (1, ((K, D, H), (0,)))},
        "attn/attn_vec_einsum/w": ((N, H, D), (0,)),
    }
    return apply_fn, params, N, K, wanted


def gated(p, x):
    return (jax.nn.silu(x @ p["gate_proj"]["kernel"]) * (x @ p["up_proj"]["kernel"])) @ p["down_proj"]["kernel"]


@case
def qwen3():
    """``[D, N, H]`` kernels, norms of queries and keys, keys and values repeated for their queries, two layers."""

    def layer(p, x):
        h = rms(x, p["input_layernorm"]["w"])
        q, k, v = (jnp.einsum("BTD,DNH->BTNH", h, p["attn"][f"{n}_proj"]["w"]) for n in "qkv")
        q, k = rotated(rms(q, p["attn"]["q_norm"]["w"])), rotated(rms(k, p["attn"]["k_norm"]["w"]))
        mixed = attend(q, jnp.repeat(k, N // K, 2), jnp.repeat(v, N // K, 2))
        x = x + jnp.einsum("BTNH,NHD->BTD", mixed, p["attn"]["o_proj"]["w"])
        return x + gated(p["mlp"], rms(x))

    def apply_fn(p, x):
        for own in p["layers"]:
            x = layer(own, x)
        return rms(x) @ p["lm_head"]["w"]

    def of(seed):
        return {
            "input_layernorm": {"w": draw(D, seed=seed)},
            "attn": {
                "q_proj": {"w": draw(D, N, H, seed=seed)}, "k_proj": {"w": draw(D, K, H, seed=seed)},
                "v_proj": {"w": draw(D, K, H, seed=seed + 1)}, "o_proj": {"w": draw(N, H, D, seed=seed)},
                "q_norm": {"w": draw(H, seed=seed)}, "k_norm": {"w": draw(H, seed=seed + 1)},
            },
            "mlp": {"gate_proj": {"kernel": draw(D, 7)}, "up_proj": {"kernel": draw(D, 7, seed=seed + 1)},
                    "down_proj": {"kernel": draw(7, D)}},
        }  # fmt: skip

    wanted = {}
    for i in range(2):
        wanted[f"layers/{i}/attn/q_proj/w"] = (D, N, H), (1,)
        wanted[f"layers/{i}/attn/k_proj/w"] = wanted[f"layers/{i}/attn/v_proj/w"] = (D, K, H), (1,)
        wanted[f"layers/{i}/attn/o_proj/w"] = (N, H, D), (0,)
    return apply_fn, {"layers": [of(0), of(5)], "lm_head": {"w": draw(D, V)}}, N, K, wanted


@case
def gpt2():
    """One kernel for all three, all queries first; its output kernel is called ``c_proj``, as the MLP's is."""

    def apply_fn(p, x):
        q, k, v = jnp.split(x @ p["attn"]["c_attn"]["kernel"] + p["attn"]["c_attn"]["bias"], 3, -1)
        q, k, v = (y.reshape(-1, S, N, H) for y in (q, k, v))
        x = x + attend(q, k, v).reshape(-1, S, N * H) @ p["attn"]["c_proj"]["kernel"]
        return (x + jax.nn.gelu(x @ p["mlp"]["c_fc"]["kernel"]) @ p["mlp"]["c_proj"]["kernel"]) @ p["head"]

    params = {
        "attn": {"c_attn": {"kernel": draw(D, 3 * N * H), "bias": draw(3 * N * H)}, "c_proj": {"kernel": draw(8, D)}},
        "mlp": {"c_fc": {"kernel": draw(D, 8)}, "c_proj": {"kernel": draw(8, D, seed=1)}},
        "head": draw(D, V),
    }
    places = {part: slice(i * 8, i * 8 + 8) for i, part in enumerate(("query", "key", "value"))}
    wanted = {
        "attn/c_attn/kernel": {part: ((slice(None), at), ((D, N, H), (1,))) for part, at in places.items()},
        "attn/c_attn/bias": {part: (at, ((N, H), (0,))) for part, at in places.items()},
        "attn/c_proj/kernel": ((N, H, D), (0,)),
    }
    return apply_fn, params, N, N, wanted


@case
def neox():
    """One kernel, query, key and value of each head side by side, stored ``[out, in]``, in scanned layers."""

    def layer(x, p):
        fused = (x @ p["query_key_value"].T).reshape(-1, S, N, 3, H)
        mixed = attend(*(fused[..., i, :] for i in range(3)))
        return rms(x + mixed.reshape(-1, S, N * H) @ p["dense"].T), None

    def apply_fn(p, x):
        return jax.lax.scan(jax.checkpoint(layer), x, p["layers"])[0] @ p["head"]

    params = {"layers": {"query_key_value": draw(2, N * 3 * H, D), "dense": draw(2, D, N * H)}, "head": draw(D, V)}
    parts = enumerate(("query", "key", "value"))
    whole = {part: (np.s_[:, np.arange(N * 3 * H).reshape(N, 3, H)[:, i].ravel()], ((2, N, H, D), (0, 1)))
             for i, part in parts}  # fmt: skip
    return apply_fn, params, N, N, {"layers/query_key_value": whole, "layers/dense": ((2, D, N, H), (0, 2))}


@case
def cut_parameter():
    """A fused kernel that is cut before it is used, as in a port of torch's ``in_proj_weight``."""

    def apply_fn(p, x):
        q, k, v = (x @ w.T + b for w, b in zip(jnp.split(p["in_proj_weight"], 3), p["in_proj_bias"], strict=True))
        mixed = attend(*(y.reshape(-1, S, N, H) for y in (q, k, v)))
        return mixed.reshape(-1, S, N * H) @ p["out_proj"].T @ p["head"]

    params = {"in_proj_weight": draw(3 * N * H, D), "in_proj_bias": draw(3, N * H), "out_proj": draw(D, N * H),
              "head": draw(D, V)}  # fmt: skip
    parts = {part: i for i, part in enumerate(("query", "key", "value"))}
    wanted = {
        "in_proj_weight": {part: (slice(i * 8, i * 8 + 8), ((N, H, D), (0,))) for part, i in parts.items()},
        "in_proj_bias": {part: (i, ((N, H), (0,))) for part, i in parts.items()},
        "out_proj": ((D, N, H), (1,)),
    }
    return apply_fn, params, N, N, wanted


@case
def one_key_for_all_queries():
    """Multi-query attention, mapped over rows, under names that lie."""

    def one(p, x):
        q, k, v = (x @ p["value"]).reshape(S, N, H), x @ p["query"], x @ p["key"]
        scores = causal(jnp.einsum("snh,th->nst", q, k))
        return jnp.einsum("nst,th->snh", jax.nn.softmax(scores), v).reshape(S, N * H) @ p["gate"] @ p["out"]

    params = {"value": draw(D, N * H), "query": draw(D, H), "key": draw(D, H, seed=1), "gate": draw(N * H, D),
              "out": draw(D, V)}  # fmt: skip
    wanted = {"value": ((D, N, H), (1,)), "query": ((D, 1, H), (1,)), "key": ((D, 1, H), (1,)),
              "gate": ((N, H, D), (0,))}  # fmt: skip
    return lambda p, x: jax.vmap(one, (None, 0))(p, x), params, N, 1, wanted


@case
def haiku():
    """``w`` and ``b`` of modules named by their place; the output kernel is ``linear``."""
    names = ("query", "key", "value")

    def apply_fn(p, x):
        own = {n: p[f"transformer/~/multi_head_attention/{n}"] for n in names}
        q, k, v = ((x @ own[n]["w"] + own[n]["b"]).reshape(-1, S, N, H) for n in names)
        scores = causal(jnp.einsum("...thd,...Thd->...htT", q, k))
        mixed = jnp.einsum("...htT,...Thd->...thd", jax.nn.softmax(scores), v).reshape(-1, S, N * H)
        last = p["transformer/~/multi_head_attention/linear"]
        return jnp.tanh(mixed @ last["w"] + last["b"]) @ p["transformer/~/output"]["w"]

    params = {f"transformer/~/multi_head_attention/{n}": {"w": draw(D, 8, seed=i), "b": draw(8, seed=i)}
              for i, n in enumerate(names)}  # fmt: skip
    params["transformer/~/multi_head_attention/linear"] = {"w": draw(8, D), "b": draw(D)}
    params["transformer/~/output"] = {"w": draw(D, V)}
    wanted = {f"transformer/~/multi_head_attention/{n}/w": ((D, N, H), (1,)) for n in names}
    wanted |= {f"transformer/~/multi_head_attention/{n}/b": ((N, H), (0,)) for n in names}
    wanted["transformer/~/multi_head_attention/linear/w"] = (N, H, D), (0,)
    return apply_fn, params, N, N, wanted


@case
def equinox_module():
    """Kernels ``[out, in]``; heads, positions and rows are mapped over."""
    attention = equinox.nn.MultiheadAttention(
        N, D, qk_size=H, vo_size=3, output_size=V, use_query_bias=True, key=jax.random.key(0)
    )
    params, rest = equinox.partition(attention, equinox.is_inexact_array)
    params = redrawn(params)

    def apply_fn(p, x):
        return jax.vmap(lambda row: equinox.combine(p, rest)(row, row, row))(x)

    wanted = {"query_proj/weight": ((N, H, D), (0,)), "query_proj/bias": ((N, H), (0,)),
              "key_proj/weight": ((N, H, D), (0,)), "value_proj/weight": ((N, 3, D), (0,)),
              "output_proj/weight": ((V, N, 3), (1,))}  # fmt: skip
    return apply_fn, params, N, N, wanted


@case
def rotary_by_complex_numbers_low_rank_and_gated():
    """Neighbours of a head make complex numbers; a low-rank addition to the query; a gate on what is attended."""

    def turned(x):
        pairs = x.reshape(*x.shape[:-1], H // 2, 2)
        z = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * np.exp(1j * np.arange(S))[:, None, None]
        return jnp.stack([z.real, z.imag], -1).reshape(x.shape)

    def apply_fn(p, x):
        q = x @ p["w1"] + (x @ p["lora_a"]) @ p["lora_b"]
        q, k, v = (y.reshape(-1, S, N, H) for y in (q, x @ p["w2"], x @ p["w3"]))
        mixed = rms(attend(turned(q), turned(k), v)) * jax.nn.sigmoid(x @ p["gate"])[..., None]
        return mixed.reshape(-1, S, N * H) @ p["w4"]

    params = {"w1": draw(D, 8), "lora_a": draw(D, 3), "lora_b": draw(3, 8), "w2": draw(D, 8, seed=1),
              "w3": draw(D, 8, seed=2), "gate": draw(D, N), "w4": draw(8, V)}  # fmt: skip
    wanted = {w: ((D, N, H), (1,)) for w in ("w1", "w2", "w3")}
    wanted |= {"lora_b": ((3, N, H), (1,)), "w4": ((N, H, V), (0,))}
    return apply_fn, params, N, N, wanted


@case
def channels_beside_attention():
    """Layers of a channel mixing called ``key`` and ``value`` attend to nothing."""

    def apply_fn(p, x):
        q, k, v = ((x @ p["attend"][n]).reshape(-1, S, N, H) for n in ("query", "key", "value"))
        x = x + attend(q, k, v).reshape(-1, S, N * H) @ p["attend"]["output"]
        x = x + jnp.square(jax.nn.relu(x @ p["mix"]["key"])) @ p["mix"]["value"]
        return x @ p["output"]

    names = ("query", "key", "value")
    params = {
        "attend": {n: draw(D, N * H, seed=i) for i, n in enumerate(names)} | {"output": draw(N * H, D)},
        "mix": {"key": draw(D, N * H, seed=4), "value": draw(N * H, D, seed=4)},
        "output": draw(D, V),
    }
    wanted = {f"attend/{n}": ((D, N, H), (1,)) for n in names} | {"attend/output": ((N, H, D), (0,))}
    return apply_fn, params, N, N, wanted


@case
def linear_attention():
    """No query meets a key: the names are all there is."""

    def apply_fn(p, x):
        q, k, v = ((x @ p[n]["w"]["value"]).reshape(-1, S, N, H) for n in ("query", "key", "value"))
        mixed = jnp.einsum("bsnh,bnhj->bsnj", jax.nn.elu(q), jnp.einsum("bsnh,bsnj->bnhj", jax.nn.elu(k), v))
        x = mixed.reshape(-1, S, N * H) @ p["out"]["w"]["value"]
        return jnp.tanh(x @ p["hidden"]["w"]["value"]) @ p["output"]["dense"]["w"]["value"]

    names = ("query", "key", "value")
    params = {n: {"w": {"value": draw(D, N * H, seed=i)}} for i, n in enumerate(names)}
    params |= {"out": {"w": {"value": draw(N * H, D)}}, "hidden": {"w": {"value": draw(D, N * H)}},
               "output": {"dense": {"w": {"value": draw(N * H, V)}}}}  # fmt: skip
    wanted = {f"{n}/w/value": ((D, N, H), (1,)) for n in names} | {"out/w/value": ((N, H, D), (0,))}
    return apply_fn, params, N, N, wanted


@case
def linear_attention_by_units():
    """The same, one unit of each head side by side."""

    def apply_fn(p, x):
        q, k, v = ((x @ p[n]["w"]["value"]).reshape(-1, S, H, N) for n in ("query", "key", "value"))
        mixed = jnp.einsum("bshn,bnhj->bsjn", jax.nn.elu(q), jnp.einsum("bshn,bsjn->bnhj", jax.nn.elu(k), v))
        x = mixed.reshape(-1, S, N * H) @ p["out"]["w"]["value"]
        return jnp.tanh(x @ p["hidden"]["w"]["value"]) @ p["output"]["dense"]["w"]["value"]

    _, params, *_ = linear_attention()
    wanted = {f"{n}/w/value": ((D, H, N), (2,)) for n in ("query", "key", "value")}
    return apply_fn, params, N, N, wanted | {"out/w/value": ((H, N, D), (1,))}


LAYOUTS = {"linear_attention": "heads", "linear_attention_by_units": "units"}


@pytest.mark.parametrize("name", CASES)
def test_heads_are_those_of_the_program(name):
    assert_heads(name, found_of(name, layout=LAYOUTS.get(name)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_the_program_does_not_show_is_asked_for(name):
    with pytest.raises(ValueError, match=r"\['key'\].* by its name, .* layout='heads' .* or layout='units'"):
        found_of(name)


def test_heads_by_sequence_and_with_other_groups_at_once():
    """The other way to the sums, and each of several groups its own."""
    apply_fn, params, heads, kv, _ = CASES["gemma"]()
    groups = {"heads": fj.groups.head(heads, kv), "whole": fj.groups.tensor, "rows": fj.groups.row}

    def of(groups):
        fisher = fj.group_fisher(apply_fn, estimator="sequence", groups=groups, example=batch_of())
        return jax.jit(fisher.observe)(params, batch_of()).mean

    several, entries = of(groups), of("param")
    own, squares = several["attn"]["kv_einsum"]["w"], np.asarray(entries["attn"]["kv_einsum"]["w"])
    np.testing.assert_allclose(own["heads"]["value"], squares[1].sum((1, 2)), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(own["whole"], squares.sum(), rtol=1e-9, atol=1e-13)
    own, squares = several["attn"]["attn_vec_einsum"]["w"], np.asarray(entries["attn"]["attn_vec_einsum"]["w"])
    np.testing.assert_allclose(own["heads"], squares.sum((1, 2)), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(own["rows"], squares.sum((0, 1)), rtol=1e-9, atol=1e-13)
    sizes = fj.group_fisher(apply_fn, groups=groups, example=batch_of()).group_sizes(params)
    assert sizes["attn"]["kv_einsum"]["w"]["heads"]["key"].tolist() == [D * H] * K


def test_a_layer_called_out_is_no_attention():
    def apply_fn(p, x):
        return jnp.tanh(x @ p["hidden"]["kernel"]) @ p["out"]["kernel"]

    params = {"hidden": {"kernel": draw(D, 8)}, "out": {"kernel": draw(8, V)}}
    with pytest.raises(ValueError, match="no parameter is a query, key, value or output kernel"):
        fj.group_fisher(apply_fn, groups=fj.groups.head(N), example=batch_of()).init(params)


@pytest.mark.parametrize(
    ("name", "heads", "leaf"),
    [("linen", (2,), "attention"), ("qwen3", (N,), "k_proj"), ("gemma", (2, 2), "einsum"), ("gpt2", (8,), "c_attn")],
)
def test_other_numbers_of_heads_than_the_program_has(name, heads, leaf):
    apply_fn, params, *_ = CASES[name]()
    with pytest.raises(ValueError, match=rf"{leaf}.* of \d heads .*test_heads\.py:\d+.*num_(kv_)?heads=\d"):
        fj.group_fisher(apply_fn, groups=fj.groups.head(*heads), example=batch_of()).init(params)


def test_units_that_only_partly_belong_to_heads():
    """A latent kernel of which a part is the key of all heads, and the rest goes into another kernel."""

    def apply_fn(p, x):
        latent = x @ p["down"]
        shared, rest = latent[..., :H], latent[..., H:]
        q, k, v = ((y @ p[n]).reshape(-1, S, N, H) for n, y in (("q", x), ("up", rest), ("v", rest)))
        k = jnp.concatenate([k, jnp.broadcast_to(shared[:, :, None], k.shape)], -1)
        return attend(jnp.concatenate([q, q], -1), k, v).reshape(-1, S, N * H) @ p["out"]

    params = {"down": draw(D, 5), "q": draw(D, 8), "up": draw(3, 8), "v": draw(3, 8, seed=1), "out": draw(8, V)}
    with pytest.raises(ValueError, match=r"\['down'\].*key.*function \(path, shape\)"):
        fj.group_fisher(apply_fn, groups=fj.groups.head(N), example=batch_of()).init(params)

    def chosen(path, shape):
        return fj.groups.tensor if path == "['down']" else fj.groups.head(N)

    found = fj.group_fisher(apply_fn, groups=chosen, example=batch_of()).init(params).mean
    assert found["up"].shape[-1] == found["q"].shape[-1] == found["out"].shape[-1] == N
    assert re.fullmatch(r"\(2?,?\)", str(found["down"].shape))

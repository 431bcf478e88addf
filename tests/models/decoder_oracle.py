"""The decoder once more: float64, one position and one head at a time, nothing shared with the library."""

import math

import numpy as np


def logits(config, params, tokens, *, interleaved=False):
    """Logits ``[B, S, V]`` of parameters as the library nests them; ``interleaved`` turns the neighbouring
    coordinates ``(2 i, 2 i + 1)`` by one angle, as GGUF files of the Llama architecture want it."""
    params = as_float64(params)
    head = params["embedding"] if config.tied else params["head"]
    out = np.stack([hidden_row(config, params, row, interleaved) for row in np.asarray(tokens)]) @ head.T
    return out if config.logit_soft_cap is None else config.logit_soft_cap * np.tanh(out / config.logit_soft_cap)


def as_float64(tree):
    if isinstance(tree, dict):
        return {key: as_float64(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)


def hidden_row(config, params, row, interleaved):
    xs = [params["embedding"][token].copy() for token in row]
    if config.positions == "learned":
        xs = [x + params["positions"][t] for t, x in enumerate(xs)]
    for i in range(config.num_layers):
        layer = pick(params["layers"], i)
        normed = [norm(config, layer["attention_norm"], x) for x in xs]
        windowed = config.window is not None and (config.window_layers is None or config.window_layers[i])
        mixed = attention(config, layer["attention"], normed, interleaved, config.window if windowed else len(xs))
        xs = [x + m for x, m in zip(xs, mixed, strict=True)]
        xs = [x + mlp(config, layer["mlp"], norm(config, layer["mlp_norm"], x)) for x in xs]
    return np.stack([norm(config, params["final_norm"], x) for x in xs])


def pick(tree, i):
    return {k: pick(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


def norm(config, params, x):
    if config.norm == "rms":
        return x / math.sqrt(sum(v * v for v in x) / len(x) + config.norm_eps) * params["scale"]
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + config.norm_eps) * params["scale"] + params["bias"]


def dense(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def attention(config, params, xs, interleaved, window):
    size, group = config.head_size, config.num_heads // config.num_kv_heads

    def heads(name, t, count):
        parts = [dense(params[name], xs[t])[n * size : (n + 1) * size] for n in range(count)]
        if name != "v" and config.qk_norm:
            parts = [norm(config, params[f"{name}_norm"], part) for part in parts]
        if name != "v" and config.positions == "rotary":
            parts = [turn(config, part, t, interleaved) for part in parts]
        return parts

    q = [heads("q", t, config.num_heads) for t in range(len(xs))]
    k = [heads("k", t, config.num_kv_heads) for t in range(len(xs))]
    v = [heads("v", t, config.num_kv_heads) for t in range(len(xs))]
    out = []
    for t in range(len(xs)):
        mixed = []
        for n in range(config.num_heads):
            seen = range(max(0, t + 1 - window), t + 1)
            scores = [math.exp(q[t][n] @ k[s][n // group] / math.sqrt(size)) for s in seen]
            mixed.append(sum(w * v[s][n // group] for s, w in zip(seen, scores, strict=True)) / sum(scores))
        out.append(dense(params["o"], np.concatenate(mixed)))
    return out


def turn(config, x, position, interleaved):
    half, out = config.head_size // 2, np.empty_like(x)
    for i in range(half):
        angle = position * config.rope_base ** (-2 * i / config.head_size)
        if config.rope_divisors is not None:
            angle /= config.rope_divisors[i]
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


def mlp(config, params, x):
    up = dense(params["up"], x)
    if config.gated:
        return dense(params["down"], activate(config, dense(params["gate"], x)) * up)
    return dense(params["down"], activate(config, up))


def activate(config, x):
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

"""What does K-FAC cost, on a head with 50,257 rows and in the training step of a small language model?

One run measures everything side by side: the ways are interleaved, round after round, and medians are printed. On the
head they are divided by one product ``U X`` with ``U [V, T]`` and ``X [T, H]``, the unit that a natural gradient of
the factor's own tokens needs at least once.

    uv run python experiments/bench_kfac.py            # about fifteen minutes on 2 cores
    uv run python experiments/bench_kfac.py --quick    # small shapes: does it run?
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisher_jax as fj
from fisher_jax.kronecker import factors, tikhonov

DAMPING, UPDATE_FREQ = 1e-3, 10


def medians(ways, rounds):
    """Seconds of each way, interleaved; compiled and run once before."""
    times = {name: [] for name in ways}
    for way in ways.values():
        jax.block_until_ready(way())
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            jax.block_until_ready(way())
            times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(t)) for name, t in times.items()}


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def bench_head(vocabulary, width, tokens, rounds):
    """One head, its factors built from inputs ``a`` and output gradients ``U``, and a gradient preconditioned."""
    keys = jax.random.split(jax.random.key(0), 3)
    a = jax.random.normal(keys[0], (tokens, width))
    logits = 2 * jax.random.normal(keys[1], (vocabulary, tokens))
    U = (jax.nn.softmax(logits, 0) - jax.nn.one_hot(jnp.arange(tokens), vocabulary, axis=0)) / tokens**0.5
    M = jax.random.normal(keys[2], (vocabulary, width)) / vocabulary

    def build(a, U, storage=None):
        return factors.eigen(a.T @ a / tokens), factors.low_rank(U, storage)

    @jax.jit
    def pushed(a, U):
        A, G = build(a, U)
        return tikhonov.push_through(A, G, a / tokens**0.5, DAMPING), A, G

    @jax.jit
    def general(a, U, M):
        A, G = build(a, U)
        return tikhonov.exact(A, G, M, DAMPING), A, G

    product, gradient = jax.jit(jnp.matmul), jax.jit(tikhonov.exact)
    small = min(vocabulary, 2048)
    square = jnp.asarray(np.cov(np.random.default_rng(0).normal(size=(small, small + 8))), jnp.float32)
    dense = jax.jit(lambda G, M: factors.eigen(G).vectors @ M)
    A, G = jax.jit(build)(a, U)
    half = jax.jit(lambda a, U: build(a, U, jnp.bfloat16))(a, U)
    ways = {
        "one product U x [T, H]": lambda: product(U, a),
        "build and apply, push-through": lambda: pushed(a, U),
        "build and apply, any gradient": lambda: general(a, U, M),
        "apply to any gradient": lambda: gradient(A, G, M, DAMPING),
        f"dense factor of {small} outputs": lambda: dense(square, M[:small]),
    }
    seconds = medians(ways, rounds)
    scale = vocabulary / small
    dense_name = f"dense factor of {small} outputs"
    return {
        "vocabulary": vocabulary, "width": width, "tokens": tokens, "seconds": seconds,
        "ratio": {name: t / seconds["one product U x [T, H]"] for name, t in seconds.items() if name != dense_name},
        "state MiB, float32": size((A, G)) / 2**20, "state MiB, bfloat16": size(half) / 2**20,
        "dense, extrapolated": {
            "state GiB": 2 * 4 * vocabulary**2 / 2**30, "seconds": seconds[dense_name] * scale**3
        },
    }  # fmt: skip


def transformer(vocabulary, width, layers, heads):
    """A causal decoder of stacked layers under scan, and its parameters."""
    keys = iter(jax.random.split(jax.random.key(1), 8))
    init = lambda *shape: jax.random.normal(next(keys), shape) * shape[-2] ** -0.5  # noqa: E731
    blocks = {
        "n1": jnp.ones((layers, width)), "n2": jnp.ones((layers, width)),
        "qkv": init(layers, width, 3 * width), "out": init(layers, width, width),
        "up": init(layers, width, 4 * width), "down": init(layers, 4 * width, width),
    }  # fmt: skip
    params = {
        "embed": jax.random.normal(next(keys), (vocabulary, width)) * 0.02,
        "layers": blocks,
        "head": init(width, vocabulary),
    }  # fmt: skip

    def normal(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    def layer(x, p):
        b, s, _ = x.shape
        q, k, v = jnp.split((normal(x, p["n1"]) @ p["qkv"]).reshape(b, s, heads, -1), 3, -1)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, s, -1)
        x = x + mixed @ p["out"]
        return x + jax.nn.gelu(normal(x, p["n2"]) @ p["up"]) @ p["down"], None

    def apply_fn(params, tokens):
        x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
        return x @ params["head"]

    return apply_fn, params


def bench_training(vocabulary, width, layers, rows, length, token_caps, rounds):
    """AdamW's step beside K-FAC's, with a refresh and without; ``update_freq`` steps have one refresh."""
    apply_fn, params = transformer(vocabulary, width, layers, heads=4)
    tokens = jax.random.randint(jax.random.key(2), (rows, length + 1), 0, vocabulary)
    batch = fj.next_token_batch(tokens)
    key = jax.random.key(3)

    def loss(params):
        return -jnp.mean(fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets))

    def stepper(tx, **more):
        @jax.jit
        def step(params, state, batch):
            grads = jax.grad(loss)(params)
            updates, state = tx.update(grads, state, params, **more)
            return optax.apply_updates(params, updates), state

        return step

    adamw = optax.adamw(1e-3)
    adam_state, adam_step = adamw.init(params), stepper(adamw)
    ways, states = {"AdamW": lambda: adam_step(params, adam_state, batch)}, {}
    for cap in token_caps:
        tx = fj.scale_by_kfac(apply_fn, example=batch, damping=DAMPING, update_freq=UPDATE_FREQ, token_cap=cap)
        tx = optax.chain(tx, optax.trace(0.9), optax.scale_by_learning_rate(0.1))
        step, fresh = stepper(tx, batch=batch, key=key), tx.init(params)
        _, warm = step(params, fresh, batch)  # its factors serve the next updates
        states[cap] = size(fresh[0]) / 2**20
        ways[f"K-FAC cap {cap}, refresh"] = lambda step=step, s=fresh: step(params, s, batch)
        ways[f"K-FAC cap {cap}, between"] = lambda step=step, s=warm: step(params, s, batch)
    seconds = medians(ways, rounds)
    found = {}
    for cap in token_caps:
        refresh, between = (seconds[f"K-FAC cap {cap}, {x}"] for x in ("refresh", "between"))
        amortised = (refresh + (UPDATE_FREQ - 1) * between) / UPDATE_FREQ
        found[str(cap)] = {
            "refresh / AdamW": refresh / seconds["AdamW"], "between / AdamW": between / seconds["AdamW"],
            "amortised / AdamW": amortised / seconds["AdamW"], "state MiB": states[cap],
        }  # fmt: skip
    return {
        "vocabulary": vocabulary, "width": width, "layers": layers, "rows": rows, "length": length,
        "parameters": sum(x.size for x in jax.tree.leaves(params)), "update_freq": UPDATE_FREQ, "seconds": seconds,
        "by token cap": found,
    }  # fmt: skip


def show(head, training):
    print(f"head V={head['vocabulary']} H={head['width']} T={head['tokens']}, {jax.devices()[0].device_kind}")
    for name, ratio in head["ratio"].items():
        print(f"  {name:32}{head['seconds'][name]:10.3f} s{ratio:8.2f} x")
    print(f"  state {head['state MiB, float32']:.1f} MiB, bfloat16 {head['state MiB, bfloat16']:.1f} MiB")
    dense = head["dense, extrapolated"]
    print(f"  dense factor, extrapolated: {dense['state GiB']:.1f} GiB, {dense['seconds']:.0f} s")
    print(
        f"training step: {training['layers']} layers of {training['width']}, V={training['vocabulary']}, "
        f"{training['rows']} x {training['length']} tokens, AdamW {training['seconds']['AdamW']:.3f} s"
    )
    for cap, found in training["by token cap"].items():
        ratios = ", ".join(f"{name} {x:.2f}" for name, x in found.items())
        print(f"  token_cap {cap}: {ratios}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, two rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, default=None, help="also write the figures as JSON")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    head = bench_head(*((2003, 32, 24) if args.quick else (50257, 768, 512)), rounds)
    shapes = (2003, 32, 2, 2, 16) if args.quick else (49152, 256, 4, 8, 256)
    training = bench_training(*shapes, (8, 16) if args.quick else (128, 256, 512), rounds)
    show(head, training)
    if args.out is not None:
        found = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "head": head, "training": training}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What does K-FAC cost, on a head with 50,257 rows and in the training step of a small language model?

One run measures everything side by side: the ways are interleaved, round after round, and medians are printed. On the
head they are divided by one product ``U X`` with ``U [V, T]`` and ``X [T, H]``, the unit that a natural gradient of
the factor's own tokens needs at least once. In training they are divided by an AdamW step; of ``PERIOD`` steps
one refreshes all factors. What a cap on the tokens of the head's factor costs in quality is the loss on Wikipedia
after equal steps from equal starts, with words for tokens; adaptive K-FAC, so that nothing is tuned for one of them.

    uv run python experiments/bench_kfac.py            # ten minutes on 2 idle cores; writes results/
    uv run python experiments/bench_kfac.py --stages head training    # without the quality of caps
    uv run python experiments/bench_kfac.py --quick    # small shapes: does it run? numbers mean nothing
"""

import os

# LAPACK's threads and XLA's wait for each other on few cores; read when numpy and scipy load.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import collections
import importlib.metadata
import json
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
import scipy.stats

import fisher_jax as fj
from fisher_jax.kronecker.factors import forms as factors
from fisher_jax.kronecker.factors import tikhonov
from fisher_jax.text import corpora

RESULTS = pathlib.Path(__file__).parent / "results"
DAMPING, PERIOD = 1e-3, 10
CAPS = (64, 128, 512, 1024)  # of a batch with 1,024 tokens: the last is no cap
FIRST_DAMPING, ADAMW_RATES = 0.1, (1e-3, 3e-3, 1e-2, 3e-2)
STAGES = {  # small and real sizes
    "head": ((2003, 32, 24), (50257, 768, 512)),
    "training": ((2003, 32, 2, 2, 16, (8, 16)), (49152, 256, 4, 8, 256, (128, 512, 1024))),
    "quality": ((503, 16, 1, 2, 16, (8, 32), 2, 12), (4200, 64, 1, 8, 128, CAPS, 4, 40)),
}


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
    seconds = measure.medians(ways, rounds)
    scale = vocabulary / small
    dense_name = f"dense factor of {small} outputs"
    build_general, build_pushed = (seconds[f"build and apply, {way}"] for way in ("any gradient", "push-through"))
    saved = (build_general - build_pushed) / (build_general + (PERIOD - 1) * seconds["apply to any gradient"])
    return {
        "vocabulary": vocabulary, "width": width, "tokens": tokens, "seconds": seconds,
        "push-through saves of ten updates": saved,
        "ratio": {name: t / seconds["one product U x [T, H]"] for name, t in seconds.items() if name != dense_name},
        "state MiB, float32": size((A, G)) / 2**20, "state MiB, bfloat16": size(half) / 2**20,
        "dense, extrapolated": {
            "state GiB": 2 * 4 * vocabulary**2 / 2**30, "seconds": seconds[dense_name] * scale**3
        },
    }  # fmt: skip


def transformer(vocabulary, width, layers, heads, seed=1):
    """A causal decoder of stacked layers under scan, and its parameters."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
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
    """AdamW's step beside K-FAC's, with a refresh and without; ``PERIOD`` steps have one refresh."""
    apply_fn, params = transformer(vocabulary, width, layers, heads=4)
    tokens = jax.random.randint(jax.random.key(2), (rows, length + 1), 0, vocabulary)
    batch = fj.next_token_batch(tokens)

    def loss(params, batch):
        return -jnp.mean(fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets))

    def stepper(tx, own_taps=False):
        @jax.jit
        def step(params, state, batch, key):
            if own_taps:
                _, grads, taps = fj.value_grad_and_taps(loss)(params, batch)
                more = {"taps": taps, "taps_scale": float(rows * length)}
            else:
                grads, more = jax.grad(loss)(params, batch), {}
            updates, state = tx.update(grads, state, params, batch=batch, key=key, **more)
            return optax.apply_updates(params, updates), state

        return lambda state: step(params, state, batch, jax.random.key(3))

    def chained(cap):
        natural = fj.scale_by_kfac(
            apply_fn,
            example=batch,
            damping=DAMPING,
            curvature=fj.Curvature(token_cap=cap),
            refresh=fj.Refresh(period=PERIOD),
        )
        return optax.chain(natural, optax.trace(0.9), optax.scale_by_learning_rate(0.1))

    adamw = optax.with_extra_args_support(optax.adamw(1e-3))
    adam_step, adam_state = stepper(adamw), adamw.init(params)
    ways, states = {"AdamW": lambda: adam_step(adam_state)}, {}
    for cap in token_caps:
        tx = chained(cap)
        step, fresh = stepper(tx), tx.init(params)
        _, warm = step(fresh)  # its factors serve the next updates
        states[cap] = size(fresh[0]) / 2**20
        ways[f"cap {cap}, refresh"] = lambda step=step, s=fresh: step(s)
        ways[f"cap {cap}, between"] = lambda step=step, s=warm: step(s)
    tx = chained(token_caps[0])
    taps_step, taps_state = stepper(tx, own_taps=True), tx.init(params)
    ways[f"cap {token_caps[0]}, refresh from the step's own taps"] = lambda: taps_step(taps_state)
    seconds = measure.medians(ways, rounds)
    found = {}
    for cap in token_caps:
        refresh, between = (seconds[f"cap {cap}, {x}"] / seconds["AdamW"] for x in ("refresh", "between"))
        amortised = (refresh + (PERIOD - 1) * between) / PERIOD
        found[str(cap)] = {
            "refresh": refresh, "between": between, "amortised": amortised, "state MiB": states[cap]
        }  # fmt: skip
    return {
        "vocabulary": vocabulary, "width": width, "layers": layers, "rows": rows, "length": length,
        "parameters": sum(x.size for x in jax.tree.leaves(params)), "period": PERIOD, "seconds": seconds,
        "refresh from own taps": seconds[f"cap {token_caps[0]}, refresh from the step's own taps"] / seconds["AdamW"],
        "in AdamW steps, by token cap": found,
    }  # fmt: skip


def words(number, vocabulary):
    """The first words of Wikipedia's articles as ranks by frequency; rare ones are all the last."""
    found = []
    for document in corpora.documents(("wikipedia",)):
        found += re.findall(r"\w+|[^\w\s]", document.text.lower())
        if len(found) >= number:
            break
    common = collections.Counter(found).most_common(vocabulary - 1)
    ranks = {word: rank for rank, (word, _) in enumerate(common)}
    return np.array([ranks.get(word, vocabulary - 1) for word in found[:number]])


def bench_quality(vocabulary, width, layers, rows, length, token_caps, seeds, steps):
    """Losses on unseen words after equal steps from equal starts, by cap, beside AdamW with the best of its rates."""
    apply_fn, _ = transformer(vocabulary, width, layers, heads=4)
    text = words(rows * (length + 1) * (steps + 4), vocabulary).reshape(steps + 4, rows, length + 1)
    train, test = fj.next_token_batch(jnp.asarray(text[:steps].reshape(-1, length + 1))), text[steps:]
    train = jax.tree.map(lambda x: x.reshape(steps, rows, length), train)
    test = fj.next_token_batch(jnp.asarray(test.reshape(-1, length + 1)))

    def loss(params, batch):
        return -jnp.mean(fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets))

    def runner(optimizer):
        @jax.jit
        def run(how, params, key):
            tx = optax.with_extra_args_support(optimizer(how))

            def step(carry, x):
                params, mean, state, count = carry
                batch, key = x
                grads = jax.grad(loss)(params, batch)
                updates, state = tx.update(grads, state, params, batch=batch, key=key)
                params = optax.apply_updates(params, updates)
                # About the last ten steps: single ones of an adaptive run wander.
                mean = optax.incremental_update(params, mean, jnp.maximum(0.1, 1 / (count + 1)))
                return (params, mean, state, count + 1), None

            keys = jax.random.split(key, steps)
            (_, mean, *_), _ = jax.lax.scan(step, (params, params, tx.init(params), jnp.zeros(())), (train, keys))
            return loss(mean, test)

        return run

    starts = [transformer(vocabulary, width, layers, heads=4, seed=seed)[1] for seed in range(seeds + 1)]

    def losses(run, how, seeds):
        return [float(run(how, starts[seed], jax.random.key(seed))) for seed in seeds]

    example = jax.tree.map(lambda x: x[0], train)

    def natural(cap):
        run = runner(
            lambda damping: fj.kfac(apply_fn, example=example, damping=damping, curvature=fj.Curvature(token_cap=cap))
        )
        found = losses(run, FIRST_DAMPING, range(seeds))
        print(f"token cap {cap}: {[round(x, 4) for x in found]}", flush=True)
        return found

    by_cap = {str(cap): natural(cap) for cap in token_caps}
    adamw = runner(optax.adamw)
    tried = [losses(adamw, rate, [seeds])[0] for rate in ADAMW_RATES]  # on a seed of its own
    rate = ADAMW_RATES[int(np.nanargmin(tried))]
    return {
        "vocabulary": vocabulary, "width": width, "layers": layers, "tokens in a batch": rows * length,
        "steps": steps, "losses by token cap": by_cap, "first damping": FIRST_DAMPING,
        "AdamW rate": rate, "AdamW losses": losses(adamw, rate, range(seeds)),
    }  # fmt: skip


def markdown(found):
    """The page of results."""
    first = f"{found['device']}, jax {found['jax']}, float32; medians of {found['rounds']} interleaved rounds."
    sections = {"head": of_head, "training": of_training, "quality": of_quality}
    rest = [line for name, section in sections.items() if name in found for line in section(found[name])]
    return "\n".join(["# What K-FAC costs", "", first, "", *rest])


def of_head(head):
    dense = head["dense, extrapolated"]
    yield from (f"## A head with {head['vocabulary']:,} rows, width {head['width']}, {head['tokens']} tokens", "")
    yield from ("| | seconds | times one product |", "|---|---:|---:|")
    for name, ratio in head["ratio"].items():
        yield f"| {name} | {head['seconds'][name]:.3f} | {ratio:.2f} |"
    yield from (
        "",
        f"State {head['state MiB, float32']:.1f} MiB in float32, {head['state MiB, bfloat16']:.1f} in bfloat16. A "
        f"dense factor would take {dense['state GiB']:.1f} GiB and, by the cube from 2,048 outputs, "
        f"{dense['seconds'] / 3600:.1f} hours.",
        "",
        f"Push-through at every refresh would save {head['push-through saves of ten updates']:.1%} of what ten "
        "updates cost. `scale_by_kfac` does not use it: the gradient that it is given may no longer be that of the "
        "batch.",
        "",
    )


def of_training(training):
    by_cap = training["in AdamW steps, by token cap"]
    yield (
        f"## A training step: {training['layers']} layers of width {training['width']}, vocabulary "
        f"{training['vocabulary']:,}, {training['rows']} x {training['length']} tokens"
    )
    yield from (
        "",
        f"In AdamW steps ({training['seconds']['AdamW']:.2f} s); of {PERIOD} steps one refreshes.",
        "",
    )
    yield from ("| token cap | refresh | between | **amortised** | state |", "|---:|---:|---:|---:|---:|")
    for cap, x in by_cap.items():
        steps = f"{x['refresh']:.2f} | {x['between']:.2f} | **{x['amortised']:.2f}**"
        yield f"| {cap} | {steps} | {x['state MiB']:.0f} MiB |"
    yield from (
        "",
        f"A refresh from the step's own taps: {training['refresh from own taps']:.2f} (cap {next(iter(by_cap))}).",
    )


def of_quality(quality):
    seeds = len(quality["AdamW losses"])
    yield from ("", f"## What the cap costs: batches of {quality['tokens in a batch']:,} words of Wikipedia", "")
    yield (
        f"Nats per word on unseen text after {quality['steps']} steps, of parameters averaged over about ten of them "
        f"(vocabulary {quality['vocabulary']:,}, {quality['layers']} layers of width {quality['width']}), means over "
        f"{seeds} seeds, and differences from "
        "the last row's, seed by seed, with 95% intervals (Student's t): with zero inside, they cannot be told apart."
    )
    yield from ("", "| | loss | difference |", "|---|---:|---:|", *quality_rows(quality), "")
    yield (
        f"AdamW with the best of the rates {', '.join(map(str, ADAMW_RATES))} on a seed of its own; K-FAC adaptive, "
        f"first damping {quality['first damping']} for all caps."
    )
    yield ""


def quality_rows(quality):
    losses = {f"token cap {cap}": np.array(x) for cap, x in quality["losses by token cap"].items()}
    reference = list(losses.values())[-1]
    losses = {f"AdamW, rate {quality['AdamW rate']}": np.array(quality["AdamW losses"])} | losses
    for name, found in losses.items():
        gap = found - reference
        half = scipy.stats.t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / len(gap) ** 0.5
        shown = f"{gap.mean():+.3f} ± {half:.3f}" if gap.any() else ""
        yield f"| {name} | {found.mean():.3f} | {shown} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, two rounds; writes nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for bench_kfac.json and .md")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="the others stay as stored")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    file = args.out / "bench_kfac.json"
    found = json.loads(file.read_text()) if file.is_file() and set(args.stages) != set(STAGES) else {}
    found |= {
        "jax": jax.__version__,
        "fisher_jax": importlib.metadata.version("fisher-jax"),
        "device": jax.devices()[0].device_kind,
        "rounds": rounds,
    }
    for stage in args.stages:
        begin = time.perf_counter()
        small, whole = STAGES[stage]
        run = {"head": bench_head, "training": bench_training, "quality": bench_quality}[stage]
        found[stage] = run(*(small if args.quick else whole), *(() if stage == "quality" else (rounds,)))
        page = markdown({name: x for name, x in found.items() if name not in STAGES or name == stage})
        print(page, f"{time.perf_counter() - begin:.0f} s", sep="\n", flush=True)
        if not args.quick:
            file.write_text(json.dumps(found, indent=1) + "\n")
            file.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    main()

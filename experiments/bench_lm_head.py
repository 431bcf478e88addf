"""How fast is the closed-form head Fisher, against per-token gradients and against the machine?

One run measures everything side by side: the ways are interleaved, round after round, and medians are printed as
ratios, with the share of the rate that this machine reaches in a large matrix product.

    uv run python experiments/bench_lm_head.py            # about ten minutes on 2 cores
    uv run python experiments/bench_lm_head.py --quick    # one shape
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj

SHAPES = [(512, 768, 50257), (1024, 576, 49152), (4096, 768, 50257)]
RIVAL_TOKENS = 8  # the rivals' cost is proportional to tokens; so many are timed


def problem(tokens, width, vocabulary, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, width))
    head = (jax.random.normal(keys[1], (vocabulary, width)) * width**-0.5).astype(dtype)
    return hidden, head, jax.random.randint(keys[2], (tokens,), 0, vocabulary)


def log_prob(head, hidden, target):
    return jax.nn.log_softmax(hidden @ head.astype(jnp.float32).T)[target]


@jax.jit
def gradient_scan(hidden, head, targets):
    """A gradient per token, one after another; squares and fourth powers accumulated."""

    def step(carry, token):
        g = jax.grad(log_prob)(head, *token).astype(jnp.float32)
        return (carry[0] + g**2, carry[1] + g**4), None

    zeros = jnp.zeros(head.shape, jnp.float32)
    return jax.lax.scan(step, (zeros, zeros), (hidden, targets))[0]


@jax.jit
def chunked_vmap(hidden, head, targets):
    """``vmap(grad)`` over a chunk of tokens, squared and summed: the textbook way."""
    g = jax.vmap(jax.grad(log_prob), (None, 0, 0))(head, hidden, targets).astype(jnp.float32)
    return (g**2).sum(0), (g**4).sum(0)


@jax.jit
def matmul(a, b):
    return a @ b


@jax.jit
def plain_loss(hidden, head, targets):
    z = jnp.matmul(hidden, head.astype(jnp.float32).T, precision="highest")
    return jax.nn.logsumexp(z, 1), jnp.take_along_axis(z, targets[:, None], 1)


def ours(groups, kind, unit="token"):
    @functools.partial(jax.jit, static_argnames="given")
    def run(hidden, head, targets, log_sum_exp=None, given=False):
        del given
        rows = (1, -1) if unit == "sequence" else (-1,)
        return fj.lm_head.moments(
            hidden.reshape(*rows, hidden.shape[1]), head, targets.reshape(rows), groups=groups, kind=kind, unit=unit,
            log_sum_exp=log_sum_exp,
        )  # fmt: skip

    return run


def seconds(function, *args):
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - begin


def torch_loop(tokens, width, vocabulary):
    """``backward()`` per token in torch, the usual loop: a function that returns its seconds, if torch is there."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    hidden = torch.randn(tokens, width)
    head = torch.randn(vocabulary, width).mul_(width**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    first, second = torch.zeros(vocabulary, width), torch.zeros(vocabulary, width)

    def run():
        for h, y in zip(hidden, targets, strict=True):
            head.grad = None
            torch.nn.functional.cross_entropy((head @ h)[None], y[None]).backward()
            square = head.grad.square_()
            first.add_(square)
            second.addcmul_(square, square)

    return run


def bench(shape, rounds, dtype, rivals):
    tokens, width, vocabulary = shape
    hidden, head, targets = problem(tokens, width, vocabulary, dtype)
    log_sum_exp = plain_loss(hidden, head, targets)[0]
    few = (hidden[:RIVAL_TOKENS], head, targets[:RIVAL_TOKENS])
    square = jax.random.normal(jax.random.key(1), (4096, 4096))
    full, row = ours("param", "empirical"), ours("row", "empirical")
    ways = {
        "matmul 4096^3": lambda: matmul(square, square),
        "loss (logits, log-sum-exp)": lambda: plain_loss(hidden, head, targets),
        "param": lambda: full(hidden, head, targets),
        "param, log-sum-exp given": lambda: full(hidden, head, targets, log_sum_exp, given=True),
        "param, true": lambda: true_full(hidden, head, targets),
        "row": lambda: row(hidden, head, targets),
        "row, sequence": lambda: row_sequence(hidden, head, targets),
        "row, both kinds, sequence": lambda: row_both(hidden, head, targets),
    }
    true_full, row_sequence = ours("param", "true"), ours("row", "empirical", "sequence")
    row_both = ours("row", ("empirical", "true"), "sequence")
    scale = dict.fromkeys(ways, 1.0)
    if rivals:
        ways["gradient scan"] = lambda: gradient_scan(*few)
        ways["vmap(grad), chunk 4"] = lambda: (
            chunked_vmap(few[0][:4], head, few[2][:4]), chunked_vmap(few[0][4:], head, few[2][4:])
        )  # fmt: skip
        scale |= dict.fromkeys(("gradient scan", "vmap(grad), chunk 4"), tokens / RIVAL_TOKENS)
        torch_run = torch_loop(RIVAL_TOKENS, width, vocabulary)
        if torch_run is not None:
            ways["torch backward() per token"] = torch_run
            scale["torch backward() per token"] = tokens / RIVAL_TOKENS
    for way in ways.values():
        jax.block_until_ready(way())
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way) * scale[name])
    median = {name: float(np.median(t)) for name, t in times.items()}
    product = 2 * tokens * width * vocabulary
    rate = 2 * 4096**3 / median["matmul 4096^3"]
    products = {
        "loss (logits, log-sum-exp)": 1, "param": 4, "param, log-sum-exp given": 3, "param, true": 4, "row": 1,
        "row, sequence": 1, "row, both kinds, sequence": 1,
    }  # fmt: skip
    workspace = {
        name: run.lower(hidden, head, targets, *more).compile().memory_analysis().temp_size_in_bytes / 2**20
        for name, run, more in (
            ("param", full, ()), ("param, log-sum-exp given", full, (log_sum_exp,)), ("param, true", true_full, ()),
            ("row", row, ()), ("row, sequence", row_sequence, ()), ("row, both kinds, sequence", row_both, ()),
        )
    }  # fmt: skip
    rows = []
    for name in ways:
        share = products[name] * product / rate / median[name] if name in products else None
        rows.append({
            "way": name, "seconds": median[name], "times param": median[name] / median["param"],
            "share of matmul rate": share, "workspace MiB": workspace.get(name),
        })  # fmt: skip
    return {"tokens": tokens, "width": width, "vocabulary": vocabulary, "matmul GFLOP/s": rate / 1e9, "rows": rows}


def show(found):
    print(f"\nT={found['tokens']} H={found['width']} V={found['vocabulary']}, "
          f"matmul {found['matmul GFLOP/s']:.0f} GFLOP/s, {jax.devices()[0].device_kind}")  # fmt: skip
    print(f"{'':32}{'seconds':>10}{'/ param':>10}{'roofline':>10}{'workspace':>12}")
    for r in found["rows"]:
        share = "" if r["share of matmul rate"] is None else f"{r['share of matmul rate']:.0%}"
        space = "" if r["workspace MiB"] is None else f"{r['workspace MiB']:.1f} MiB"
        print(f"{r['way']:32}{r['seconds']:10.3f}{r['times param']:10.2f}{share:>10}{space:>12}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the first shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="also write the figures as JSON")
    args = parser.parse_args()
    found = []
    for shape in SHAPES[: 1 if args.quick else None]:
        rivals = not args.no_rivals and shape[0] <= 1024
        found.append(bench(shape, args.rounds, jnp.dtype(args.head_dtype), rivals))
        show(found[-1])
    if args.out is not None:
        args.out.write_text(json.dumps({"jax": jax.__version__, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

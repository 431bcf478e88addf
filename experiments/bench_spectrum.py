"""What does one curvature product cost, against ``jax.value_and_grad`` of the mean loss?

One run measures everything side by side: the ways are interleaved, round after round, and medians are printed as
ratios, with the temporary memory that the compiler plans for each and what a kept linearisation holds.

    uv run python experiments/bench_spectrum.py              # a decoder of 10M parameters, minutes on 2 cores
    uv run python experiments/bench_spectrum.py --shipped    # SmolLM2-135M
    uv run python experiments/bench_spectrum.py --quick      # a tiny decoder: does it run?
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
from fisher_jax import models

SMALL = models.DecoderConfig(
    vocab_size=8192, width=320, num_layers=6, num_heads=5, num_kv_heads=5, head_size=64, mlp_size=854,
    max_positions=1024, tied=True,
)  # fmt: skip
TINY = models.DecoderConfig(
    vocab_size=256, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_size=16, mlp_size=64, max_positions=64,
    tied=True,
)  # fmt: skip
OPERATORS = {"ggn": fj.operators.ggn, "empirical": fj.operators.empirical_fisher, "hessian": fj.operators.hessian}


def load(args):
    """``(name, apply_fn, params, vocabulary)``."""
    if args.shipped:
        model = models.load()
        return "SmolLM2-135M", model.apply, model.params, model.config.vocab_size
    config = TINY if args.quick else SMALL
    params = models.init_params(config, jax.random.key(0), "float32")
    return "decoder", models.from_config(config).apply, params, config.vocab_size


def loss_of(apply_fn):
    def loss(params, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, batch.inputs), batch.targets)
        return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)

    return loss


def ways_of(apply_fn, params, batch, v, microbatch_size):
    """``{name: (jitted function, arguments, bytes that are kept between products)}``."""
    loss = loss_of(apply_fn)
    ways = {
        "forward": (jax.jit(loss), (params, batch), 0),
        "value_and_grad": (jax.jit(jax.value_and_grad(loss)), (params, batch), 0),
    }
    rows = {"microbatch_size": microbatch_size}
    options = {"": {}, ", in micro-batches": rows, ", kept": {"keep_linearization": True}}
    for name, make in OPERATORS.items():
        for suffix, option in options.items():
            matvec = make(apply_fn, fj.categorical, params, batch, **option)
            own = {id(x) for x in jax.tree.leaves((params, batch))}
            held = sum(x.nbytes for x in jax.tree.leaves(matvec) if id(x) not in own)
            ways[name + suffix] = (jax.jit(lambda mv, v: mv(v)), (matvec, v), held if "kept" in suffix else 0)
    return ways


def seconds(function, args):
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - begin


def measure(ways, rounds, base):
    compiled = {name: function.lower(*args).compile() for name, (function, args, _) in ways.items()}
    for name, (_, args, _) in ways.items():
        jax.block_until_ready(compiled[name](*args))
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (_, args, _) in ways.items():
            times[name].append(seconds(compiled[name], args))
    median = {name: float(np.median(t)) for name, t in times.items()}
    return [
        {
            "way": name, "seconds": median[name], f"times {base}": median[name] / median[base],
            "temporary MiB": compiled[name].memory_analysis().temp_size_in_bytes / 2**20, "kept MiB": held / 2**20,
        }
        for name, (_, _, held) in ways.items()
    ]  # fmt: skip


def show(title, rows, base):
    print(f"\n{title}")
    print(f"{'':34}{'seconds':>10}{'/ ' + base:>18}{'temporary':>14}{'kept':>12}")
    for r in rows:
        held = f"{r['kept MiB']:.1f} MiB" if r["kept MiB"] else ""
        ratio = r[f"times {base}"]
        print(f"{r['way']:34}{r['seconds']:10.4f}{ratio:18.2f}{r['temporary MiB']:10.1f} MiB{held:>12}")


def block_ways(rows, width, classes):
    """Spectra of an MLP's blocks, against those from the gradients of every token."""
    keys = jax.random.split(jax.random.key(2), 4)
    params = {
        "first": jax.random.normal(keys[0], (width, width)) * width**-0.5,
        "second": jax.random.normal(keys[1], (width, classes)) * width**-0.5,
    }
    batch = fj.Batch(jax.random.normal(keys[2], (rows, width)), jax.random.randint(keys[3], (rows,), 0, classes))

    def apply_fn(p, x):
        return jnp.tanh(x @ p["first"]) @ p["second"]

    def log_prob(p, x, y):
        return jax.nn.log_softmax(apply_fn(p, x))[y]

    def materialised():
        grads = jax.jit(jax.vmap(jax.grad(log_prob), (None, 0, 0)))(params, batch.inputs, batch.targets)
        flat = {name: np.asarray(g).reshape(rows, -1) for name, g in grads.items()}
        return {name: np.linalg.eigvalsh(g @ g.T / rows) for name, g in flat.items()}

    return {
        "gradients of every token": materialised,
        "block_spectrum": lambda: fj.block_spectrum(apply_fn, fj.categorical, params, batch),
    }


def bench_blocks(args):
    ways = block_ways(*((32, 64, 8) if args.quick else (128, 512, 64)))
    times = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(args.rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    rows = [{"way": name, "seconds": float(np.median(t))} for name, t in times.items()]
    print("\nSpectra of the blocks of an MLP, one token per row")
    for r in rows:
        print(f"{r['way']:34}{r['seconds']:10.4f}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny decoder")
    parser.add_argument("--shipped", action="store_true", help="SmolLM2-135M instead of a decoder of 10M parameters")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path, default=None, help="also write the figures as JSON")
    args = parser.parse_args()
    name, apply_fn, params, vocabulary = load(args)
    length = 16 if args.quick else args.seq_len
    tokens = jax.random.randint(jax.random.key(1), (args.batch_size, length + 1), 0, vocabulary)
    batch, v = fj.next_token_batch(tokens), jax.tree.map(jnp.cos, params)
    number = sum(x.size for x in jax.tree.leaves(params))
    title = f"{name}, {number / 1e6:.1f}M parameters, {args.batch_size} x {length} tokens"
    title += f", {jax.devices()[0].device_kind}"
    rows = measure(ways_of(apply_fn, params, batch, v, 1), args.rounds, "value_and_grad")
    show(title, rows, "value_and_grad")
    blocks = bench_blocks(args)
    if args.out is not None:
        found = {"jax": jax.__version__, "title": title, "products": rows, "blocks": blocks}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

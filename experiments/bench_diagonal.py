"""What do taps and the estimators of all parameters cost, against ``jax.value_and_grad`` of the same loss?

One run measures everything side by side: the ways are interleaved, round after round, and medians are printed as
ratios, with the peak of temporary memory that the compiler plans for each.

    uv run python experiments/bench_diagonal.py            # about five minutes on 2 cores
    uv run python experiments/bench_diagonal.py --quick    # a tiny model: does it run?
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import measure
import optax

import fisher_jax as fj
from fisher_jax import models

FOUR_LAYERS = models.DecoderConfig(
    vocab_size=8192, width=384, num_layers=4, num_heads=6, num_kv_heads=6, head_size=64, mlp_size=1024,
    max_positions=1024, tied=False,
)  # fmt: skip
TINY = models.DecoderConfig(
    vocab_size=256, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_size=16, mlp_size=64, max_positions=64,
    tied=False,
)  # fmt: skip


def squares(inputs, cotangents):
    del inputs
    return jnp.sum(cotangents**2)


def loss_of(apply_fn):
    def loss(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, batch.inputs), batch.targets).mean()

    return loss


def batch_of(rows, length, vocabulary):
    tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, vocabulary)
    return fj.next_token_batch(tokens)


def observing(apply_fn, example, **options):
    fisher = fj.group_fisher(apply_fn, example=example, **options)
    return lambda params, batch: fisher.observe(params, batch, jax.random.key(0))


def training(tx, loss):
    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, key=jax.random.key(0))
        return optax.apply_updates(params, updates), state

    return step


def ways_of(apply_fn, params, batch):
    """``{name: (function, arguments)}``."""
    loss = loss_of(apply_fn)
    sequence = fj.group_fisher(apply_fn, example=batch, estimator="sequence", groups="row")
    head = fj.group_fisher(apply_fn, example=batch, estimator="head", groups="row")

    def step_with_taps(params, batch, fisher):
        value, grads, taps = fj.value_grad_and_taps(loss)(params, batch)
        return value, grads, fisher.observe(params, batch, taps=taps, taps_scale=batch.targets.size)

    functions = {
        "value_and_grad": jax.value_and_grad(loss),
        "taps": fj.capture(loss),
        "taps, reduced at their use": fj.capture(loss, reduce=squares),
        "taps and gradients": fj.value_grad_and_taps(loss),
        "signs, entries": observing(apply_fn, batch),
        "signs, rows": observing(apply_fn, batch, groups="row"),
        "signs by sequence, rows": observing(apply_fn, batch, groups="row", unit="sequence"),
        "sequence, rows": lambda params, batch: sequence.observe(params, batch),
        "gradients and sequence, rows, of their taps": functools.partial(step_with_taps, fisher=sequence),
        "gradients and head, rows, of their taps": functools.partial(step_with_taps, fisher=head),
        "head, rows": lambda params, batch: head.observe(params, batch),
        "sampled, entries": observing(apply_fn, batch, estimator="sampled"),
    }
    ways = {name: (jax.jit(function), (params, batch)) for name, function in functions.items()}
    plain = optax.adamw(1e-3)
    tracked = optax.chain(fj.track_fisher(fj.group_fisher(apply_fn, example=batch, groups="row")), plain)
    for name, tx in (("training step, adamw", optax.chain(plain)), ("training step, adamw, tracked signs", tracked)):
        ways[name] = jax.jit(training(tx, loss)), (params, tx.init(params), batch)
    return ways


def exact_ways(apply_fn, params, batch):
    """Per-token squares: chunks of backward passes, and the textbook's gradient of every token at once."""

    def naive(params, batch):
        def log_prob(params, row, position):
            outputs = apply_fn(params, batch.inputs[row][None])[0, position]
            return fj.categorical.log_prob(outputs, batch.targets[row, position])

        rows, positions = (x.reshape(-1) for x in jnp.indices(batch.targets.shape))
        grads = jax.vmap(jax.grad(log_prob), (None, 0, 0))(params, rows, positions)
        return jax.tree.map(lambda g: jnp.mean(g**2, 0), grads)

    ways = {
        "value_and_grad, few tokens": jax.value_and_grad(loss_of(apply_fn)),
        "exact, rows": observing(apply_fn, batch, estimator="exact", groups="row", chunk_size=4),
        "exact, entries": observing(apply_fn, batch, estimator="exact", chunk_size=4),
        "vmap(grad), entries": naive,
    }
    return {name: (jax.jit(function), (params, batch)) for name, function in ways.items()}


def deep(quick):
    """Sixteen rematerialised, scanned layers, whose memory is the question."""
    width, layers, rows = (16, 3, 2) if quick else (256, 16, 16)
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "layers": {
            "up": jax.random.normal(keys[0], (layers, width, 4 * width)) / width**0.5,
            "down": jax.random.normal(keys[1], (layers, 4 * width, width)) / (4 * width) ** 0.5,
        },
        "head": jax.random.normal(keys[2], (width, 64)) / width**0.5,
    }

    def apply_fn(params, x):
        @jax.checkpoint
        def layer(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]

    inputs = jax.random.normal(keys[3], (rows, 256, width))
    batch = fj.Batch(inputs, jnp.zeros(inputs.shape[:-1], jnp.int32))
    loss = loss_of(apply_fn)
    functions = {
        "value_and_grad": jax.value_and_grad(loss),
        "taps": fj.capture(loss),
        "taps, reduced at their use": fj.capture(loss, reduce=squares),
        "signs, entries": observing(apply_fn, batch),
        "signs, rows": observing(apply_fn, batch, groups="row"),
        "sequence, rows": observing(apply_fn, batch, groups="row", estimator="sequence"),
        "sequence, tensors": observing(apply_fn, batch, groups="tensor", estimator="sequence"),
    }
    return {name: (jax.jit(function), (params, batch)) for name, function in functions.items()}


def table_of(ways, rounds, base):
    """Median seconds and MiB of temporaries and results of every way, and the ratios to the first."""
    compiled = {name: function.lower(*args).compile() for name, (function, args) in ways.items()}
    calls = {name: functools.partial(compiled[name], *args) for name, (_, args) in ways.items()}
    seconds, mib = measure.medians(calls, rounds), {}
    for name, program in compiled.items():
        memory = program.memory_analysis()
        mib[name] = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
    return [
        {
            "way": name, "seconds": seconds[name], "MiB": mib[name], "ratio": seconds[name] / seconds[base],
            "memory ratio": mib[name] / mib[base],
        }
        for name in ways
    ]  # fmt: skip


def show(title, rows):
    print(f"\n{title}\n{'':48}{'seconds':>10}{'ratio':>8}{'MiB':>10}{'ratio':>8}")
    for r in rows:
        print(f"{r['way']:48}{r['seconds']:10.4f}{r['ratio']:8.2f}{r['MiB']:10.1f}{r['memory ratio']:8.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/results/bench_diagonal.json"))
    args = parser.parse_args()
    config = TINY if args.quick else FOUR_LAYERS
    rows, length, rounds = (2, 16, 2) if args.quick else (8, 256, args.rounds)
    apply_fn, params = models.from_config(config).apply, models.init_params(config, jax.random.key(0), "float32")
    small, small_params = models.from_config(TINY).apply, models.init_params(TINY, jax.random.key(0), "float32")
    few = batch_of(2, 32, TINY.vocab_size)
    found = {
        f"a decoder of {config.num_layers} layers, {rows} x {length} tokens": table_of(
            ways_of(apply_fn, params, batch_of(rows, length, config.vocab_size)), rounds, "value_and_grad"
        ),
        "exact, a tiny decoder, 64 tokens": table_of(
            exact_ways(small, small_params, few), rounds, "value_and_grad, few tokens"
        ),
        "sixteen rematerialised scanned layers": table_of(deep(args.quick), 2, "value_and_grad"),
    }
    for title, table in found.items():
        show(title, table)
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        args.out.write_text(json.dumps({"versions": versions, "tables": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

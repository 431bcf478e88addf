"""What do curvature products, Lanczos and block spectra cost?

One run measures everything side by side: the ways are interleaved, round after round, and medians are printed with
their ratios.

- products of the operators against ``jax.value_and_grad`` of the mean loss, with the temporary memory that the
  compiler plans for each and what a kept linearisation holds;
- 40 steps of Lanczos on an MLP of 10M parameters against its 40 products alone;
- spectra of blocks against those from the gradients of every token, with the peak of a process of its own;
- a GGN product and its largest eigenvalues against curvlinops on torch, where ``--torch`` names an interpreter
  that has ``torch`` and ``curvlinops-for-pytorch``.

    uv run python experiments/bench_spectrum.py              # a decoder of 10M parameters, minutes on 2 cores
    uv run python experiments/bench_spectrum.py --shipped    # SmolLM2-135M
    uv run python experiments/bench_spectrum.py --quick      # tiny models: does it run?
    python -m venv torch-env && torch-env/bin/pip install torch==2.13.0 curvlinops-for-pytorch
    uv run python experiments/bench_spectrum.py --torch torch-env/bin/python
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import measure
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


def bench_products(args):
    name, apply_fn, params, vocabulary = load(args)
    length = 16 if args.quick else args.seq_len
    tokens = jax.random.randint(jax.random.key(1), (args.batch_size, length + 1), 0, vocabulary)
    batch, v = fj.next_token_batch(tokens), jax.tree.map(jnp.cos, params)
    ways = ways_of(apply_fn, params, batch, v, 1)
    compiled = {name: function.lower(*given).compile() for name, (function, given, _) in ways.items()}
    calls = {name: lambda c=compiled[name], given=given: c(*given) for name, (_, given, _) in ways.items()}
    median = measure.medians(calls, args.rounds)
    rows = [
        {
            "way": name, "seconds": median[name], "times value_and_grad": median[name] / median["value_and_grad"],
            "temporary MiB": compiled[name].memory_analysis().temp_size_in_bytes / 2**20, "kept MiB": held / 2**20,
        }
        for name, (_, _, held) in ways.items()
    ]  # fmt: skip
    number = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    return f"Products: {name}, {number:.1f}M parameters, {args.batch_size} x {length} tokens", rows


def mlp(widths, rows):
    """``(apply_fn, params, batch)`` of an MLP with biases and a categorical outcome."""
    keys = jax.random.split(jax.random.key(3), len(widths) + 1)
    sizes = zip(keys[:-2], widths[:-1], widths[1:], strict=True)
    params = [{"kernel": jax.random.normal(k, (a, b)) * a**-0.5, "bias": jnp.zeros(b)} for k, a, b in sizes]
    inputs = jax.random.normal(keys[-2], (rows, widths[0]))
    batch = fj.Batch(inputs, jax.random.randint(keys[-1], (rows,), 0, widths[-1]))

    def apply_fn(params, x):
        for i, layer in enumerate(params):
            x = (jnp.tanh(x) if i else x) @ layer["kernel"] + layer["bias"]
        return x

    return apply_fn, params, batch


def bench_lanczos(args):
    """The same products alone, and with Lanczos around them (whose verification takes one product more: left out)."""
    steps = 5 if args.quick else 40
    apply_fn, params, batch = mlp(
        *(((8, 16, 4), 8) if args.quick else ((1024, 2048, 2048, 1024, 1024, 512), args.tokens))
    )
    matvec = fj.operators.ggn(apply_fn, fj.categorical, params, batch)
    v, apply = jax.tree.map(jnp.cos, params), jax.jit(lambda matvec, v: matvec(v))

    def products():
        for _ in range(steps):
            jax.block_until_ready(apply(matvec, v))

    def lanczos():
        fj.lanczos(matvec, params, num_steps=steps, num_eigenvalues=5, key=jax.random.key(1), verify=False)

    fj.lanczos(matvec, params, num_steps=2, num_eigenvalues=1, key=jax.random.key(1), verify=False)
    jax.block_until_ready(apply(matvec, v))
    median = measure.medians({"products alone": products, "lanczos": lanczos}, args.lanczos_rounds, warm=False)
    number = sum(x.size for x in jax.tree.leaves(params))
    held = {"products alone": 0.0, "lanczos": steps * number * 4 / 2**20}
    rows = [
        {"way": name, "seconds": t, "times products": t / median["products alone"], "basis MiB": held[name]}
        for name, t in median.items()
    ]
    return f"Lanczos, {steps} steps: an MLP of {number / 1e6:.1f}M parameters, {len(batch.targets)} tokens", rows


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
    sizes = (32, 64, 8) if args.quick else (256, 512, 64)
    median = measure.medians(block_ways(*sizes), args.rounds)
    base, rows = median["gradients of every token"], []
    for name, taken in median.items():
        found = measure.alone(__file__, "--block-way", name, *(["--quick"] if args.quick else []))
        rows.append({"way": name, "seconds": taken, "times": taken / base, "peak MiB": found["peak MiB"]})
    return f"Spectra of the blocks of an MLP, {sizes[0]} tokens, width {sizes[1]}", rows


def one_block_way(args):
    """What the way takes beyond what it starts with, in a process of its own."""
    way = block_ways(*((32, 64, 8) if args.quick else (256, 512, 64)))[args.block_way]
    before = measure.peak_mib()
    way()
    print(json.dumps({"peak MiB": measure.peak_mib() - before}))


def bench_torch(args):
    """One product and the largest eigenvalues of one GGN, by turns here and in the other process."""
    widths, rows = ((8, 16, 4), 32) if args.quick else ((256, 1024, 1024, 64), 1024)
    k, rounds = 3 if args.quick else 5, args.rounds
    apply_fn, params, batch = mlp(widths, rows)
    matvec, apply = fj.operators.ggn(apply_fn, fj.categorical, params, batch), jax.jit(lambda mv, v: mv(v))
    flat = {f"{name}{i}": np.asarray(x) for i, layer in enumerate(params) for name, x in layer.items()}
    ones = jax.tree.map(jnp.ones_like, params)

    def eigenvalues():
        options = {"num_steps": 100, "num_eigenvalues": k, "check_period": 5, "key": jax.random.key(0)}
        return fj.lanczos(matvec, params, **options).eigenvalues

    jobs = {"product": lambda: apply(matvec, ones), f"eigenvalues {k}": eigenvalues}
    times = {(job, side): [] for job in jobs for side in ("fisher_jax", "curvlinops")}
    theirs = None
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "job.npz"
        np.savez(file, inputs=batch.inputs, targets=batch.targets, **flat)
        script = pathlib.Path(__file__).with_name("torch_curvature.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([args.torch, str(script), str(file)], env={**os.environ}, **pipes) as other:
            for index in range(rounds + 1):
                for job, way in jobs.items():
                    here = measure.seconds(way)
                    print(job, file=other.stdin, flush=True)
                    line = other.stdout.readline()
                    if not line:
                        raise SystemExit(f"{args.torch} {script.name} ended: see its message above")
                    there = json.loads(line)
                    theirs = np.array(there["values"])  # of the last job: the eigenvalues
                    if index:  # the first round warms up
                        times[job, "fisher_jax"].append(here)
                        times[job, "curvlinops"].append(there["seconds"])
            other.stdin.close()
    apart = np.max(np.abs(eigenvalues() / theirs - 1))
    number = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    table = [
        {
            "job": job,
            **{f"{side}, seconds": float(np.median(times[job, side])) for side in ("fisher_jax", "curvlinops")},
        }
        for job in jobs
    ]
    for row in table:
        row["curvlinops / fisher_jax"] = row["curvlinops, seconds"] / row["fisher_jax, seconds"]
    title = f"GGN of an MLP, {number:.1f}M parameters, {rows} tokens; eigenvalues agree to {apart:.1e}"
    return title, table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--shipped", action="store_true", help="SmolLM2-135M instead of a decoder of 10M parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lanczos-rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048, help="of the MLP under Lanczos")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch and curvlinops-for-pytorch")
    parser.add_argument("--block-way", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/results/bench_spectrum"))
    args = parser.parse_args()
    if args.block_way:
        return one_block_way(args)
    tables = {}
    for part in (bench_products, bench_lanczos, bench_blocks, *([bench_torch] if args.torch else [])):
        title, rows = part(args)
        tables[title] = rows
        print(measure.markdown(title, rows), flush=True)
    if not args.torch:
        print("Not compared with curvlinops: --torch PYTHON names an interpreter that has it.")
    if not args.quick:
        facts = {"title": "What curvature products, Lanczos and block spectra cost", "jax": jax.__version__}
        measure.write(args.out, {**facts, "device": jax.devices()[0].device_kind}, tables)
    return None


if __name__ == "__main__":
    main()

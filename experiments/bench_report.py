"""What does the report's measurement cost on top of a plain forward-and-loss pass over the same tokens?

Same model, same batch shape, interleaved rounds in one run; medians and their ratio. The report measures the
empirical and the exact true Fisher of every vocabulary row at once, by document, into Welford states.

    uv run python experiments/bench_report.py         # about three minutes on 2 cores
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--out", type=pathlib.Path, default=None, help="also write the figures as JSON")
    args = parser.parse_args()
    model = models.load()
    shape = (args.batch_size, args.seq_len)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, model.config.vocab_size)
    units = jnp.arange(args.batch_size)

    def plain(params, tokens, units):
        batch = fj.next_token_batch(tokens, units=units)
        logits = model.apply(params, batch.inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)

    def observe(kind):
        def run(params, tokens, units):
            batch = fj.next_token_batch(tokens, units=units)
            found, log_likelihood = fj.lm_head.moments(
                model.hidden(params, batch.inputs), model.head(params), batch.targets, batch.weights, kind=kind,
                unit="document", units=batch.units, with_log_likelihood=True,
            )  # fmt: skip
            return found, -jnp.sum(log_likelihood) / jnp.sum(batch.weights)

        return run

    def measured(kind):
        def step(params, states, tokens, units):
            found, loss = observe(kind)(params, tokens, units)
            return tuple(fj.welford.add(s, m) for s, m in zip(states, found, strict=True)), loss

        found, _ = jax.eval_shape(observe(kind), model.params, tokens, units)
        return jax.jit(step, donate_argnums=1), tuple(fj.welford.init(m) for m in found)

    plain_step = jax.jit(plain)
    ways = {"empirical": measured(("empirical",)), "both kinds": measured(("empirical", "true"))}
    states = {name: state for name, (_, state) in ways.items()}
    seconds: dict[str, list[float]] = {"forward and loss": [], **{name: [] for name in ways}}
    for number in range(args.rounds + 1):
        begin = time.perf_counter()
        loss = jax.block_until_ready(plain_step(model.params, tokens, units))
        taken = {"forward and loss": time.perf_counter() - begin}
        for name, (step, _) in ways.items():
            begin = time.perf_counter()
            states[name], same = jax.block_until_ready(step(model.params, states[name], tokens, units))
            taken[name] = time.perf_counter() - begin
            np.testing.assert_allclose(same, loss, rtol=1e-4)
        if number:  # the first round compiles
            for name, t in taken.items():
                seconds[name].append(t)
    median = {name: float(np.median(t)) for name, t in seconds.items()}
    base = median["forward and loss"]
    scored = args.batch_size * (args.seq_len - 1)
    print(f"{model.name}, {shape[0]} x {shape[1]} tokens, {jax.devices()[0].device_kind}, {args.rounds} rounds")
    for name, t in median.items():
        print(f"{name:20}{t:8.3f} s {scored / t:8.0f} tokens/s  ratio {t / base:.3f}")
    if args.out is not None:
        args.out.write_text(json.dumps({"seconds": median, "shape": shape, "jax": jax.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()

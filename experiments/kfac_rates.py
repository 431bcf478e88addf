"""Does adaptive K-FAC have to look at every step, and how should its rate fall?

`looks`: a decoder on bytes of Wikipedia (two layers, width 32, 16 rows of 64), damping adapted after every step or
every fifth, curvature of the step from all rows or half, rate not scaled, momentum not bounded from above. `rates`:
the same decoder, and the autoencoder of `natural_gradient_autoencoder.py` at batch 256, with a constant rate, a
schedule made by hand and the rate that falls by itself. Losses of the decoder are held out.

    uv run python experiments/kfac_rates.py    # minutes on 2 cores; writes results/
"""

import argparse
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see natural_gradient_autoencoder.py

import jax.numpy as jnp
import landscape
import natural_gradient_autoencoder as autoencoder
import numpy as np
from natural_gradient_runs import FRESH_SEEDS, Task, Trainer, kfac, versions, write

import fisher_jax as fj

SEEDS, STEPS, EVERY = (1, 2, 3, 4, 5), 250, 10
FREE = {"rate_scale": 1.0, "max_momentum": None}
LOOKS = {
    f"{rows}, looked at {when}": FREE | {"adapt_period": every, "model_rows": number}
    for rows, number in (("8 rows of 16", 8), ("all rows", None))
    for when, every in (("every fifth step", 5), ("every step", 1))
}
RATES = {
    "constant": {"rate_scale": 1.0},
    "schedule": {"rate_scale": lambda step: 1 / (1 + jnp.maximum(step - 100, 0) / 50)},
    "by itself": {"rate_scale": "auto"},
}


def decoder_task():
    problem = landscape.problem_of(landscape.Setting())
    held = problem.some(101, 64)
    return Task(
        problem.start, problem.apply_fn, fj.categorical, fj.next_token_batch, problem.rows,
        lambda params: problem.loss(params, held),
    )  # fmt: skip


def runs(trainer, seeds, **numbers):
    """Losses of parameters and of their average, by seed."""
    curves = [trainer(seed, **numbers)[1] for seed in seeds]
    return {"parameters": [c[:, 0].tolist() for c in curves], "average": [c[:, 1].tolist() for c in curves]}


def diverged(curve):
    """Worse at the end, by a nat, than it once was."""
    return not np.isfinite(curve[-1]) or curve[-1] > np.nanmin(curve) + 1


def table(results):
    lines = ["# How adaptive K-FAC looks at its steps, and how its rate falls", "", results["versions"], ""]
    lines += [
        f"Decoder: {STEPS} steps, seeds {SEEDS}, nats per byte, held out; diverged: a nat above its lowest.",
        "",
    ]
    lines += ["| | diverged | largest rise of the loss in ten steps | median at the end |", "|---|---:|---:|---:|"]
    for name, found in results["looks"].items():
        curves = np.array(found["parameters"])
        rise = np.nanmax(np.diff(curves, axis=1))
        lines.append(f"| {name} | {sum(map(diverged, curves))} of {len(curves)} | {rise:.3g} | "
                     f"{np.median(curves[:, -1]):.3g} |")  # fmt: skip
    lines += ["", "Parameters averaged over about ten steps, at the end; median and range over seeds:", ""]
    lines += ["| rate | decoder | autoencoder, 300 steps (nats per image) |", "|---|---:|---:|"]
    for name in RATES:
        cells = []
        for task in ("decoder", "autoencoder"):
            last = [c[-1] for c in results["rates"].get(task, {}).get(name, {"average": [[np.nan]]})["average"]]
            cells.append(f"{np.median(last):.3f} ({min(last):.3f} to {max(last):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = {"versions": versions(), "looks": {}, "rates": {"decoder": {}, "autoencoder": {}}}

    def save():
        write("kfac_rates", results, table(results))

    train, _ = autoencoder.digits()
    task, base = autoencoder.task_of(train), autoencoder.KFAC[256]
    for name, options in RATES.items():
        options = {} if name == "schedule" else options  # that of the autoencoder
        trainer = Trainer(task, kfac(task, 256, **base | options), 256, 300, EVERY)
        results["rates"]["autoencoder"][name] = runs(trainer, FRESH_SEEDS, damping=0.3)
        save()
    task = decoder_task()
    for found, plans in ((results["looks"], LOOKS), (results["rates"]["decoder"], RATES)):
        for name, options in plans.items():
            trainer = Trainer(task, kfac(task, 16, factor_decay=0.5, **options), 16, STEPS, EVERY)
            found[name] = runs(trainer, SEEDS, damping=0.1)
            save()
            print(name, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()

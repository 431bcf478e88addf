"""Does K-FAC train a deep autoencoder in fewer steps, and in less time, than a tuned AdamW?

The autoencoder 64-128-64-32-8 and its mirror (tanh; linear code and output) on scikit-learn's digits: 1,500 to train,
297 to test, Bernoulli loss summed over pixels, batches of 256 and of all. AdamW has a grid of learning rates, warm-up
and cosine decay, 2,000 steps; its median over fresh seeds is the loss that K-FAC has to reach, on the whole training
set. What K-FAC chooses is tried on a seed of its own as well. Both may average their parameters over steps.

    uv run python experiments/natural_gradient_autoencoder.py                # all; writes results/
    uv run python experiments/natural_gradient_autoencoder.py --steps-only   # curves, which do not depend on load
    uv run python experiments/natural_gradient_autoencoder.py --rivals-only  # the first half of the curves
    uv run python experiments/natural_gradient_autoencoder.py --kfac-only    # rivals are those in results/
    uv run python experiments/natural_gradient_autoencoder.py --timing-only  # seconds, for curves that are there
    uv run python experiments/natural_gradient_autoencoder.py --quick        # does it run? numbers mean nothing
"""

import os

# LAPACK's threads and XLA's wait for each other on few cores: an eigendecomposition of 129 rows then takes 80 ms
# instead of 1. Read when numpy and scipy load.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from natural_gradient_runs import (
    FRESH_SEEDS,
    RESULTS,
    Task,
    Trainer,
    adamw,
    kfac,
    median_steps,
    read,
    sgd,
    shown,
    step_seconds,
    study,
    toward,
    versions,
    write,
)
from sklearn.datasets import load_digits

import fisher_jax as fj

WIDTHS = (64, 128, 64, 32, 8, 32, 64, 128, 64)
LINEAR = (3, 7)  # the code and the output
TRAIN = 1500
RATES = (3e-3, 1e-2, 2e-2, 3e-2, 5e-2)


def falling(step):
    """Of the rate that the model of one batch finds, against the noise of batches: constant, then as 1 / step."""
    return 0.7 / (1 + jnp.maximum(step - 125, 0) / 75)


KFAC = {
    256: dict(period=10, factor_decay=0.5, model_rows=64, min_momentum=0.8, max_momentum=0.8, rate_scale=falling,
              adapt_period=5),
    TRAIN: dict(period=2, factor_decay=0.8, model_rows=375, factor_rows=512, max_momentum=None, rate_scale=1.0,
           adapt_period=5),
}  # fmt: skip
TRIES = [{"damping": d} for d in (0.01, 0.03, 0.1, 0.3, 1.0)]
FIXED = dict(period=5, factor_decay=0.5)
FIXED_GRID = [
    {"rate": 0.1, "damping": d, "kl_clip": c, "momentum": m}
    for d in (0.003, 0.01, 0.03, 0.1) for c in (1e-3, 1e-2, 1e-1) for m in (0.0, 0.5, 0.9)
]  # fmt: skip


class Sizes(NamedTuple):
    """How much is run."""

    adamw_steps: int = 2000
    kfac_steps: tuple[int, int] = (300, 130)
    seeds: int = 5
    horizons: tuple[int, ...] = (1000, 2000, 4000)
    small_batches: tuple[int, ...] = (64, 128)
    rounds: int = 5
    periods: tuple[int, ...] = (1, 5, 30, 100)
    dampings: tuple[float, ...] = (1e-2, 1e-1, 1.0, 10.0)  # three decades


QUICK = Sizes(20, (20, 10), 2, (20,), (64,), 1, (1,), (0.1,))


def digits():
    pixels = np.asarray(load_digits().data / 16, np.float32)
    order = np.random.default_rng(0).permutation(len(pixels))
    return jnp.asarray(pixels[order[:TRAIN]]), jnp.asarray(pixels[order[TRAIN:]])


def entropy_floor(x):
    """What a model that knows every pixel's grey value would lose: nats per image."""
    x = np.asarray(x, np.float64)
    safe = np.clip(x, 1e-12, 1 - 1e-12)
    return float(np.where((x > 0) & (x < 1), -x * np.log(safe) - (1 - x) * np.log1p(-safe), 0).sum(1).mean())


def start(seed):
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    normal = jax.nn.initializers.lecun_normal()
    widths = zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    return [{"kernel": normal(k, (a, b)), "bias": jnp.zeros(b)} for k, a, b in widths]


def apply_fn(params, x):
    for i, layer in enumerate(params):
        x = x @ layer["kernel"] + layer["bias"]
        x = x if i in LINEAR else jnp.tanh(x)
    return x


def mean_loss(params, x):
    return -fj.bernoulli.log_prob(apply_fn(params, x), x).mean()


def task_of(train):
    return Task(start, apply_fn, fj.bernoulli, lambda x: fj.Batch(x, x), train, lambda p: mean_loss(p, train))


def rivals(batch, sizes, task, on_test):
    """AdamW and, with small batches, SGD; the loss of AdamW at the end is the target."""
    steps, whole = sizes.adamw_steps, batch == TRAIN
    seeds, every = FRESH_SEEDS[: sizes.seeds], max(steps // 40, 1)
    rates = [{"rate": r} for r in RATES[: 4 if whole else 5]]
    found = {"adamw": study(Trainer(task, adamw(steps), batch, steps, every), rates, seeds, on_test)}
    found["target"] = found["adamw"]["final"]
    print(f"batch {batch}: AdamW {found['target']:.3f} {found['adamw']['grid']}", flush=True)
    if not whole:
        descent = [{"rate": r} for r in (0.03, 0.1, 0.3, 1.0)]
        found["sgd"] = study(Trainer(task, sgd(steps), batch, steps, every), descent, seeds, on_test)
        toward(found["sgd"], found["target"])
    return found


def ours(batch, sizes, task, on_test, target):
    """K-FAC: adaptive and, with small batches, with a fixed rate."""
    seeds, whole = FRESH_SEEDS[: sizes.seeds], batch == TRAIN
    length = sizes.kfac_steps[whole]
    plans = {"adaptive": (kfac(task, batch, **KFAC[batch]), TRIES)}
    if not whole:
        plans["fixed"] = kfac(task, batch, length, **FIXED), FIXED_GRID
    found = {}
    for name, (make, grid) in plans.items():
        found[name] = toward(study(Trainer(task, make, batch, length), grid, seeds, on_test), target)
        print({k: v for k, v in found[name].items() if k != "curves"}, flush=True)
    return found


def adamw_horizons(sizes, task):
    """The loss at the end for smaller batches and other numbers of steps."""
    rows = []
    for batch in sizes.small_batches:
        for steps in sizes.horizons:
            trainer = Trainer(task, adamw(steps), batch, steps, steps // 4)
            found = study(trainer, [{"rate": r} for r in RATES[:3]], FRESH_SEEDS[:3])
            rows.append({"batch": batch, "steps": steps, **found["chosen"], "loss": found["final"]})
            print(rows[-1], flush=True)
    return rows


def variants(sizes, task, target, save):
    """One change at a time from the adaptive setting at batch 256: steps to the target, the loss at the end."""
    base, length = KFAC[256], sizes.kfac_steps[0]
    plans = {f"refresh every {n}": {"period": n} for n in sizes.periods}
    plans |= {f"{f} Fisher": {"estimator": f} for f in ("empirical", "ggn")}
    plans |= {"factors of one batch": {"factor_decay": None}}
    plans |= {"factors of one batch, EK-FAC": {"factor_decay": None, "eigenvalue_correction": True}}
    free = {"min_momentum": None, "max_momentum": None}
    plans |= {"factored damping": {"form": "factored"}, "no bounds on momentum": free}
    plans |= {"rate not scaled": {"rate_scale": 1.0}}
    plans |= {"rate not scaled, momentum 0.5 to 0.6": {"rate_scale": 1.0, "min_momentum": 0.5, "max_momentum": 0.6}}
    plans |= {"no least damping": {"min_damping": 1e-8}, "curvature of the step on all rows": {"model_rows": None}}
    rows = []

    def add(name, trainer, **numbers):
        curves = np.stack([trainer(seed, **numbers)[1] for seed in FRESH_SEEDS[:3]])
        last = np.median(curves[:, -1], 0)
        curves = curves[..., int(last[1] < last[0])]
        rows.append({"variant": name, "loss": float(min(last)), "steps": median_steps(curves, target, trainer.every)})
        save(rows)
        print(rows[-1], flush=True)

    trainer = Trainer(task, kfac(task, 256, **base), 256, length)
    for damping in sizes.dampings:
        add(f"damping {damping:g} at first", trainer, damping=damping)
    for name, change in plans.items():
        add(name, Trainer(task, kfac(task, 256, **base | change), 256, length), damping=0.1)
    trainer = Trainer(task, kfac(task, 256, length, **FIXED), 256, length)
    for damping in sizes.dampings:
        add(f"fixed rate, damping {damping:g} throughout", trainer, rate=0.1, damping=damping)


def timing(results, sizes, task):
    """Milliseconds of a step and seconds to compile, of everything that is compared."""
    for key, found in results["compared"].items():
        batch, names = int(key), [n for n in ("adamw", "adaptive", "fixed", "sgd") if n in found]
        steps = sizes.kfac_steps[batch == TRAIN]  # of a run: early steps of K-FAC cost more
        makes = {"adamw": adamw(steps), "sgd": sgd(steps), "adaptive": kfac(task, batch, **KFAC[batch]),
                 "fixed": kfac(task, batch, steps, **FIXED)}  # fmt: skip
        trainers = {n: Trainer(task, makes[n], batch, steps, watch=False) for n in names}
        numbers = {n: found[n]["chosen"] for n in names}
        for name, seconds in step_seconds(trainers, numbers, sizes.rounds).items():
            found[name] |= seconds
    for batch in {row["batch"] for row in results["horizons"]}:
        trainer = Trainer(task, adamw(100), batch, min(100, sizes.adamw_steps), watch=False)
        seconds = step_seconds({"adamw": trainer}, {"adamw": {"rate": 1e-2}}, sizes.rounds)["adamw"]
        for row in results["horizons"]:
            if row["batch"] == batch:
                row |= seconds
    return results


def table(results):
    lines = ["# Natural gradients on the autoencoder of digits", "", results["versions"], ""]
    lines += [f"Losses are nats per image on the training set, whose entropy floor is {results['floor']:.3f}.", ""]
    steps = results["sizes"]["adamw_steps"]
    for batch, found in results["compared"].items():
        rival = found["adamw"]
        lines += [
            f"## Batch {batch}",
            "",
            f"AdamW after {steps} steps: {found['target']:.3f} ({rival['chosen']}).",
            "",
        ]
        lines += [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
        for name, label in LABELS.items():
            if name in found:
                lines.append(_row(label, found[name], rival, steps if name == "adamw" else found[name]["steps"]))
        rows = [r for r in results["horizons"] if r["loss"] <= found["target"] and "step_ms" in r]
        if rows:
            best = min(rows, key=lambda r: r["steps"] * r["step_ms"])
            seconds = best["steps"] * best["step_ms"] / 1e3
            lines += ["", f"AdamW's shortest time to that loss with smaller batches: {seconds:.2f} s, "
                      f"{best['steps']} steps of {best['batch']}."]  # fmt: skip
        lines.append("")
    lines += ["## AdamW with other batches", "", "| batch | steps | loss | s |", "|---:|---:|---:|---:|"]
    for row in results["horizons"]:
        seconds = row["steps"] * row["step_ms"] / 1e3 if "step_ms" in row else None
        lines.append(f"| {row['batch']} | {row['steps']} | {row['loss']:.3f} | {shown(seconds, 2)} |")
    lines += [
        "",
        "## One change at a time, batch 256, three seeds",
        "",
        "| | steps | loss at the end |",
        "|---|---:|---:|",
    ]
    lines += [f"| {r['variant']} | {shown(r['steps'])} | {r['loss']:.3f} |" for r in results["variants"]]
    return "\n".join(lines) + "\n"


COLUMNS = ("steps", "seeds there", "loss at the end", "test loss", "ms a step", "of AdamW's", "s", "s to compile")
LABELS = {"adamw": "AdamW", "sgd": "SGD with momentum", "adaptive": "K-FAC, adaptive", "fixed": "K-FAC, fixed rate"}
COLOURS = {"adamw": "#555555", "sgd": "#009E73", "adaptive": "#0072B2", "fixed": "#D55E00"}


def _row(label, row, rival, steps):
    there = f"{row['seeds_there']} of {len(row['curves'])}" if "seeds_there" in row else ""
    cells = [label, shown(steps), there, f"{row['final']:.3f}", f"{row['test']:.3f}"]
    if "step_ms" in row:
        seconds = None if steps is None else steps * row["step_ms"] / 1e3
        ratio = row["step_ms"] / rival["step_ms"]
        cells += [f"{row['step_ms']:.2f}", f"{ratio:.2f}", shown(seconds, 2), f"{row['compile_s']:.1f}"]
    else:
        cells += [""] * 4
    return f"| {' | '.join(cells)} |"


def picture(results, path):
    from matplotlib.figure import Figure

    timed = all("step_ms" in found["adamw"] for found in results["compared"].values())
    units = ("step", "second") if timed else ("step",)
    figure = Figure(figsize=(5 * len(units), 7.5), layout="constrained")
    grid = figure.subplots(2, len(units), sharey=True, squeeze=False)
    for axes, (batch, found) in zip(grid, results["compared"].items(), strict=True):
        for axis, unit in zip(axes, units, strict=True):
            for name, label in LABELS.items():
                if name not in found:
                    continue
                row, colour = found[name], COLOURS[name]
                curves = np.asarray(row["curves"]) - results["floor"]
                x = (np.arange(curves.shape[1]) + 1.0) * row["every"]
                x = x if unit == "step" else x * row["step_ms"] / 1e3
                axis.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
                axis.plot(x, np.median(curves, 0), color=colour, lw=1.5, label=label)
            axis.axhline(found["target"] - results["floor"], color="0.6", lw=1, ls="--")
            axis.set(xscale="log", yscale="log", xlabel=f"{unit}s", title=f"batch {batch}")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("loss above the floor (nats)")
    grid[0, 0].set_ylim(0.5, 30)
    grid[0, 0].legend(frameon=False)
    figure.suptitle("Median and range over seeds; dashed: AdamW at the end")
    figure.savefig(path, dpi=150)


def collect(sizes, task, test, save, before, rivals_only):
    """Everything that is counted in steps; rivals are those of the results ``before``, where there are any."""
    results = {"versions": versions(), "sizes": sizes._asdict(), "floor": entropy_floor(task.data), "compared": {},
               "horizons": before["horizons"] if before else [], "variants": []}  # fmt: skip

    def on_test(params):
        return float(mean_loss(params, test))

    for batch in (256, TRAIN):
        earlier = before["compared"][str(batch)] if before else rivals(batch, sizes, task, on_test)
        results["compared"][str(batch)] = {k: earlier[k] for k in ("adamw", "target", "sgd") if k in earlier}
        save(results)
    if not before:
        results["horizons"] = adamw_horizons(sizes, task)
        save(results)
    if rivals_only:
        return results
    for batch in (256, TRAIN):
        found = results["compared"][str(batch)]
        found |= ours(batch, sizes, task, on_test, found["target"])
        save(results)
    variants(sizes, task, results["compared"]["256"]["target"], lambda rows: save(results | {"variants": rows}))
    return read("natural_gradient_autoencoder" + ("-quick" if sizes is QUICK else ""))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--steps-only", action="store_true", help="no timing")
    parser.add_argument("--rivals-only", action="store_true", help="curves of AdamW and SGD, no timing")
    parser.add_argument("--kfac-only", action="store_true", help="rivals are those in results/")
    parser.add_argument("--timing-only", action="store_true", help="timing of what is in results/, merged into it")
    args = parser.parse_args(argv)
    sizes, name = (
        (QUICK, "natural_gradient_autoencoder-quick") if args.quick else (Sizes(), "natural_gradient_autoencoder")
    )
    train, test = digits()
    task = task_of(train)

    def save(results):
        write(name, results, table(results))

    before = read(name) if args.timing_only or args.kfac_only else None
    results = before if args.timing_only else collect(sizes, task, test, save, before, args.rivals_only)
    if not (args.steps_only or args.rivals_only):
        results = timing(results, sizes, task)
        save(results)
    print(table(results))
    picture(results, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()

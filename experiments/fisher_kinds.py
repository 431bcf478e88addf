"""What do the choice of Fisher, and the other choices of K-FAC, do to training?

A small decoder (width 64, two layers) reads Wikipedia in 64 symbols (lower case; the 63 commonest bytes and one for
the rest): few enough that the GGN's factors, exact over labels, are affordable beside the empirical Fisher, sampled
labels and the exact head. All runs of a seed share their start, their batches and their labels' key, so that
differences are taken seed by seed; seeds are no others' tuning seeds. One choice is changed at a time from `fj.kfac`
in adaptive mode with its defaults: the Fisher, corrected eigenvalues (EK-FAC), the refresh period, a fixed learning
rate, the first damping. AdamW, tuned on a seed of its own, gives the loss to reach. Losses are those of parameters
averaged over about ten steps, on held-out articles.

    uv run python experiments/fisher_kinds.py                  # a quarter of an hour on 2 idle cores; writes results/
    uv run python experiments/fisher_kinds.py --only EK-FAC    # these anew, the others as stored
    uv run python experiments/fisher_kinds.py --quick          # does it run? numbers mean nothing
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see natural_gradient_autoencoder.py

import argparse
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.stats
from landscape_report import label_ends
from natural_gradient_language import SETTINGS, rows_of, task_of
from natural_gradient_runs import RESULTS, TUNING_SEED, Trainer, adamw, kfac, read, versions, write

SYMBOLS, BATCH, STEPS, EVERY, SEEDS = 64, 16, 150, 10, (21, 22, 23, 24)
ADAMW_RATES = (3e-3, 1e-2, 2e-2, 3e-2)
FIXED = tuple({"rate": rate, "damping": damping} for damping in (0.01, 0.1) for rate in (0.1, 0.3, 1.0))
BASE = "sampled"  # what the others are compared with: the defaults
NAME = "fisher_kinds"


class Variant(NamedTuple):
    """One choice that differs from the defaults; ``grid``: numbers to choose from on the tuning seed."""

    group: str
    options: Mapping[str, Any] = MappingProxyType({})
    damping: float = 0.1
    grid: tuple[dict[str, float], ...] = ()


def untied(path):
    """The embedding is tied to the head: a sum of two products without common eigenvectors."""
    return path != "['embedding']"


VARIANTS = {
    BASE: Variant("Fisher"),
    "empirical": Variant("Fisher", {"estimator": "empirical"}),
    "exact head": Variant("Fisher", {"estimator": "exact_head"}),
    "GGN": Variant("Fisher", {"estimator": "ggn"}),
    "EK-FAC": Variant("eigenvalues", {"eigenvalue_correction": untied}),
    "every step": Variant("refresh", {"period": 1, "ramp": None}),
    "every 10 steps": Variant("refresh", {"period": 10, "ramp": None}),
    "every 30 steps": Variant("refresh", {"period": 30, "ramp": None}),
    "every 100 steps": Variant("refresh", {"period": 100, "ramp": None}),
    "first damping 0.01": Variant("damping", damping=0.01),
    "first damping 1": Variant("damping", damping=1.0),
    "first damping 10": Variant("damping", damping=10.0),
    "fixed rate": Variant("step", grid=FIXED),
}
LABELS = {
    BASE: "defaults: sampled, refresh after 1 to 10 steps, first damping 0.1, adaptive",
    "fixed rate": "fixed learning rate, warm-up and decay, tuned",
    "every step": "refresh every step", "every 10 steps": "refresh every 10, from the start",
    "every 30 steps": "refresh every 30", "every 100 steps": "refresh every 100",
    "exact head": "exact true Fisher of the head, others sampled",
    "GGN": "GGN, exact over labels", "EK-FAC": "EK-FAC of all but the tied embedding",
    "empirical": "empirical Fisher",
}  # fmt: skip


def in_symbols(rows):
    """Bytes in lower case as ranks by frequency; rare ones are all the last."""
    found = np.asarray(rows)
    found = np.where((found >= ord("A")) & (found <= ord("Z")), found + 32, found)
    common = np.argsort(-np.bincount(found.ravel(), minlength=256), kind="stable")[: SYMBOLS - 1]
    ranks = np.full(256, SYMBOLS - 1, np.int32)
    ranks[common] = np.arange(SYMBOLS - 1)
    return jnp.asarray(ranks[found])


def curves_of(trainer, seeds, numbers):
    """Held-out losses of averaged parameters."""
    return [trainer(seed, **numbers)[1][:, 1].tolist() for seed in seeds]


def best_of(trainer, grid):
    """The numbers with the lowest last loss on the tuning seed, and all of these losses."""
    last = [curve[-1] for numbers in grid for curve in curves_of(trainer, (TUNING_SEED,), numbers)]
    return grid[int(np.nanargmin(last))], [{**numbers, "loss": x} for numbers, x in zip(grid, last, strict=True)]


def run(task, variant, steps, every, seeds, compiled):
    """The variant's curves; those that differ in numbers alone share a program in ``compiled``."""
    key = (bool(variant.grid), *sorted(variant.options.items()))
    make = kfac(task, BATCH, steps if variant.grid else None, **variant.options)
    trainer = compiled.setdefault(key, Trainer(task, make, BATCH, steps, every))
    numbers, grid = best_of(trainer, variant.grid) if variant.grid else ({"damping": variant.damping}, [])
    return {"curves": curves_of(trainer, seeds, numbers), "numbers": numbers, "grid": grid}


def rival(task, steps, every, seeds):
    trainer = Trainer(task, adamw(steps, 0.95, 0.01), BATCH, steps, every)
    numbers, grid = best_of(trainer, tuple({"rate": r} for r in ADAMW_RATES))
    return {"curves": curves_of(trainer, seeds, numbers), "numbers": numbers, "grid": grid}


def steps_to(curve, target, every):
    """Where the curve first falls to the target, by linear interpolation; infinite where it does not."""
    below = np.flatnonzero(np.asarray(curve) <= target)
    if not len(below) or below[0] == 0:
        return float("inf") if not len(below) else float(every)
    i = below[0]
    return every * (i + (curve[i - 1] - target) / (curve[i - 1] - curve[i]))


def with_interval(values):
    """Mean and half of its 95% interval over seeds (Student's t)."""
    values = np.asarray(values, float)
    if not np.all(np.isfinite(values)):
        return float(np.mean(values)), float("nan")
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def summary(results):
    """One row for each variant: steps to AdamW's loss, the last loss, and the difference from the defaults'."""
    every, runs = results["every"], results["runs"]
    last = {name: np.array([c[-1] for c in found["curves"]]) for name, found in runs.items()}
    target = float(np.median(last["AdamW"]))
    rows = {}
    for name, found in runs.items():
        # AdamW's own loss at its end is the target: it needs all of its steps.
        steps = [results["steps"]] if name == "AdamW" else [steps_to(c, target, every) for c in found["curves"]]
        rows[name] = {
            "steps": float(np.median(steps)), "range": [min(steps), max(steps)], "loss": float(last[name].mean()),
            "difference": None if name == BASE or BASE not in last else with_interval(last[name] - last[BASE]),
        }  # fmt: skip
    return target, rows


def table(results):
    target, rows = summary(results)
    steps = results["steps"]
    lines = [
        "# What the choice of Fisher, and other choices of K-FAC, do to training", "", results["versions"], "",
        f"A decoder of width 64 and two layers on {SYMBOLS} symbols, {BATCH} x 64 of them in a batch, {steps} steps, "
        f"seeds {', '.join(map(str, results['seeds']))}, held-out nats per symbol. Steps are those to the loss that "
        f"AdamW has after {steps}, {target:.3f}: median and range over seeds. Differences of the last loss from the "
        "defaults' are means over seeds with 95% intervals (Student's t); where zero is inside they cannot be told "
        "apart.",
        "", "| | steps | last loss | difference from the defaults |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for name in [n for n in ("AdamW", *VARIANTS) if n in rows]:
        row = rows[name]
        low, high = row["range"]
        shown = "not reached" if np.isinf(row["steps"]) else f"{row['steps']:.0f}"
        shown += f" ({low:.0f} to {high:.0f})" if low < high < np.inf else ""
        gap = "" if row["difference"] is None else "{:+.4f} ± {:.4f}".format(*row["difference"])
        lines.append(f"| {LABELS.get(name, name)} | {shown} | {row['loss']:.4f} | {gap} |")
    chosen = {n: results["runs"][n]["numbers"] for n in ("AdamW", "fixed rate") if n in results["runs"]}
    return "\n".join([*lines, "", f"Chosen on the tuning seed: {chosen}.", ""])


def picture(results, path):
    from matplotlib.figure import Figure

    _, rows = summary(results)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    colours = {
        "AdamW": "#555555", "empirical": "#D55E00", BASE: "#0072B2", "exact head": "#009E73", "GGN": "#CC79A7"
    }  # fmt: skip
    ends = {}
    for name, colour in colours.items():
        if name not in rows:
            continue
        curves = np.asarray(results["runs"][name]["curves"])
        x = (np.arange(curves.shape[1]) + 1) * results["every"]
        left.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
        left.plot(x, np.median(curves, 0), color=colour, lw=1.5)
        ends[name] = x[-1], float(np.median(curves[:, -1]))
    label_ends(left, x[-1], [(y, {BASE: "sampled"}.get(n, n), colours[n]) for n, (_, y) in ends.items()], 0.07)
    left.set(xlabel="steps", ylabel="held-out loss (nats per symbol)", title="median and range over seeds")
    names = [n for n in VARIANTS if n in rows and rows[n]["difference"] is not None][::-1]
    shown_colour = {"Fisher": "#0072B2", "eigenvalues": "#009E73", "refresh": "#D55E00", "damping": "#CC79A7",
                    "step": "#555555"}  # fmt: skip
    for i, name in enumerate(names):
        mean, half = rows[name]["difference"]
        right.errorbar(mean, i, xerr=half, fmt="o", ms=4, lw=1.5, color=shown_colour[VARIANTS[name].group])
    right.axvline(0, color="#888888", lw=0.8)
    right.set_yticks(range(len(names)), [LABELS.get(n, n) for n in names])
    right.set(xlabel="last loss above the defaults' (nats, 95%)", title="one choice changed at a time")
    right.locator_params(axis="x", nbins=6)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["AdamW", *VARIANTS], help="the others as stored")
    parser.add_argument("--plot-only", action="store_true", help="table and picture of what is stored")
    parser.add_argument("--quick", action="store_true", help="four steps, two seeds: does it run?")
    args = parser.parse_args(argv)
    name, steps, every, seeds = (f"{NAME}-quick", 4, 2, SEEDS[:2]) if args.quick else (NAME, STEPS, EVERY, SEEDS)
    setting = SETTINGS["bytes"]._replace(characters=100_000 if args.quick else 1_500_000, held_out=48)
    results = read(name) if args.only or args.plot_only else {"runs": {}}
    results |= {"steps": steps, "every": every, "seeds": seeds, "batch": BATCH}
    if not args.plot_only:
        results["versions"] = versions()
        task = task_of(in_symbols(rows_of("bytes", setting)[0]), SYMBOLS, setting)
        compiled = {}
        for one in args.only or ["AdamW", *VARIANTS]:
            begin = time.perf_counter()
            if one == "AdamW":
                found = rival(task, steps, every, seeds)
            else:
                found = run(task, VARIANTS[one], steps, every, seeds, compiled)
            results["runs"][one] = found
            print(
                f"{one}: {[round(c[-1], 4) for c in found['curves']]}, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
            write(name, results, table(results) if "AdamW" in results["runs"] else "")
    write(name, results, table(results))
    print(table(results))
    picture(results, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()

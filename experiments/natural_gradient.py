"""Does K-FAC train a deep autoencoder in fewer steps, and in less time, than a tuned AdamW?

The autoencoder 64-128-64-32-8 and its mirror (tanh; linear code and output) on scikit-learn's digits: 1,500 to train,
297 to test, Bernoulli loss summed over pixels, batches of 256 and of all. AdamW has a grid of learning rates and of
``b2``, warm-up and cosine decay, 2,000 steps; its median over fresh seeds is the loss that K-FAC has to reach. What
K-FAC chooses is tried on a seed of its own as well. Steps are counted by losses on the whole training set, which are
not timed; the time of a step is the median of interleaved rounds without them.

    uv run python experiments/natural_gradient.py            # minutes on 2 idle cores; writes results/
    uv run python experiments/natural_gradient.py --quick    # does it run? numbers mean nothing
"""

import os

# LAPACK's threads and XLA's wait for each other on few cores: an eigendecomposition of 129 rows then takes 80 ms
# instead of 1. Read when numpy and scipy load.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import importlib.metadata
import json
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import fisher_jax as fj

RESULTS = pathlib.Path(__file__).parent / "results"
SIZES = (64, 128, 64, 32, 8, 32, 64, 128, 64)
LINEAR = (3, 7)  # the code and the output
TRAIN = 1500
TUNING_SEED = 0  # choices are made on it; what is reported comes from others
RATES = (3e-3, 1e-2, 2e-2, 3e-2, 5e-2)
B2 = (0.95, 0.99)
KFAC = {
    256: dict(learning_rate=None, fisher="sampled", update_freq=1),
    TRAIN: dict(learning_rate=None, fisher="sampled", update_freq=1, factor_decay=0.8),
}
FIXED = dict(learning_rate=0.3, fisher="sampled", update_freq=2)
DAMPINGS = (1e-2, 1e-1, 1.0, 10.0)  # three decades


class Sizes(NamedTuple):
    """How much is run."""

    adamw_steps: int = 2000
    kfac_steps: tuple[int, int] = (400, 150)
    seeds: int = 5
    horizons: tuple[int, ...] = (1000, 2000, 4000)
    small_batches: tuple[int, ...] = (64, 128, 256)
    rounds: int = 7
    periods: tuple[int, ...] = (1, 3, 10, 30, 100)


QUICK = Sizes(40, (20, 10), 2, (20, 40), (256,), 2, (1, 10))


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
    keys = jax.random.split(jax.random.key(seed), len(SIZES) - 1)
    normal = jax.nn.initializers.lecun_normal()
    widths = zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    return [{"kernel": normal(k, (a, b)), "bias": jnp.zeros(b)} for k, a, b in widths]


def apply_fn(params, x):
    for i, layer in enumerate(params):
        x = x @ layer["kernel"] + layer["bias"]
        x = x if i in LINEAR else jnp.tanh(x)
    return x


def mean_loss(params, x):
    return -fj.bernoulli.log_prob(apply_fn(params, x), x).mean()


def orders(seed, steps, batch):
    """Rows of every batch ``[steps, batch]``, shuffled anew each epoch; nothing for the full batch."""
    if batch == TRAIN:
        return jnp.zeros((steps, 0), jnp.int32)
    rng, per = np.random.default_rng(1000 + seed), TRAIN // batch
    epochs = [rng.permutation(TRAIN)[: per * batch].reshape(per, batch) for _ in range(-(-steps // per))]
    return jnp.asarray(np.concatenate(epochs)[:steps])


def adamw(steps):
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)

    def make(rate, b2):
        tx = optax.adamw(lambda step: rate * shape(step), b2=b2, weight_decay=1e-4)
        return optax.with_extra_args_support(tx)

    return make


def kfac(batch, **options):
    example = fj.Batch(*(jax.ShapeDtypeStruct((batch, SIZES[0]), jnp.float32),) * 2)

    def make(damping, **numbers):
        chosen = {k: v for k, v in (options | numbers).items() if k != "learning_rate"}
        rate = options["learning_rate"]
        return fj.kfac(rate, apply_fn, fj.bernoulli, example=example, damping=damping, **chosen)

    return make


class Trainer:
    """One optimizer at one batch size and number of steps, compiled once; ``numbers`` of it may change."""

    def __init__(self, make, batch, steps, train, every=5, watch=True):
        self.batch, self.steps, self.every, self.train = batch, steps, every, train

        def run(params, rows, keys, x, numbers):
            tx = make(**numbers)

            def step(carry, given):
                params, state = carry
                seen = x if batch == TRAIN else x[given[0]]
                grads = jax.grad(mean_loss)(params, seen)
                updates, state = tx.update(grads, state, params, batch=fj.Batch(seen, seen), key=given[1])
                return (optax.apply_updates(params, updates), state), None

            def block(carry, given):
                carry, _ = jax.lax.scan(step, carry, given)
                return carry, mean_loss(carry[0], x) if watch else None

            blocks = jax.tree.map(lambda a: a.reshape(steps // every, every, *a.shape[1:]), (rows, keys))
            (params, _), losses = jax.lax.scan(block, (params, tx.init(params)), blocks)
            return params, losses

        self._run, self._compiled, self.compile_seconds = jax.jit(run), None, None

    def __call__(self, seed, **numbers):
        keys = jax.random.split(jax.random.key(seed + 500), self.steps)
        numbers = {k: jnp.float32(v) for k, v in numbers.items()}
        arguments = start(seed), orders(seed, self.steps, self.batch), keys, self.train, numbers
        if self._compiled is None:
            begin = time.perf_counter()
            self._compiled = self._run.lower(*arguments).compile()
            self.compile_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        params, losses = jax.block_until_ready(self._compiled(*arguments))
        self.seconds = time.perf_counter() - begin
        return params, None if losses is None else np.asarray(losses, np.float64)

    def curves(self, seeds, **numbers):
        """Losses ``[seeds, steps / every]`` and the parameters at the end."""
        found = [self(seed, **numbers) for seed in seeds]
        return np.stack([losses for _, losses in found]), [params for params, _ in found]


def reached(curve, target, every):
    """First step at which the loss is at the target, or nothing."""
    hits = np.flatnonzero(curve <= target)
    return int(hits[0] + 1) * every if len(hits) else None


def median_steps(curves, target, every):
    """Median over seeds; a seed that never gets there counts as later than all others."""
    steps = np.median([reached(c, target, every) or np.inf for c in curves])
    return float(steps) if np.isfinite(steps) else None


def tuned(trainer, grid, score):
    """The choice with the lowest score on the tuning seed, and all scores."""
    found = {}
    for numbers in grid:
        _, losses = trainer(TUNING_SEED, **numbers)
        found[tuple(numbers.items())] = score(losses)
    best = min(found, key=lambda k: found[k])
    return dict(best), [{**dict(k), "score": v} for k, v in found.items()]


def final(losses):
    return float(losses[-1]) if np.isfinite(losses[-1]) else np.inf


def tune_adamw(batch, steps, train, rates=RATES, b2s=B2):
    trainer = Trainer(adamw(steps), batch, steps, train, every=min(50, steps // 4))
    return trainer, *tuned(trainer, [{"rate": r, "b2": b} for r in rates for b in b2s], final)


def step_seconds(trainers, numbers, rounds):
    """Seconds of a step, by name: medians of interleaved rounds without evaluations, and seconds to compile."""
    times = {name: [] for name in trainers}
    for repeat in range(rounds + 1):
        for name, trainer in trainers.items():
            trainer(TUNING_SEED, **numbers[name])
            if repeat:
                times[name].append(trainer.seconds / trainer.steps)
    return {name: (float(np.median(t)), trainers[name].compile_seconds) for name, t in times.items()}


def compare(batch, sizes, train, test):
    """AdamW and K-FAC at one batch size."""
    seeds = range(1, 1 + sizes.seeds)
    steps = sizes.kfac_steps[batch == TRAIN]
    rival, best, grid = tune_adamw(batch, sizes.adamw_steps, train)
    adamw_curves, adamw_params = rival.curves(seeds, **best)
    target = float(np.median(adamw_curves[:, -1]))
    found = {
        "target": target, "adamw": {"chosen": best, "grid": grid, "every": rival.every,
        "curves": adamw_curves.tolist(), "test": float(np.median([mean_loss(p, test) for p in adamw_params]))},
    }  # fmt: skip
    trainers = {"adamw": Trainer(adamw(100), batch, min(100, sizes.adamw_steps), train, watch=False)}
    numbers = {"adamw": best}
    for name, options, tries in (
        ("adaptive", KFAC[batch], [{"damping": d} for d in DAMPINGS]),
        ("fixed", FIXED, [{"damping": d, "kl_clip": c} for d in (1e-2, 3e-2, 1e-1) for c in (3e-4, 1e-3, 3e-3)]),
    ):
        trainer = Trainer(kfac(batch, **options), batch, steps, train)
        chosen, scores = tuned(trainer, tries, final)
        curves, params = trainer.curves(seeds, **chosen)
        found[name] = {
            "options": options, "chosen": chosen, "grid": scores, "every": trainer.every, "curves": curves.tolist(),
            "steps": median_steps(curves, target, trainer.every),
            "seeds_there": sum(reached(c, target, trainer.every) is not None for c in curves),
            "test": float(np.median([mean_loss(p, test) for p in params])),
        }  # fmt: skip
        trainers[name] = Trainer(kfac(batch, **options), batch, min(100, steps), train, watch=False)
        numbers[name] = chosen
    for name, (seconds, compiling) in step_seconds(trainers, numbers, sizes.rounds).items():
        found[name] |= {"step_ms": 1e3 * seconds, "compile_s": compiling}
    return found


def adamw_wall_time(sizes, train, full):
    """For every batch size and number of steps: loss at the end, and seconds."""
    rows = []
    for batch in sizes.small_batches:
        for steps in sizes.horizons:
            trainer, best, _ = tune_adamw(batch, steps, train, RATES[1:4], B2[1:])
            curves, _ = trainer.curves([1, 2, 3], **best)
            timed = Trainer(adamw(steps), batch, 100 if steps >= 100 else steps, train, watch=False)
            ((seconds, _),) = step_seconds({"adamw": timed}, {"adamw": best}, 3).values()
            rows.append({"batch": batch, "steps": steps, **best, "loss": float(np.median(curves[:, -1])),
                         "seconds": seconds * steps})  # fmt: skip
    rows.append({"batch": TRAIN, "steps": sizes.adamw_steps, **full["adamw"]["chosen"], "loss": full["target"],
                 "seconds": full["adamw"]["step_ms"] / 1e3 * sizes.adamw_steps})  # fmt: skip
    return rows


def variants(batch, sizes, train, target):
    """One change at a time from the adaptive setting: steps to the target and the loss at the end, three seeds."""
    base, steps = KFAC[batch], sizes.kfac_steps[0]
    plans = {f"refresh every {n}": {"update_freq": n} for n in sizes.periods}
    plans |= {f"{f} Fisher, refresh every 10": {"fisher": f, "update_freq": 10} for f in ("empirical", "ggn")}
    plans |= {"factors averaged (0.8)": {"factor_decay": 0.8}, "EK-FAC": {"eigenvalue_correction": True}}
    plans |= {"factored damping": {"form": "factored"}}
    rows = []
    for name, change in plans.items():
        trainer = Trainer(kfac(batch, **base | change), batch, steps, train)
        curves, _ = trainer.curves([1, 2, 3], damping=0.1)
        rows.append({"variant": name, "steps": median_steps(curves, target, trainer.every),
                     "loss": float(np.median(curves[:, -1]))})  # fmt: skip
    for name, options in (("adaptive", base), ("fixed", FIXED)):
        trainer = Trainer(kfac(batch, **options), batch, steps, train)
        for damping in DAMPINGS:
            curves, _ = trainer.curves([1, 2, 3], damping=damping)
            rows.append({"variant": f"{name}, damping {damping:g} at first", "loss": float(np.median(curves[:, -1])),
                         "steps": median_steps(curves, target, trainer.every)})  # fmt: skip
    return rows


def shown(x, digits=0):
    return "not reached" if x is None else f"{x:.{digits}f}"


def table(results):
    lines = ["# Natural gradients on the autoencoder of digits", "", f"{results['versions']}", ""]
    floor = results["floor"]
    lines += [f"Losses are nats per image on the training set, whose entropy floor is {floor:.3f}.", ""]
    rivals = results["adamw_times"]
    for batch, found in results["compared"].items():
        target, own = found["target"], found["adamw"]
        there = [r for r in rivals if r["loss"] <= target + 1e-9]
        quickest = min(there, key=lambda r: r["seconds"], default=None)
        lines += [f"## Batch {batch}", ""]
        lines += [f"AdamW after {results['sizes']['adamw_steps']} steps: {target:.3f} ({own['chosen']}).", ""]
        columns = ("steps", "ms a step", "of AdamW's", "s", "s with compilation", "test loss")
        lines += [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        for name in ("adamw", "adaptive", "fixed"):
            row = found[name]
            steps = results["sizes"]["adamw_steps"] if name == "adamw" else row["steps"]
            seconds = None if steps is None else steps * row["step_ms"] / 1e3
            whole = None if seconds is None else seconds + row["compile_s"]
            label = "AdamW" if name == "adamw" else f"K-FAC, {name}, {row['seeds_there']} of {len(row['curves'])}"
            lines.append(
                f"| {label} | {shown(steps)} | {row['step_ms']:.2f} | {row['step_ms'] / own['step_ms']:.2f} | "
                f"{shown(seconds, 2)} | {shown(whole, 2)} | {row['test']:.3f} |"
            )
        if quickest:
            how = f"{quickest['steps']} steps of {quickest['batch']}"
            lines += ["", f"AdamW's shortest time to that loss: {quickest['seconds']:.2f} s, {how}."]
        lines.append("")
    lines += ["## AdamW's time", "", "| batch | steps | loss | s |", "|---:|---:|---:|---:|"]
    lines += [f"| {r['batch']} | {r['steps']} | {r['loss']:.3f} | {r['seconds']:.2f} |" for r in rivals]
    lines += ["", "## One change at a time, batch 256", "", "| | steps | loss at the end |", "|---|---:|---:|"]
    lines += [f"| {r['variant']} | {shown(r['steps'])} | {r['loss']:.3f} |" for r in results["variants"]]
    return "\n".join(lines) + "\n"


def picture(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    colours = {"adamw": "#555555", "adaptive": "#0072B2", "fixed": "#D55E00"}
    labels = {"adamw": "AdamW", "adaptive": "K-FAC, adaptive", "fixed": "K-FAC, fixed rate"}
    grid = figure.subplots(2, 2, sharey=True)
    for axes, (batch, found) in zip(grid, results["compared"].items(), strict=True):
        for axis, unit in zip(axes, ("step", "second"), strict=True):
            for name, colour in colours.items():
                row = found[name]
                curves = np.asarray(row["curves"]) - results["floor"]
                x = (np.arange(curves.shape[1]) + 1.0) * row["every"]
                x = x if unit == "step" else x * row["step_ms"] / 1e3
                axis.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
                axis.plot(x, np.median(curves, 0), color=colour, lw=1.5, label=labels[name])
            axis.axhline(found["target"] - results["floor"], color="0.6", lw=1, ls="--")
            axis.set(xscale="log", yscale="log", xlabel=f"{unit}s", title=f"batch {batch}")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("loss above the floor (nats)")
    grid[0, 0].set_ylim(0.5, 30)
    grid[0, 0].legend(frameon=False)
    figure.suptitle("Median and range over seeds (dashed: AdamW at the end; seconds without compilation)")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--without-variants", action="store_true", help="the comparison with AdamW alone")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes()
    train, test = digits()
    names = ("jax", "optax", "scikit-learn", "fisher-jax")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    results = {"versions": f"{versions}; {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
               "sizes": sizes._asdict(), "floor": entropy_floor(train), "compared": {}}  # fmt: skip
    for batch in (256, TRAIN):
        results["compared"][batch] = compare(batch, sizes, train, test)
        print(f"batch {batch} done", flush=True)
    results["adamw_times"] = adamw_wall_time(sizes, train, results["compared"][TRAIN])
    skip = args.without_variants
    results["variants"] = [] if skip else variants(256, sizes, train, results["compared"][256]["target"])
    print(table(results))
    args.out.mkdir(exist_ok=True)
    name = "natural_gradient-quick" if args.quick else "natural_gradient"
    (args.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(table(results))
    picture(results, args.out / f"{name}.png")


if __name__ == "__main__":
    main()

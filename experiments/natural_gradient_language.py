"""Does K-FAC train small language models in fewer steps, and in less time, than a tuned AdamW?

Two decoders on the Wikipedia articles that the group ``shipped`` installs: `bytes` reads bytes (width 64, two layers,
batches of 32 rows of 64), `head` has SmolLM2's 49,152 tokens (width 64, one layer, batches of 16 rows of 64), nearly
all of its parameters and work in a head that is tied to the embedding. AdamW has a grid of learning rates, warm-up
and cosine decay; its median over fresh seeds at the end is the loss to reach, on held-out articles. Steps go on while
they help, so each optimizer has its own number of them. Both may average their parameters over steps.

    uv run python experiments/natural_gradient_language.py bytes                # or head; writes results/
    uv run python experiments/natural_gradient_language.py bytes --steps-only   # curves, which do not depend on load
    uv run python experiments/natural_gradient_language.py bytes --kfac-only    # AdamW is that of results/
    uv run python experiments/natural_gradient_language.py bytes --timing-only  # seconds, for curves that are there
    uv run python experiments/natural_gradient_language.py bytes --quick        # does it run? numbers mean nothing
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see natural_gradient_autoencoder.py

import argparse
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from natural_gradient_runs import (
    RESULTS,
    Task,
    Trainer,
    adamw,
    kfac,
    read,
    shown,
    step_seconds,
    study,
    toward,
    versions,
    write,
)

import fisher_jax as fj
from fisher_jax import models
from fisher_jax.text.corpora import documents

LENGTH = 64


class Setting(NamedTuple):
    """One model, its data and how much is run."""

    layers: int
    batch: int
    characters: int
    held_out: int  # rows
    adamw_steps: int
    kfac_steps: int
    every: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    dampings: tuple[float, ...]
    kfac: dict[str, Any]
    rounds: tuple[int, int] = (3, 20)  # and steps of each


SETTINGS = {
    "bytes": Setting(
        2, 32, 3_000_000, 64, 600, 300, 10, (1, 2, 3, 4, 5), (3e-3, 1e-2, 2e-2, 3e-2), (0.1,),
        dict(period=20, factor_decay=0.5),
    ),
    "head": Setting(
        1, 16, 1_500_000, 32, 200, 160, 10, (1, 2, 3), (3e-3, 1e-2, 3e-2), (0.1,),
        dict(period=10, token_cap=256, min_damping=0.01), (2, 10),
    ),
}  # fmt: skip


def rows_of(name, setting):
    """Rows of ``LENGTH + 1`` tokens, and how many tokens there are in all."""
    text, size = [], 0
    for article in documents(["wikipedia"]):
        text.append(article.text)
        size += len(article.text)
        if size > setting.characters:
            break
    joined = "\n\n".join(text)
    if name == "bytes":
        tokens, vocabulary = np.frombuffer(joined.encode(), np.uint8).astype(np.int32), 256
    else:
        from fisher_jax.models.gguf_file import GgufFile
        from fisher_jax.models.gguf_tokenizer import tokenizer_from_gguf
        from fisher_jax.models.loading import files_of

        tokenizer = tokenizer_from_gguf(GgufFile(files_of(None)))
        tokens, vocabulary = np.asarray(tokenizer.encode(joined), np.int32), tokenizer.vocab_size
    return jnp.asarray(cut(tokens)), vocabulary


def cut(tokens):
    """Rows of ``LENGTH + 1`` tokens, without what is left at the end."""
    count = len(tokens) // (LENGTH + 1)
    return tokens[: count * (LENGTH + 1)].reshape(count, LENGTH + 1)


def decoder(vocabulary, layers, **sizes):
    """Functions of a decoder, and its parameters of a seed."""
    config = models.DecoderConfig(**{
        "vocab_size": vocabulary, "width": 64, "num_layers": layers, "num_heads": 4, "num_kv_heads": 4,
        "head_size": 16, "mlp_size": 176, "max_positions": LENGTH, **sizes,
    })  # fmt: skip

    def start(seed):
        def leaf(path, x):
            return x * (50 / math.sqrt(x.shape[-2])) if path[-1].key == "kernel" else x

        return jax.tree_util.tree_map_with_path(leaf, models.init_params(config, jax.random.key(seed)))

    return models.from_config(config), start


def task_of(rows, vocabulary, setting):
    """The last rows are held out; the order of the others is of the seed."""
    functions, start = decoder(vocabulary, setting.layers)
    held = fj.next_token_batch(rows[-setting.held_out :])

    def loss(params, batch):
        return -fj.categorical.log_prob(functions.apply(params, batch.inputs), batch.targets).mean()

    train = rows[: -setting.held_out]
    return Task(start, functions.apply, fj.categorical, fj.next_token_batch, train, lambda p: loss(p, held))


def rival(setting, task):
    """AdamW, tuned."""
    trainer = Trainer(task, adamw(setting.adamw_steps, 0.95, 0.01), setting.batch, setting.adamw_steps, setting.every)
    return study(trainer, [{"rate": r} for r in setting.rates], setting.seeds)


def natural(setting, task, **changes):
    return kfac(task, setting.batch, **setting.kfac | changes)


def collect(setting, task, save, before):
    """Everything that is counted in steps; AdamW is that of the results ``before``, where there are any."""
    results = {"versions": versions(), "batch": setting.batch}
    results["adamw"] = before["adamw"] if before else rival(setting, task)
    results["target"] = target = results["adamw"]["final"]
    print({k: v for k, v in results["adamw"].items() if k != "curves"}, flush=True)
    save(results)
    trainer = Trainer(task, natural(setting, task), setting.batch, setting.kfac_steps, setting.every)
    results["kfac"] = toward(study(trainer, [{"damping": d} for d in setting.dampings], setting.seeds), target)
    print({k: v for k, v in results["kfac"].items() if k != "curves"}, flush=True)
    save(results)
    return results


def timing(results, setting, task):
    """Milliseconds of a step and seconds to compile."""
    rounds, steps = setting.rounds
    makes = {
        "adamw": adamw(steps, 0.95, 0.01),
        "kfac": natural(setting, task, ramp=None),
    }
    trainers = {n: Trainer(task, m, setting.batch, steps, steps, watch=False) for n, m in makes.items()}
    numbers = {n: results[n]["chosen"] for n in trainers}
    for name, seconds in step_seconds(trainers, numbers, rounds).items():
        results[name] |= seconds
    return results


def table(results):
    lines = [f"# Natural gradients on {results['name']}", "", results["versions"], ""]
    rival = results["adamw"]
    lines += [f"AdamW's grid: {rival['grid']}; chosen {rival['chosen']}.", ""]
    columns = ("steps", "seeds there", "loss at the end", "ms a step", "of AdamW's", "s", "s to compile")
    lines += [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for key, label in (("adamw", "AdamW"), ("kfac", "K-FAC, adaptive")):
        if key not in results:
            continue
        row = results[key]
        steps = results["sizes"]["adamw_steps"] if key == "adamw" else row["steps"]
        there = f"{row['seeds_there']} of {len(row['curves'])}" if "seeds_there" in row else ""
        cells = [label, shown(steps), there, f"{row['final']:.3f}"]
        if "step_ms" in row:
            seconds = None if steps is None else steps * row["step_ms"] / 1e3
            cells += [f"{row['step_ms']:.0f}", f"{row['step_ms'] / rival['step_ms']:.2f}", shown(seconds, 1),
                      f"{row['compile_s']:.0f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells + [''] * (8 - len(cells)))} |")
    return "\n".join(lines) + "\n"


def picture(results, path):
    from matplotlib.figure import Figure

    timed = "step_ms" in results["adamw"]
    units = ("step", "second") if timed else ("step",)
    figure = Figure(figsize=(5 * len(units), 4), layout="constrained")
    for axis, unit in zip(figure.subplots(1, len(units), sharey=True, squeeze=False)[0], units, strict=True):
        for name, label, colour in (("adamw", "AdamW", "#555555"), ("kfac", "K-FAC, adaptive", "#0072B2")):
            row = results[name]
            curves = np.asarray(row["curves"])
            x = (np.arange(curves.shape[1]) + 1.0) * row["every"]
            x = x if unit == "step" else x * row["step_ms"] / 1e3
            axis.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
            axis.plot(x, np.median(curves, 0), color=colour, lw=1.5, label=label)
        axis.axhline(results["target"], color="0.6", lw=1, ls="--")
        axis.set(xscale="log", xlabel=f"{unit}s")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out loss (nats per token)")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"{results['name']}: median and range over seeds\ndashed: AdamW at the end")
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=SETTINGS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--steps-only", action="store_true", help="no timing")
    parser.add_argument("--kfac-only", action="store_true", help="AdamW is that of results/")
    parser.add_argument("--timing-only", action="store_true", help="timing of what is in results/, merged into it")
    args = parser.parse_args(argv)
    setting, name = SETTINGS[args.task], f"natural_gradient_{args.task}"
    if args.quick:
        name += "-quick"
        setting = setting._replace(
            characters=50_000, adamw_steps=4, kfac_steps=4, every=2, seeds=(1,), rates=(1e-2,), rounds=(1, 2)
        )
    rows, vocabulary = rows_of(args.task, setting)
    task = task_of(rows, vocabulary, setting)

    def save(results):
        results |= {"name": f"a decoder with {vocabulary:,} tokens", "sizes": setting._asdict()}
        write(name, results, table(results))

    before = read(name) if args.timing_only or args.kfac_only else None
    results = before if args.timing_only else collect(setting, task, save, before)
    if not args.steps_only:
        results = timing(results, setting, task)
        save(results)
    print(table(results))
    picture(results, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()

"""Two fine-tunes of one model as one model: by which weights? Wikipedia articles and PubMed abstracts.

`small`: a decoder on bytes (width 64, two layers, tied embedding) is trained on both domains, then fine-tuned on
each; a seed is new weights, a new split of the documents and new orders of rows. `head`: the head of SmolLM2-135M,
cut to the 4,096 tokens that are most often a target, fine-tuned on cached hidden states; a seed is a new split of the
documents. Every merge is judged on held-out documents of both domains at even weights, at the mixing weight and at
the length of the task vector that are best on other held-out documents. Differences are paired by seed, their
intervals over seeds corrected for overlapping splits (Nadeau and Bengio 2003). Floors of the Fisher and damping of
K-FAC are chosen on a seed of their own.

    uv run python experiments/merging.py small            # or head; minutes on 2 cores; writes results/
    uv run python experiments/merging.py small --quick    # does it run? numbers mean nothing
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see natural_gradient_autoencoder.py

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import merging_head
import merging_small
import numpy as np
from merging_report import DOMAINS, at_half, picture, table
from natural_gradient_runs import RESULTS, TUNING_SEED, read, versions, write

import fisher_jax as fj

FLOORS = (0.0, 0.01, 0.1, 1.0)


class Pair(NamedTuple):
    """Two fine-tunes of one model, ready to be merged.

    Attributes:
        base, models, joint: parameters of the start, of both fine-tunes, and of one on both domains.
        losses: of parameters, ``[2, 2]``: to choose on and to test on, by domain.
        fishers: weights of each method, a pair of trees.
        others: merges by other means, ``(share, length) -> params``, one for each of their settings.
        even_only: those among them that are too dear for more than even weights.
    """

    base: Any
    models: tuple[Any, Any]
    joint: Any
    losses: Callable[[Any], jax.Array]
    fishers: dict[str, tuple[Any, Any]]
    others: dict[str, dict[str, Callable]]
    even_only: frozenset[str] = frozenset()


@functools.partial(jax.jit, static_argnames="floor")
def fisher_merge(base, models, fishers, share, length, floor):
    return fj.continual.merge_task_vectors(
        base, models, fishers, scale=length, scales=[share, 1 - share], floor=floor
    )


def merges(pair):
    """``{method: {setting: (share, length) -> params}}``."""
    found: dict[str, dict[str, Callable]] = {}
    for name, fishers in pair.fishers.items():
        floors = FLOORS if "Fisher" in name else (0.0,)
        found[name] = {
            f"floor {floor:g}": functools.partial(fisher_merge, pair.base, pair.models, fishers, floor=floor)
            for floor in floors
        }
    return found | pair.others


def chosen_settings(pair):
    """For every method the setting with the lowest loss at even weights."""
    every = merges(pair)
    return {
        name: min(settings, key=lambda s, of=settings: float(pair.losses(of[s](0.5, 1.0))[0].mean()))
        for name, settings in every.items()
    }


def judged(pair, settings, shares, lengths):
    """Losses of all models and merges, ``[to choose on or to test on, domain]``."""
    single = {"base": pair.base, DOMAINS[0]: pair.models[0], DOMAINS[1]: pair.models[1], "both": pair.joint}
    found = {"references": {k: np.asarray(pair.losses(p)).tolist() for k, p in single.items()}, "methods": {}}
    for name, of in merges(pair).items():
        merge = of[settings[name]]
        found["methods"][name] = {
            "shares": [
                [x, np.asarray(pair.losses(merge(x, 1.0))).tolist()]
                for x in shares if x == 0.5 or name not in pair.even_only
            ],
            "lengths": [[x, np.asarray(pair.losses(merge(0.5, x))).tolist()] for x in lengths],
        }  # fmt: skip
        print(f"    {name}: {at_half(found['methods'][name]).mean():.4f}", flush=True)
    return found


def with_change(pair):
    """Beside the magnitude of the parameters that of what fine-tuning changed."""
    change = tuple(jax.tree.map(lambda p, b: (p - b) ** 2, p, pair.base) for p in pair.models)
    return pair._replace(fishers=pair.fishers | {"change": change})


def collect(make, setting, save, results=None):
    """Settings chosen on the tuning seed, and the losses of every other seed; goes on from ``results``."""
    if results is None:
        results = {"versions": versions(), "chosen": chosen_settings(with_change(make(TUNING_SEED))), "seeds": {}}
    settings = results["chosen"]
    print(settings, flush=True)
    for seed in setting.seeds:
        if str(seed) in results["seeds"]:
            continue
        results["seeds"][str(seed)] = judged(with_change(make(seed)), settings, setting.shares, setting.lengths)
        save(results)
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("small", "head"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--resume", action="store_true", help="keep the seeds that are in results/")
    parser.add_argument("--table-only", action="store_true", help="table and picture of what is in results/")
    args = parser.parse_args(argv)
    name = f"merging_{args.part}" + ("-quick" if args.quick else "")

    def save(results):
        results |= {"unit": "byte" if args.part == "small" else "token", "name": (
            "a decoder on bytes" if args.part == "small" else "the head of SmolLM2-135M")}  # fmt: skip
        write(name, results, table(results))

    before = read(name) if args.table_only or args.resume else None
    if args.table_only:
        results = before
        save(results)
    elif args.part == "small":
        setting = merging_small.Setting()
        if args.quick:
            setting = setting._replace(
                characters=400_000, batch=4, base_steps=10, block=10, steps=10, fisher_rows=8, few_rows=4, held_out=4,
                seeds=(1, 2), dampings=(1e-3,),
            )  # fmt: skip
        model, texts = merging_small.small_model(), merging_small.read_texts(setting)
        results = collect(lambda seed: Pair(*merging_small.pair(model, setting, texts, seed)), setting, save, before)
    else:
        setting = merging_head.Setting()
        if args.quick:
            setting = setting._replace(tokens=3_000, steps=2, seeds=(1, 2))
        data = merging_head.read_data(setting)
        results = collect(lambda seed: Pair(*merging_head.pair(setting, data, seed)), setting, save, before)
    print(table(results))
    picture(results, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()

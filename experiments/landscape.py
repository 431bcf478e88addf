"""Curvature along a training run: how sharp, how spread, in which layers, and for how many steps is it worth keeping?

A small decoder on bytes of Wikipedia (two layers, width 32). `edge`: gradient descent with a constant rate on a fixed
batch, and whether the top eigenvalue of the Hessian comes to rest at 2 / rate. `run`: AdamW and adaptive K-FAC on
batches; top eigenvalues and densities of Hessian and Gauss-Newton matrix, effective ranks of every layer's block of
the Fisher matrix; and K-FAC factors that are n steps old against fresh ones: the cosine of the steps they give, and
how much of what fresh factors gain over the plain gradient, in the exact quadratic model along the step, they keep.

    uv run python experiments/landscape.py            # minutes on 2 cores; writes results/
    uv run python experiments/landscape.py edge       # one part, merged into what is there; or run
    uv run python experiments/landscape.py --quick    # does it run? numbers mean nothing
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see natural_gradient_autoencoder.py

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from landscape_report import DAMPINGS, picture, table
from natural_gradient_language import SETTINGS, decoder, rows_of
from natural_gradient_runs import RESULTS, adamw, orders, read, versions, write

import fisher_jax as fj


class Setting(NamedTuple):
    """How much is run."""

    characters: int = 1_000_000
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    # Gradient descent on the edge of stability.
    edge_rows: int = 8
    edge_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    edge_blocks: int = 12
    edge_steps: int = 50  # of a block
    edge_seeds: tuple[int, ...] = (1, 2, 3)
    # Training runs.
    batch: int = 16
    steps: int = 400
    rate: float = 1e-2
    looks: tuple[int, ...] = (0, 10, 30, 100, 200, 400)
    density_looks: tuple[int, ...] = (0, 30, 400)
    density_seed: int = 1
    curvature_rows: int = 32
    block_rows: int = 4
    products: int = 30
    anchors: tuple[int, ...] = (10, 100, 300)
    ages: tuple[int, ...] = (0, 1, 3, 10, 30, 100)
    factor_rows: int = 32
    gradient_rows: int = 32
    repeats: int = 4


class Problem(NamedTuple):
    """The model and its rows."""

    apply_fn: Callable
    start: Callable
    rows: jax.Array

    def loss(self, params, rows):
        return -self.log_prob(params, rows).mean()

    def log_prob(self, params, rows):
        batch = fj.next_token_batch(rows)
        return fj.categorical.log_prob(self.apply_fn(params, batch.inputs), batch.targets)

    def some(self, seed, count):
        """Rows at random."""
        return self.rows[np.random.default_rng(seed).permutation(len(self.rows))[:count]]


def problem_of(setting):
    rows, _ = rows_of("bytes", SETTINGS["bytes"]._replace(characters=setting.characters))
    functions, start = decoder(256, 2, width=32, num_heads=2, num_kv_heads=2, mlp_size=88)
    return Problem(functions.apply, start, rows)


def top(problem, params, rows, kind, products, key, count=3, start=None):
    """The largest eigenvalues of Hessian or Gauss-Newton matrix, with bounds, and the first eigenvector."""
    batch = fj.next_token_batch(rows)
    matvec = getattr(fj.operators, kind)(problem.apply_fn, fj.categorical, params, batch)
    return fj.lanczos(
        matvec, params, num_steps=products, num_eigenvalues=count, key=key, check_period=5, tol=1e-2, start=start,
        eigenvectors=True, verify=False,
    )  # fmt: skip


def first(spectrum):
    return jax.tree.map(lambda x: x[0], spectrum.eigenvectors)


def edge(problem, setting, save):
    """Losses and top Hessian eigenvalues of gradient descent, by rate and seed."""

    @jax.jit
    def descend(params, rows, rate):
        def step(p, _):
            value, grads = jax.value_and_grad(problem.loss)(p, rows)
            return jax.tree.map(lambda x, g: x - rate * g, p, grads), value

        return jax.lax.scan(step, params, None, setting.edge_steps)

    def run(rate, seed):
        params, rows, vector = problem.start(seed), problem.some(seed, setting.edge_rows), None
        sharpness, losses, key = [], [], jax.random.key(seed)
        for block in range(setting.edge_blocks + 1):
            spectrum = top(problem, params, rows, "hessian", setting.products, key, 1, start=vector)
            vector = first(spectrum)
            sharpness.append(float(spectrum.eigenvalues[0]))
            if block < setting.edge_blocks:
                params, values = descend(params, rows, rate)
                losses.append(np.asarray(values).tolist())
        print(f"  rate {rate}, seed {seed}: sharpness {sharpness[0]:.1f} to {sharpness[-1]:.1f}, 2 / rate = "
              f"{2 / rate:.1f}, loss {losses[0][0]:.2f} to {losses[-1][-1]:.3f}", flush=True)  # fmt: skip
        return {"seed": seed, "sharpness": sharpness, "losses": losses}

    found: dict[str, list] = {str(rate): [] for rate in setting.edge_rates}
    for seed in setting.edge_seeds:
        for rate in setting.edge_rates:
            found[str(rate)].append(run(rate, seed))
        save({"steps": setting.edge_steps, "rates": found})


def trajectories(problem, setting):
    """``{optimizer: seed -> {step: params}}`` at every step that is looked at."""
    wanted = {a + n for a in setting.anchors for n in setting.ages} | set(setting.looks)
    rows = jax.ShapeDtypeStruct((setting.batch, problem.rows.shape[1]), problem.rows.dtype)
    example = jax.eval_shape(fj.next_token_batch, rows)
    makes = {
        "AdamW": adamw(setting.steps, 0.95, 0.01)(setting.rate),
        "K-FAC": fj.kfac(problem.apply_fn, example=example, refresh=fj.Refresh(period=10, factor_decay=0.5)),
    }

    def runner(tx):
        @jax.jit
        def step(params, state, rows, key):
            value, grads = jax.value_and_grad(problem.loss)(params, rows)
            batch = fj.next_token_batch(rows)
            updates, state = tx.update(grads, state, params, batch=batch, key=key, value=value)
            return optax.apply_updates(params, updates), state

        def run(seed):
            params = problem.start(seed)
            state, kept = tx.init(params), {0: params}
            order = orders(seed, setting.steps, len(problem.rows), setting.batch)
            for i, key in enumerate(jax.random.split(jax.random.key(seed), setting.steps)):
                params, state = step(params, state, problem.rows[order[i]], key)
                if i + 1 in wanted:
                    kept[i + 1] = params
            return kept

        return run

    return {name: runner(tx) for name, tx in makes.items()}


def eigenvalues(problem, setting, kept, seed):
    """Top eigenvalues and the loss at every look, on rows of the seed."""
    rows, found, vectors = problem.some(100 + seed, setting.curvature_rows), [], {"hessian": None, "ggn": None}
    for look in setting.looks:
        row = {"step": look, "loss": float(problem.loss(kept[look], rows))}
        for kind in vectors:
            spectrum = top(
                problem, kept[look], rows, kind, setting.products, jax.random.key(seed), start=vectors[kind]
            )
            vectors[kind] = first(spectrum)
            row[kind], row[f"{kind}_bounds"] = spectrum.eigenvalues.tolist(), spectrum.residuals.tolist()
        found.append(row)
    return found


def densities(problem, setting, kept, seed):
    rows, found = problem.some(100 + seed, setting.curvature_rows), {}
    for look in setting.density_looks:
        for kind in ("hessian", "ggn"):
            matvec = getattr(fj.operators, kind)(
                problem.apply_fn, fj.categorical, kept[look], fj.next_token_batch(rows)
            )
            density = fj.spectral_density(
                matvec, kept[look], num_steps=setting.products, num_probes=3, key=jax.random.key(seed)
            )
            log = density.on_log_axis(floor=1e-5)
            found.setdefault(kind, {})[str(look)] = {
                "grid": log.grid.tolist(), "positive": log.positive.tolist(), "negative": log.negative.tolist(),
                "zero": log.zero, "trace": density.mean * density.dimension,
                "trace_error": float(density.mean_error) * density.dimension,
                "negative_share": float(np.sum(log.negative * np.diff(log.edges))),
            }  # fmt: skip
    return found


def blocks(problem, setting, kept, seed):
    """Capacity of every layer's block at every look."""
    batch, found = fj.next_token_batch(problem.some(200 + seed, setting.block_rows)), []
    for look in setting.looks:
        spectra = fj.block_spectrum(problem.apply_fn, fj.categorical, kept[look], batch, stacked=True)
        found.append({
            name: {"entropy_rank": s.capacity.entropy_rank, "trace": s.capacity.trace, "top": float(s.eigenvalues[0]),
                   "participation_ratio": s.capacity.participation_ratio, "parameters": s.num_parameters}
            for name, s in spectra.items()
        })  # fmt: skip
    return {"scores": setting.block_rows * (problem.rows.shape[1] - 1), "looks": found}


def dot(x, y):
    return sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def judge_of(problem):
    """Compiled: factors of rows, and what old and fresh factors make of one gradient."""

    @jax.jit
    def factors(params, rows, key):
        batch = fj.next_token_batch(rows)
        return fj.kfac_factors(
            problem.apply_fn,
            fj.categorical,
            params,
            batch,
            key=key,
            curvature=fj.Curvature(estimator="sampled", policy="never"),
        )

    @jax.jit
    def judge(params, old, new, rows, damping):
        """Cosine of both steps; decreases of the damped quadratic model along the old, the new and the gradient."""
        grads = jax.grad(problem.loss)(params, rows)
        matvec = fj.operators.ggn(problem.apply_fn, fj.categorical, params, fj.next_token_batch(rows))
        steps = [fj.precondition(dataclasses.replace(f, damping=damping), grads) for f in (old, new)]

        def gain(step):
            curved = dot(step, matvec(step)) + damping * dot(step, step)
            return dot(grads, step) ** 2 / (2 * curved)

        cosine = dot(*steps) / jnp.sqrt(dot(steps[0], steps[0]) * dot(steps[1], steps[1]))
        return jnp.stack([cosine, *map(gain, (*steps, grads))])

    return factors, judge


def staleness(problem, setting, kept, seed, compiled):
    """``[anchor, age, damping]``: mean cosine, and gains ``[old, fresh, gradient]``, over repeats."""
    factors, judge = compiled
    out = np.zeros((len(setting.anchors), len(setting.ages), len(DAMPINGS), 4))
    for repeat in range(setting.repeats):
        base = 1000 * (seed + 1) + 10 * repeat
        old_rows, new_rows = (problem.some(base + i, setting.factor_rows) for i in (0, 1))
        rows, keys = problem.some(base + 2, setting.gradient_rows), jax.random.split(jax.random.key(base), 2)
        for a, anchor in enumerate(setting.anchors):
            old = factors(kept[anchor], old_rows, keys[0])
            for n, age in enumerate(setting.ages):
                params = kept[anchor + age]
                new = factors(params, new_rows, keys[1])
                for d, damping in enumerate(DAMPINGS):
                    out[a, n, d] += np.asarray(judge(params, old, new, rows, damping), np.float64) / setting.repeats
    return out.tolist()


def training(problem, setting, save, found):
    """Everything of ``run``, by optimizer and seed; goes on from ``found``."""
    compiled, runs = judge_of(problem), trajectories(problem, setting)
    for seed in setting.seeds:
        for name, run in runs.items():
            if any(row["seed"] == seed for row in found.get(name, ())):
                continue
            kept = run(seed)
            row = {"seed": seed, "staleness": staleness(problem, setting, kept, seed, compiled)}
            row["eigenvalues"] = eigenvalues(problem, setting, kept, seed)
            row["blocks"] = blocks(problem, setting, kept, seed)
            if seed == setting.density_seed:
                row["densities"] = densities(problem, setting, kept, seed)
            last = row["eigenvalues"][-1]
            print(f"  {name}, seed {seed}: loss {last['loss']:.3f}, top of the Hessian {last['hessian'][0]:.1f}, of "
                  f"the GGN {last['ggn'][0]:.1f}", flush=True)  # fmt: skip
            found.setdefault(name, []).append(row)
        save(found)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("edge", "run"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--resume", action="store_true", help="keep the seeds of run that are in results/")
    parser.add_argument("--table-only", action="store_true", help="table and picture of what is in results/")
    args = parser.parse_args(argv)
    setting, name = Setting(), "landscape-quick" if args.quick else "landscape"
    if args.quick:
        setting = setting._replace(
            characters=50_000, seeds=(1, 2), edge_rates=(0.1, 0.3), edge_blocks=4, edge_steps=3, edge_seeds=(1, 2),
            batch=4, steps=8, looks=(0, 2, 8), density_looks=(0, 2, 8), curvature_rows=2, block_rows=1, products=6,
            anchors=(1, 2, 4), ages=(0, 1, 3), factor_rows=2, gradient_rows=2, repeats=1,
        )  # fmt: skip

    def save(part, found):
        # Read again: the other part may be running beside this one.
        before = read(name) if (RESULTS / f"{name}.json").is_file() else {}
        results = before | {"versions": versions(), "sizes": setting._asdict(), part: found}
        write(name, results, table(results))

    problem = None if args.table_only else problem_of(setting)
    if problem and args.part != "run":
        edge(problem, setting, functools.partial(save, "edge"))
    if problem and args.part != "edge":
        found = read(name).get("run", {}) if args.resume else {}
        training(problem, setting, functools.partial(save, "run"), found)
    results = read(name)  # tuples as lists, as ever after
    write(name, results, table(results))
    print(table(results))
    if "edge" in results and "run" in results:
        picture(results, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()

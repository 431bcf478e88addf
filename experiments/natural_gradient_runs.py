"""What the experiments on natural gradients share: a task, a compiled training run, grids, steps and seconds."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisher_jax as fj

RESULTS = pathlib.Path(__file__).parent / "results"
TUNING_SEED = 0  # choices are made on it; what is reported comes from others
FRESH_SEEDS = (11, 12, 13, 14, 15)  # no setting, default or grid was ever looked at on these
AVERAGE = 0.9  # share of the past that stays in the average of parameters


class Task(NamedTuple):
    """A model and its data.

    Attributes:
        start: parameters of a seed.
        apply_fn, likelihood: the model.
        batch_of: a batch from rows of ``data``.
        data: rows to train on.
        evaluate: the loss that curves show, of parameters.
    """

    start: Callable[[int], Any]
    apply_fn: Callable
    likelihood: Any
    batch_of: Callable[[jax.Array], fj.Batch]
    data: jax.Array
    evaluate: Callable[[Any], jax.Array]

    def loss(self, params, batch):
        return -self.likelihood.log_prob(self.apply_fn(params, batch.inputs), batch.targets).mean()

    def example(self, size):
        rows = jax.ShapeDtypeStruct((size, *self.data.shape[1:]), self.data.dtype)
        return jax.eval_shape(self.batch_of, rows)


def orders(seed, steps, rows, batch):
    """Rows of every batch ``[steps, batch]``, shuffled anew each epoch; nothing for the full batch."""
    if batch == rows:
        return jnp.zeros((steps, 0), jnp.int32)
    rng, per = np.random.default_rng(1000 + seed), rows // batch
    epochs = [rng.permutation(rows)[: per * batch].reshape(per, batch) for _ in range(-(-steps // per))]
    return jnp.asarray(np.concatenate(epochs)[:steps])


class Trainer:
    """One optimizer at one batch size and number of steps, compiled once; ``numbers`` of it may change.

    Losses come in pairs: of the parameters, and of their average, ``AVERAGE`` of the past and the rest of the new
    one (the plain mean of the first ten).
    """

    def __init__(self, task, make, batch, steps, every=5, watch=True):
        self.task, self.batch, self.steps, self.every = task, batch, steps, every

        def run(params, rows, keys, data, numbers):
            tx = make(**numbers)

            def step(carry, given):
                params, mean, state, count = carry
                seen = task.batch_of(data if batch == len(data) else data[given[0]])
                value, grads = jax.value_and_grad(task.loss)(params, seen)
                updates, state = tx.update(grads, state, params, batch=seen, key=given[1], value=value)
                params = optax.apply_updates(params, updates)
                new = jnp.maximum(1 - AVERAGE, 1 / (count + 1))
                return (params, optax.incremental_update(params, mean, new), state, count + 1), None

            def block(carry, given):
                carry, _ = jax.lax.scan(step, carry, given)
                return carry, jnp.stack([task.evaluate(p) for p in carry[:2]]) if watch else None

            blocks = jax.tree.map(lambda a: a.reshape(steps // every, every, *a.shape[1:]), (rows, keys))
            carry = params, params, tx.init(params), jnp.zeros(())
            (params, mean, *_), losses = jax.lax.scan(block, carry, blocks)
            return (params, mean), losses

        self._run, self._compiled, self.compile_seconds = jax.jit(run), None, None

    def __call__(self, seed, **numbers):
        keys = jax.random.split(jax.random.key(seed + 500), self.steps)
        numbers = {k: jnp.float32(v) for k, v in numbers.items()}
        data = self.task.data
        arguments = self.task.start(seed), orders(seed, self.steps, len(data), self.batch), keys, data, numbers
        if self._compiled is None:
            begin = time.perf_counter()
            self._compiled = self._run.lower(*arguments).compile()
            self.compile_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        params, losses = jax.block_until_ready(self._compiled(*arguments))
        self.seconds = time.perf_counter() - begin
        return params, None if losses is None else np.asarray(losses, np.float64)


def adamw(steps, b2=0.95, weight_decay=1e-4):
    """AdamW with a warm-up over a tenth of the steps and a cosine to zero."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)

    def make(rate, b2=b2):
        tx = optax.adamw(lambda step: rate * shape(step), b2=b2, weight_decay=weight_decay)
        return optax.with_extra_args_support(tx)

    return make


def sgd(steps):
    """SGD with Nesterov's momentum, the same schedule, gradients clipped at norm 1."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)

    def make(rate):
        descent = optax.sgd(lambda step: rate * shape(step), momentum=0.9, nesterov=True)
        return optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(1.0), descent))

    return make


def kfac(task, batch, steps=None, **options):
    """Adaptive; with ``steps`` a fixed rate, its schedule that of AdamW. Options are fields of K-FAC's, by name."""
    shape = None if steps is None else optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)

    def make(rate=None, **numbers):
        chosen = options | numbers

        def fields(kind):
            return kind(**{f.name: chosen.pop(f.name) for f in dataclasses.fields(kind) if f.name in chosen})

        return fj.kfac(
            task.apply_fn,
            task.likelihood,
            example=task.example(batch),
            learning_rate=None if shape is None else lambda step: rate * shape(step),
            curvature=fields(fj.Curvature),
            refresh=fields(fj.Refresh),
            step=fields(fj.Adaptive if shape is None else fj.FixedRate),
            **chosen,
        )

    return make


def lowest(losses):
    """The lower of the last losses of the parameters and of their average."""
    last = np.where(np.isfinite(losses[-1]), losses[-1], np.inf)
    return float(last.min())


def tuned(trainer, grid):
    """The choice with the lowest loss at the end on the tuning seed, whether averaged, and all scores."""
    found = [(lowest(losses), numbers, losses) for numbers in grid for _, losses in [trainer(TUNING_SEED, **numbers)]]
    _, best, losses = min(found, key=lambda x: x[0])
    averaged = bool(losses[-1, 1] < losses[-1, 0])
    return best, averaged, [{**numbers, "loss": score} for score, numbers, _ in found]


def reached(curve, target, every):
    """First step at which the loss is at the target, or nothing."""
    hits = np.flatnonzero(np.asarray(curve) <= target)
    return int(hits[0] + 1) * every if len(hits) else None


def median_steps(curves, target, every):
    """Median over seeds; a seed that never gets there counts as later than all others."""
    steps = np.median([reached(c, target, every) or np.inf for c in curves])
    return float(steps) if np.isfinite(steps) else None


def study(trainer, grid, seeds, others=None):
    """Tuned on one seed, run on others: what was chosen, curves and, where asked for, another loss at the end.

    Where there is nothing to choose, nothing is tuned, and the average of parameters is what is read.
    """
    best, averaged, scores = tuned(trainer, grid) if len(grid) > 1 else (*grid, True, [])
    runs = [trainer(seed, **best) for seed in seeds]
    found = {
        "chosen": best, "averaged": averaged, "grid": scores, "every": trainer.every,
        "curves": [losses[:, int(averaged)].tolist() for _, losses in runs],
        "last_iterates": [float(losses[-1, 0]) for _, losses in runs],
        "final": float(np.median([losses[-1, int(averaged)] for _, losses in runs])),
    }  # fmt: skip
    if others is not None:
        found["test"] = float(np.median([others(pair[int(averaged)]) for pair, _ in runs]))
    return found


def toward(found, target):
    """Steps to the target, and how many seeds get there."""
    found["steps"] = median_steps(found["curves"], target, found["every"])
    found["seeds_there"] = sum(reached(c, target, found["every"]) is not None for c in found["curves"])
    return found


def step_seconds(trainers, numbers, rounds):
    """Seconds of a step and seconds to compile, by name: medians of interleaved rounds without evaluations."""
    times = {name: [] for name in trainers}
    for repeat in range(rounds + 1):
        for name, trainer in trainers.items():
            trainer(TUNING_SEED, **numbers[name])
            if repeat:
                times[name].append(trainer.seconds / trainer.steps)
    return {
        name: {"step_ms": 1e3 * float(np.median(t)), "compile_s": trainers[name].compile_seconds}
        for name, t in times.items()
    }


def versions():
    names = ("jax", "optax", "scikit-learn", "fisher-jax")
    found = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    return f"{found}; {jax.devices()[0].device_kind}, {os.cpu_count()} cores"


def shown(x, digits=0):
    return "–" if x is None else f"{x:.{digits}f}"  # noqa: RUF001


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def write(name, results, text):
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")

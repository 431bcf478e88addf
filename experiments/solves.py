"""How many products does a damped solve with the GGN of a language model take, by preconditioner?

The decoder of bytes of `natural_gradient_language.py` (two layers of width 64), trained by AdamW on Wikipedia. The
GGN is over 64 rows of 64 bytes, the right-hand sides are loss gradients of two held-out rows, and a solve is done at
a relative residual of 1e-3. Preconditioners are what a user has: nothing, a diagonal Fisher, K-FAC, EK-FAC, and K-FAC
with ten times the damping of the solve.

    uv run python experiments/solves.py            # writes results/solves.md and .json
    uv run python experiments/solves.py --quick    # does it run? numbers mean nothing
"""

import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import write
from natural_gradient_language import SETTINGS, decoder, rows_of
from natural_gradient_runs import versions

import fisher_jax as fj

RESULTS = pathlib.Path(__file__).parent / "results"
DAMPINGS = (1e-1, 1e-2, 1e-3)
MOST = 600


def trained(apply_fn, params, rows, steps):
    """Parameters after ``steps`` of AdamW."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))

    def loss(params, batch):
        return -fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets).mean()

    @jax.jit
    def step(params, state, rows):
        value, grads = jax.value_and_grad(loss)(params, fj.next_token_batch(rows))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, order = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        params, state, value = step(params, state, rows[order.integers(0, len(rows), 32)])
    return params, float(value)


def preconditioners(apply_fn, params, batch):
    estimator = fj.group_fisher(apply_fn, kind="true", estimator="signs", groups=fj.groups.param, example=batch)
    diagonal = fj.mean(estimator.observe(params, batch, jax.random.key(0)))

    def factors(correct):
        # The embedding that is the head too is a sum of two products without common eigenvectors.
        choice = (lambda path: "embed" not in path) if correct else False
        curvature = fj.Curvature(estimator="sampled", eigenvalue_correction=choice)
        return fj.kfac_factors(apply_fn, fj.categorical, params, batch, key=jax.random.key(1), curvature=curvature)

    plain, corrected = factors(False), factors(True)

    def more_damped(damping):
        return jax.tree_util.Partial(fj.precondition, dataclasses.replace(plain, damping=jnp.float32(10 * damping)))

    return {
        "none": lambda damping: None,
        "K-FAC": lambda damping: plain,
        "K-FAC, 10 damping": more_damped,
        "EK-FAC": lambda damping: corrected,
        "diagonal": lambda damping: diagonal,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    setting = SETTINGS["bytes"]._replace(characters=60_000 if quick else 3_000_000)
    rows, vocabulary = rows_of("bytes", setting)
    functions, start = decoder(vocabulary, setting.layers)
    params, loss = trained(functions.apply, start(0), rows[:-64], 3 if quick else 600)
    batch = fj.next_token_batch(rows[:8] if quick else rows[:64])
    matvec = fj.operators.ggn(functions.apply, fj.categorical, params, batch)
    queries = [
        fj.operators.gradient(functions.apply, fj.categorical, params, fj.next_token_batch(rows[-i - 1 :][:1]))
        for i in range(1 if quick else 2)
    ]
    ways = preconditioners(functions.apply, params, batch)
    table = []
    for damping in DAMPINGS[:1] if quick else DAMPINGS:
        row = {"damping": damping}
        for name, way in ways.items():
            found = [
                fj.solve(matvec, b, damping=damping, preconditioner=way(damping), rtol=1e-3, max_steps=MOST)
                for b in queries
            ]
            products = np.mean([int(x.num_products) for x in found])
            row[name] = (
                float(products) if all(bool(x.converged) for x in found) else f"{products:.0f} ({found[0].reason})"
            )
            print(damping, name, row[name], flush=True)
        table.append(row)
    if not quick:
        facts = {"title": "Products of a damped solve", "loss of training": loss, **versions()}
        write(RESULTS / "solves", facts, {"Products to a relative residual of 1e-3, mean of two queries": table})


if __name__ == "__main__":
    main()

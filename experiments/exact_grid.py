"""Where backward passes of many tokens are compiled right: what `exact` does, and plain ``jax.vmap`` beside it.

Each cell takes one chunk of tokens of a decoder, as the estimator does, and compares some of its gradients with
``jax.grad`` of one token a call, compiled apart. Cells that are in the table are not computed again.

    python experiments/exact_grid.py --quick
    python experiments/exact_grid.py
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax import models
from fisher_jax._support import passes
from fisher_jax.models.config import DecoderConfig

FULL = {
    "width": (16, 64, 256),
    "layers": (1, 4),
    "vocabulary": (64, 4096),
    "tokens": (256, 1024, 8192),
    "chunk": (4, 16),
}
QUICK = {"width": (16, 64), "layers": (1,), "vocabulary": (64,), "tokens": (256, 512, 1024), "chunk": (16,)}
LIMIT = 2e-4  # of the largest entry of a parameter's gradient
LENGTH, COMPARED = 64, 3


def measured(width, layers, vocabulary, tokens, chunk):
    """Largest relative errors of the two formulations, and their seconds for a chunk."""
    config = DecoderConfig(
        vocab_size=vocabulary, width=width, num_layers=layers, num_heads=width // 8, num_kv_heads=width // 8,
        head_size=8, mlp_size=2 * width, max_positions=LENGTH,
    )  # fmt: skip
    apply, params = models.from_config(config).apply, models.init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, vocabulary, (2, tokens // LENGTH, LENGTH), dtype=np.int32)
    index = rng.choice(tokens, chunk, replace=False).astype(np.int32)

    def together(over):
        def run(params, inputs, targets, index):
            outputs, pullback = jax.vjp(lambda p: jax.nn.log_softmax(apply(p, inputs)), params)
            one_hot = jax.nn.one_hot(targets, vocabulary, dtype=outputs.dtype).reshape(tokens, vocabulary)
            place = jnp.arange(tokens)[:, None]
            return over(lambda t: pullback(jnp.where(place == t, one_hot, 0).reshape(outputs.shape))[0], index)

        return jax.jit(run)

    def log_prob(params, inputs, targets, t):
        found = jax.nn.log_softmax(apply(params, inputs)).reshape(tokens, vocabulary)
        return found[t, targets.reshape(-1)[t]]

    loop = jax.jit(jax.grad(log_prob))
    where = rng.choice(chunk, COMPARED, replace=False)
    wanted = [loop(params, inputs, targets, index[i]) for i in where]
    row = {}
    forms = {"exact": passes.each, "vmap": lambda f, index: jax.vmap(f)(index)}
    for name, over in forms.items():
        run = together(over)
        found = jax.block_until_ready(run(params, inputs, targets, index))
        start = time.perf_counter()
        jax.block_until_ready(run(params, inputs, targets, index))
        row[f"{name}_seconds"] = time.perf_counter() - start
        row[f"{name}_error"] = max(
            float(np.abs(np.asarray(x[i]) - np.asarray(y)).max() / np.abs(y).max())
            for i, tree in zip(where, wanted, strict=True)
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True)
        )
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="six small cells")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "exact_grid.json")
    options = parser.parse_args()
    table = json.loads(options.out.read_text()) if options.out.exists() else {}
    grid = QUICK if options.quick else FULL
    for cell in sorted(itertools.product(*grid.values()), key=np.prod):
        settings = dict(zip(grid, cell, strict=True))
        name = f"jaxlib {jax.lib.__version__} " + " ".join(f"{k}={v}" for k, v in settings.items())
        if name not in table:
            table[name] = measured(**settings)
            options.out.write_text(json.dumps(table, indent=1) + "\n")
        row = table[name]
        print(
            name,
            {k: f"{v:.1e}" for k, v in row.items()},
            "right" if row["exact_error"] < LIMIT else "WRONG",
            flush=True,
        )
    for form in ("exact", "vmap"):
        wrong = sum(row[f"{form}_error"] > LIMIT for row in table.values())
        print(f"{form}: wrong in {wrong} of {len(table)} cells")


if __name__ == "__main__":
    main()

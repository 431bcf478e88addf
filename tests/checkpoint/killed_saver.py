"""Run as ``python -m tests.checkpoint.killed_saver FOLDER``: saves states with rising numbers until it is killed."""

import itertools
import sys

import numpy as np

import fisher_jax as fj

VALUES = np.random.default_rng(0).normal(size=200)


def state(step):
    return {"step": step, "values": VALUES + step, "rows": [np.full(50, step)] * 3}


def main(folder):
    first = fj.checkpoint.restore(folder)["step"] if fj.checkpoint.revision(folder) else 0
    for step in itertools.count(first + 1):
        fj.checkpoint.save(folder, state(step))
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])

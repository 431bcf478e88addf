"""Pairs of runs that start on one folder at the same moment, with locks that work and with locks that do not.

    python experiments/concurrent_runs.py [--pairs 20] [--stores] [--seed 0]

The folder of a report holds two finished tasks. Half of the pairs measure the same third task, half two
different ones. ``working``: locks as they are. ``lease``: `flock` fails, as where a file system has none.
``failing``: `flock` says yes to everybody, so that both runs go on and only the commits of their states keep
them apart. One of each pair must finish; the other one finishes too, or ends with one sentence and exit code 2;
the finished tasks and what the pair has finished must restore to the bits of undisturbed runs. Counts go to
results/concurrent_runs.json.
"""

import argparse
import errno
import functools
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kills import RESULTS, forked_digest, load_before_forking, prepare

WAYS = ("working", "lease", "failing")


def started(run: Any, way: str, wait: float) -> tuple[int, int]:
    """(process, pipe from which it says its exit code and its errors)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    import contextlib
    import fcntl
    import io

    def no_flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    # The system's own call, as the file system of a network would answer it.
    fcntl.flock = {"working": fcntl.flock, "lease": no_flock, "failing": lambda file, operation: None}[way]
    errors, code = io.StringIO(), 70
    try:
        time.sleep(wait)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = run()
    finally:
        os.write(writer, json.dumps([code, errors.getvalue()[-1000:]]).encode())
        os._exit(0)


def saving(task: str, out: Path, seed: int) -> int:
    """A run without its model: it holds the folder, reads the state and saves its task three times."""
    import copy

    from fisher_jax._support.errors import InputError
    from fisher_jax.cli.report.store import ReportStore
    from fisher_jax.cli.run.run_folder import run_folder

    dice = random.Random(seed)
    try:
        with run_folder(out, interrupted=lambda: "interrupted"):
            store = ReportStore(out)
            arrays, progress = store.restore()["first"], copy.deepcopy(store.runs["first"])
            progress.num_batches, progress.seconds = 3, float(seed)
            for progress.batches_done in (1, 2, 3):
                time.sleep(dice.uniform(0, 0.2))
                store.save(task, arrays, progress)
    except InputError as error:
        sys.stderr.write(f"fisher-jax: {error}\n")
        return 2
    return 0


def keep_two(out: Path) -> None:
    """Two finished tasks of chosen numbers, made in a process of its own."""
    if (pid := os.fork()) == 0:
        import numpy as np
        from kept import keep
        from tiny import write_model

        from fisher_jax.models import load

        model = load(write_model(out.parent / "model"))
        out.mkdir()
        for task in ("first", "second"):
            values = np.random.default_rng(len(task)).uniform(0, 1, (6, model.config.vocab_size))
            keep(out, task, model, {"empirical": values, "true": values})
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def pair(runs: list[Any], way: str, dice: random.Random) -> list[tuple[int, str]]:
    """(exit code, errors) of each."""
    begun = [started(run, way, dice.uniform(0, 0.3)) for run in runs]
    told = []
    for pid, reader in begun:
        with os.fdopen(reader) as stream:
            code, errors = json.loads(stream.read() or '[-1, "killed"]')
        os.waitpid(pid, 0)
        told.append((code, errors))
    return told


def judged(folder: Path, tasks: list[str], told: list[tuple[int, str]], want: dict[str, str]) -> list[str]:
    """What is wrong with the outcome of a pair."""
    wrong = []
    codes = sorted(code for code, _ in told)
    if codes not in ([0, 0], [0, 2]):
        wrong.append(f"exit codes {codes}: {told}")
    for code, errors in told:
        if code == 2 and (errors.count("\n") != 1 or not errors.startswith("fisher-jax: ")):
            wrong.append(f"not one sentence: {errors!r}")
    _, _, said = forked_digest(folder / "state")
    found = json.loads(said)
    needed = {"first", "second", *(task for task, (code, _) in zip(tasks, told, strict=True) if code == 0)}
    for task in sorted(needed):
        if found.get(task) != want[task]:
            wrong.append(f"{task}: {found.get(task)} instead of {want[task]}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="of each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stores", action="store_true", help="a run's reading and saving alone, without a model")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*fork.*")
    load_before_forking()
    from fisher_jax.cli.main import main as command

    dice, results = random.Random(options.seed), {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if options.stores:
            keep_two(root / "report")

            def run(task: str, out: Path) -> Any:
                return functools.partial(saving, task, out, dice.randrange(10**6))
        else:
            base = prepare(root)["report"]

            def run(task: str, out: Path) -> Any:
                return functools.partial(command, [*base, "--task", task, "--out", str(out)])

        reference = Path(shutil.copytree(root / "report", root / "reference"))
        for task in ("third", "fourth"):
            [(code, errors)] = pair([run(task, reference)], "working", dice)
            assert code == 0, errors
        want = json.loads(forked_digest(reference / "state")[2])
        for way in options.ways:
            counts = {"pairs": 0, "both_finished": 0, "one_refused": 0, "wrong": []}
            for i in range(options.pairs):
                tasks = ["third", "third" if i % 2 else "fourth"]
                out = Path(shutil.copytree(root / "report", root / f"{way}-{i}"))
                told = pair([run(task, out) for task in tasks], way, dice)
                counts["pairs"] += 1
                counts["both_finished"] += sorted(code for code, _ in told) == [0, 0]
                counts["one_refused"] += sorted(code for code, _ in told) == [0, 2]
                counts["wrong"] += [f"pair {i}, {tasks}: {each}" for each in judged(out, tasks, told, want)]
                shutil.rmtree(out)
                results[way] = counts
                kind = "stores" if options.stores else "runs"
                (RESULTS.parent / f"concurrent_{kind}.json").write_text(json.dumps(results, indent=1) + "\n")
            print(way, counts, flush=True)


if __name__ == "__main__":
    main()

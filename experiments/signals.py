"""SIGINT and SIGTERM at random moments of the first two seconds of a run: how, and how soon, each of them ends it.

    python experiments/signals.py [--runs 50] [--within 2] [--seed 0]

Runs of all commands in turn on a tiny model. The moment is counted from where Python has imported the entry of the
command line; before, the interpreter's own handlers end it. Counts go to results/signals.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cli")]
ENTRY = "import sys; from fisher_jax.cli.main import main; print('here', flush=True); sys.exit(main())"
RESULTS = Path(__file__).resolve().parent / "results" / "signals.json"


def commands(root: Path) -> list[list[str]]:
    from tiny import write_model, write_texts

    model, texts = str(write_model(root / "tiny")), write_texts(root / "texts", count=8)
    length = ["--row-length", "32", "--batch-size", "1", "--checkpoint-every", "0"]
    return [
        ["report", "--model", model, "--text", *texts, *length],
        ["train", "--text", *texts, "--row-length", "32", "--steps", "5000", "--held-out-tokens", "64"],
        ["spectrum", "--model", model, "--text", *texts, "--k", "2", "--max-tokens", "600", "--row-length", "32"],
        ["merge", "--models", model, model, "--by", "uniform", "--text", *texts],
        ["trim", "--model", model, "--by", "magnitude", "--keep", "270", "--text", *texts],
    ]


def one(arguments: list[str], out: Path, number: int, seconds: float) -> dict:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", ENTRY, *arguments, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(number)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=600)
    took = time.monotonic() - sent
    left = [path.name for path in out.rglob("*") if path.is_file()] if out.exists() else []
    return {
        "command": arguments[0], "after": round(seconds, 3), "code": process.returncode, "took": round(took, 2),
        "traceback": "Traceback" in errors or "Exception ignored" in errors,
        "files": len(left), "errors": errors[-300:],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="of each signal")
    parser.add_argument("--within", type=float, default=2.0, help="seconds")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # A shell lets its background jobs ignore SIGINT, and what they start as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dice, told = random.Random(options.seed), {}
    with tempfile.TemporaryDirectory() as folder:
        given = commands(Path(folder))
        for number in (signal.SIGINT, signal.SIGTERM):
            moments = [dice.uniform(0, options.within) for _ in range(options.runs)]
            with ThreadPoolExecutor(options.at_once) as pool:
                begun = [
                    pool.submit(one, given[i % len(given)], Path(folder) / f"{number}-{i}", number, seconds)
                    for i, seconds in enumerate(moments)
                ]
                runs = [each.result() for each in begun]
            told[signal.Signals(number).name] = {
                "runs": len(runs),
                "within_seconds": options.within,
                "exit_130": sum(run["code"] == 130 for run in runs),
                "tracebacks": sum(run["traceback"] for run in runs),
                "slowest_end_in_seconds": max(run["took"] for run in runs),
                "others": [run for run in runs if run["code"] != 130 or run["traceback"]],
            }
            print(json.dumps(told, indent=1), flush=True)
            RESULTS.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()

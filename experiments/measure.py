"""What benchmarks share: interleaved medians, and the peak of memory of a process of its own."""

import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np


def seconds(way):
    """Of one call, until its result is there."""
    begin = time.perf_counter()
    jax.block_until_ready(way())
    return time.perf_counter() - begin


def medians(ways, rounds, warm=True):
    """``{name: median seconds}`` of functions without arguments, one after the other, round after round."""
    for way in ways.values() if warm else ():
        way()
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    return {name: float(np.median(taken)) for name, taken in times.items()}


def peak_mib():
    """The most memory that this process has had resident, on Linux.

    Not ``resource.getrusage``: a process started by a large one begins there with what that one had.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def alone(file, *args):
    """What ``python file args`` prints last, as JSON: peaks of memory are those of a process of its own."""
    done = subprocess.run([sys.executable, str(file), *args], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def markdown(title, rows):
    """A table of dicts with the same keys."""
    head = list(rows[0])
    shown = [[f"{r[k]:.4g}" if isinstance(r[k], float) else str(r[k]) for k in head] for r in rows]
    lines = [f"\n## {title}\n", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in shown]) + "\n"


def write(path, facts, tables):
    """``path.json`` and ``path.md``."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({**facts, "tables": tables}, indent=1) + "\n")
    text = f"# {facts['title']}\n\n" + ", ".join(f"{k}: {v}" for k, v in facts.items() if k != "title") + "\n"
    path.with_suffix(".md").write_text(text + "".join(markdown(title, rows) for title, rows in tables.items()))

"""What do thousands of malformed inputs do? Each must be refused in one sentence, or change nothing.

Every kind of input is a line of `KINDS`: a function that tries so many cases of one seed and says of each what came
of it. A kind runs in a process of its own, so that one that dies, hangs or fills the memory is seen as such. What a
*malformed* mutation is, and why a valid one may change results, is told in `tests/mutations.py`.

    uv run python experiments/fuzz.py                      # about five minutes on 2 cores; writes results/fuzz.md
    uv run python experiments/fuzz.py --seed 7 --times 3   # three times as many of another seed
    uv run python experiments/fuzz.py --only "GGUF"        # prints, writes nothing
"""

import argparse
import collections
import importlib.metadata
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models")]
RESULTS = pathlib.Path(__file__).parent / "results"
GOOD = ("refused", "same", "another")
MOST_SECONDS = 900  # for one kind


class Kind(NamedTuple):
    """``cases(folder, seed, number)`` gives (outcome, how, seconds) one after the other."""

    number: int
    cases: Callable[[pathlib.Path, int, int], Iterator[tuple[str, str, float]]]


def of_model(name: str):
    def cases(folder: pathlib.Path, seed: int, number: int):
        import mutated_models

        yield from mutated_models.outcomes(mutated_models.TARGETS[name](folder), seed, number)

    return cases


def flags(folder: pathlib.Path, seed: int, number: int):
    from mutations_of_flags import flag_cases

    from fisher_jax._support.errors import InputError
    from fisher_jax.cli.commands import settings_of

    os.chdir(folder)
    for case in flag_cases(seed, number):
        start = time.monotonic()
        try:
            settings_of(case.arguments)
            kind = "accepted" if case.refused else "same"
        except InputError:
            kind = "refused"
        except BaseException as error:
            kind = f"{type(error).__name__}: {error}"
        yield kind, " ".join(case.arguments), time.monotonic() - start


def states(folder: pathlib.Path, seed: int, number: int):
    """Half of them a bit flipped anywhere in the folder, half facts that say something else."""
    import mutations_of_states as damage

    import fisher_jax as fj

    state = example_state()
    fj.checkpoint.save(folder / "good", state, metadata={"model": "tiny", "tasks": {"a": {"batches_done": 3}}})
    facts = json.loads(damage.facts_of(folder / "good").read_text())
    changes = damage.mutated_facts(facts, number - number // 2, seed)
    for i in range(number):
        shutil.rmtree(folder / "bad", ignore_errors=True)
        shutil.copytree(folder / "good", folder / "bad")
        if i % 2:
            how = damage.flip_a_bit(folder / "bad", random.Random(f"{seed}.{i}"))
        elif (change := next(changes, None)) is None:
            continue
        else:
            how = change[0]
            damage.facts_of(folder / "bad").write_text(json.dumps(change[1]))
        yield tried(lambda: fj.checkpoint.restore(folder / "bad"), state, how)


def exchanged(folder: pathlib.Path, seed: int, number: int):
    """A bit flipped anywhere in a file of `fj.exchange.save`."""
    import mutations_of_states as damage

    import fisher_jax as fj

    state = example_state()["scores"]
    (folder / "good").mkdir()
    fj.exchange.save(folder / "good" / "f.safetensors", state)
    for i in range(number):
        shutil.rmtree(folder / "bad", ignore_errors=True)
        shutil.copytree(folder / "good", folder / "bad")
        how = damage.flip_a_bit(folder / "bad", random.Random(f"{seed}.{i}"))
        yield tried(lambda: fj.exchange.load(folder / "bad" / "f.safetensors"), state, how)


def example_state():
    import jax.numpy as jnp

    import fisher_jax as fj

    moments = fj.welford.observe({"head": jnp.array([[1e-3, 2.0], [0.1, 3.0]]), "scale": jnp.array([1.0, 2.0])})
    return {"scores": fj.welford.add(fj.welford.init(moments), moments), "large": jnp.linspace(0.0, 1.0, 3_000)}


def tried(read: Callable[[], object], state: object, how: str) -> tuple[str, str, float]:
    """Refused, or the same bits in the same structure, or what is wrong."""
    import jax
    import numpy as np

    from fisher_jax._support.errors import InputError

    start = time.monotonic()
    try:
        found = read()
        one, two = ([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)] for tree in (found, state))
        kind = "same" if one == two else "accepted with other values"
    except InputError as error:
        kind = "refused" if str(error).isprintable() else f"no sentence: {str(error)[:200]!r}"
    except BaseException as error:
        kind = f"{type(error).__name__}: {str(error)[:200]}"
    return kind, how, time.monotonic() - start


# Another kind of input is another line.
KINDS = {
    "config.json of llama": Kind(600, of_model("config.json of llama")),
    "config.json of qwen2": Kind(400, of_model("config.json of qwen2")),
    "config.json of mistral": Kind(400, of_model("config.json of mistral")),
    "config.json of gpt2": Kind(400, of_model("config.json of gpt2")),
    "model.safetensors.index.json": Kind(400, of_model("model.safetensors.index.json")),
    "header of model.safetensors": Kind(800, of_model("header of model.safetensors")),
    "tokenizer.json": Kind(800, of_model("tokenizer.json")),
    "header of a GGUF file": Kind(1_500, of_model("header of a GGUF file")),
    "state folder": Kind(600, states),
    "file of fj.exchange": Kind(300, exchanged),
    "flags": Kind(1_000, flags),
}


def child(name: str, seed: int, number: int) -> None:
    """The cases of one kind, a line of JSON each, and what the process took."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FISHER_JAX_CACHE"] = f"{folder}/cache"
        lines = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what a library prints is no line of ours
        for outcome, how, seconds in KINDS[name].cases(pathlib.Path(folder), seed, number):
            lines.write(json.dumps([outcome, how, seconds]) + "\n")
        lines.write(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024) + "\n")


def run(name: str, seed: int, number: int) -> dict:
    """Counts, survivors, the longest case, and the peak of memory of one kind."""
    command = [sys.executable, __file__, "--child", name, "--seed", str(seed), "--number", str(number)]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=MOST_SECONDS)
            lines, end = done.stdout.splitlines(), "" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            lines, end = (error.stdout or b"").decode().splitlines(), f"no end after {MOST_SECONDS} s"
        errors.seek(0)
        panics = errors.read().count("panicked at")
    found = [json.loads(line) for line in lines]
    peak = found.pop() if found and not isinstance(found[-1], list) else float("nan")
    survivors = [[outcome, how] for outcome, how, _ in found if outcome not in GOOD]
    if end:
        survivors.append([f"{end}, after {len(found)} cases", ""])
    if panics:
        survivors.append([f"{panics} panics of a library on standard error", ""])
    return {
        "cases": len(found),
        "counts": dict(collections.Counter(outcome for outcome, _, _ in found if outcome in GOOD)),
        "survivors": survivors,
        "longest": max((seconds for _, _, seconds in found), default=0.0),
        "peak_mib": peak,
        "seconds": time.monotonic() - start,
    }


def table(results: dict[str, dict], seed: int) -> str:
    total = sum(result["cases"] for result in results.values())
    survivors = sum(len(result["survivors"]) for result in results.values())
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "tokenizers", "safetensors")
    )
    lines = [
        "# Malformed inputs",
        "",
        f"`experiments/fuzz.py`, seed {seed}: {total:,} cases, {survivors} survivors ({versions}). Refused: in one "
        "sentence. Same: accepted with the very results of the file before its mutation. Another: a mutation that is "
        "not malformed, such as a deleted setting or a flipped bit in a float, made another valid file.",
        "",
        "| input | cases | refused | same | another | survivors | longest case, s | peak of the process, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        counts = " | ".join(str(result["counts"].get(kind, 0)) for kind in GOOD)
        lines.append(
            f"| {name} | {result['cases']:,} | {counts} | {len(result['survivors'])} | {result['longest']:.1f} | "
            f"{result['peak_mib']:,.0f} |"
        )
    told = [f"- {name}: {outcome!r} {how!r}" for name, r in results.items() for outcome, how in r["survivors"]]
    return "\n".join([*lines, "", *(["## Survivors", "", *told] if told else ["No case survived."])]) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=13)
    options.add_argument("--times", type=float, default=1.0)
    options.add_argument("--only", default="")
    options.add_argument("--child", help=argparse.SUPPRESS)
    options.add_argument("--number", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        child(given.child, given.seed, given.number)
        return
    results = {}
    for name, kind in KINDS.items():
        if given.only in name:
            results[name] = run(name, given.seed, max(1, round(kind.number * given.times)))
            print(
                f"{name}: {results[name]['cases']:,} cases, {len(results[name]['survivors'])} survivors", flush=True
            )
            if not given.only:
                (RESULTS / "fuzz.md").write_text(table(results, given.seed))
    if given.only:
        print(table(results, given.seed))


if __name__ == "__main__":
    main()

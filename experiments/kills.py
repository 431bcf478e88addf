"""Kills of every command inside its saves and page writes: what is seen afterwards, and what another run makes of it.

    python experiments/kills.py [--kills 100] [--seed 0] [--commands report trim ...]

For each command an undisturbed run tells how many times it writes below its folder (files opened for writing,
renames, new and removed names, as Python's audit events tell them). Each further run is killed with SIGKILL at
one of these moments drawn at random, half of them up to 50 ms later, inside what compiled code writes. Two
tasks are finished in the folder of a report before. Afterwards every file under its final name must be whole
and what was finished before must restore to the same bits; the same command with --resume (again, where there
is nothing to resume) must exit with 0, leave nothing of the killed run, and end in the bits of the undisturbed
run. Counts go to results/kills.json, beside those of other commands.

One process imports the library and forks for every run, before JAX starts any thread.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cli")]
RESULTS = Path(__file__).resolve().parent / "results" / "kills.json"
COMMANDS = ("report", "train", "spectrum", "compare", "merge", "trim")
WITH_STATE = ("report", "train", "spectrum")


def load_before_forking() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import orbax.checkpoint  # noqa: F401

    from fisher_jax.cli.trim import command as trim  # noqa: F401


def forked(arguments: list[str], out: Path, number: int = 0, seconds: float = 0.0) -> tuple[int, int, str]:
    """(exit code or minus the signal, writes, what was said) of a command in a process of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        said = io.StringIO()
        from dying import kill_at

        from fisher_jax.cli.main import main

        count = kill_at(str(out), number, seconds)
        code = 70
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = main(arguments)
        finally:
            os.write(writer, json.dumps([count[0], said.getvalue()[-2000:]]).encode())
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        told = stream.read()
    status = os.waitpid(pid, 0)[1]
    writes, said = json.loads(told) if told else (0, "")
    return os.waitstatus_to_exitcode(status), writes, said


def whole(folder: Path) -> list[str]:
    """Names of files that stand under their final names and end too early."""
    wrong = []
    ends = {".html": b"</html>", ".png": b"IEND\xaeB`\x82", ".csv": b"\n", ".md": b"\n"}
    for path in folder.rglob("*"):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        raw = path.read_bytes()
        if path.suffix in ends and not (raw.endswith(ends[path.suffix]) or raw.rstrip().endswith(ends[path.suffix])):
            wrong.append(path.name)
        if path.suffix == ".json":
            try:
                json.loads(raw)
            except ValueError:
                wrong.append(path.name)
    return wrong


def bits(command: str, out: Path) -> dict[str, object]:
    """What a run computed, without times and dates."""
    import hashlib

    found: dict[str, object] = {}
    if command in ("report", "train"):
        code, _, said = forked_digest(out / "state")
        found["state"] = said if code == 0 else f"cannot be restored: {said}"
    files = {
        "compare": ["compare.csv"], "merge": ["model.safetensors", "config.json", "merge.json", "tokenizer.json"],
        "trim": ["model.safetensors", "config.json", "trim.json", "tokenizer.json"],
        "train": ["model/model.safetensors"], "report": [], "spectrum": ["spectrum.csv"],
    }[command]  # fmt: skip
    for name in files:
        path = out / name
        # merge.json names the folder that it lies in.
        raw = path.read_bytes().replace(bytes(out), b"OUT") if path.exists() else None
        found[name] = None if raw is None else hashlib.sha256(raw).hexdigest()
    return found


def forked_digest(state: Path) -> tuple[int, int, str]:
    """Digests of the tasks of a state, told as what a process said."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        import hashlib

        import jax
        import numpy as np

        import fisher_jax as fj

        try:
            facts = fj.checkpoint.metadata(state)
            like = None
            if "tasks" not in facts:
                told = leaves_of_training(state)
            else:
                told = {}
                for name, arrays in fj.checkpoint.restore(state, like).items():
                    raw = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(arrays))
                    done = facts["tasks"][name]["batches_done"]
                    told[name] = f"{done} {hashlib.sha256(raw).hexdigest()[:16]}"
            os.write(writer, json.dumps(told).encode())
            os._exit(0)
        except BaseException as error:
            os.write(writer, repr(error).encode())
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0, said


def leaves_of_training(state: Path) -> dict[str, object]:
    """The curve of a training run; its weights are compared as the model that is written from them."""
    import fisher_jax as fj

    facts = fj.checkpoint.metadata(state)
    return {"step": facts["step"], "losses": [[p[0], p[1], p[3], p[4]] for p in facts["points"]]}


def prepare(root: Path) -> dict[str, list[str]]:
    """A tiny model, texts, a report with two finished tasks; the arguments of each command without --out."""
    from tiny import write_model, write_texts

    model, texts = str(write_model(root / "tiny")), write_texts(root / "texts", count=8, words=80)
    other = str(write_model(root / "other", seed=1))
    length = ["--row-length", "32", "--batch-size", "4"]
    report = ["report", "--model", model, "--text", *texts, *length, "--max-tokens", "400", "--held-out-tokens", "0"]
    for task in ("first", "second"):
        more = ["--text", *texts[:4]] if task == "second" else []
        code, _, said = forked([*report, *more, "--task", task, "--out", str(root / "report")], root / "report")
        assert code == 0, said
    some = ["--text", *write_texts(root / "many"), "--characters", "60"]
    return {
        "report": [*report, "--checkpoint-every", "0"],
        "train": [
            "train", "--text", *texts, "--optimizer", "adamw", "--steps", "6", "--eval-every", "3", "--width", "16",
            "--layers", "1", "--heads", "2", "--row-length", "16", "--batch-size", "4", "--held-out-tokens", "64",
            "--checkpoint-every", "0",
        ],
        "spectrum": [
            "spectrum", "--model", model, "--text", *texts, "--k", "2", "--max-tokens", "120", "--row-length", "32",
            "--parameters", "norm", "--max-products", "8", "--checkpoint-every", "0",
        ],
        "compare": ["compare", str(root / "report"), "--model", model],
        "merge": ["merge", "--models", model, other, "--by", "uniform", *some],
        "trim": ["trim", "--model", model, "--by", "magnitude", "--keep", "270", *some],
    }  # fmt: skip


def one_command(command: str, arguments: list[str], root: Path, kills: int, dice: random.Random) -> dict:
    before = root / f"before-{command}"
    before.mkdir()
    if command == "report":
        shutil.rmtree(before)
        shutil.copytree(root / "report", before)
    reference = Path(shutil.copytree(before, root / f"reference-{command}"))
    if command == "report":
        arguments = [*arguments, "--task", "third"]
    code, writes, said = forked([*arguments, "--out", str(reference)], reference)
    assert code == 0, said
    want, had = bits(command, reference), bits(command, before) if command == "report" else {}
    counts = {"writes": writes, "kills": 0, "ended_before": 0, "resumed": 0, "again": 0, "wrong": []}
    for i in range(kills):
        out = Path(shutil.copytree(before, root / f"{command}-{i}"))
        number, seconds = dice.randint(1, writes), dice.choice([0.0, dice.uniform(0, 0.05)])
        where = f"write {number} of {writes} + {1000 * seconds:.0f} ms"
        code, _, said = forked([*arguments, "--out", str(out)], out, number, seconds)
        counts["kills" if code == -signal.SIGKILL else "ended_before"] += 1
        if code not in (0, -signal.SIGKILL):
            counts["wrong"].append(f"{where}: exit {code}: {said[-300:]}")
        if cut := whole(out):
            counts["wrong"].append(f"{where}: half written: {cut}")
        if command == "report":
            now, then = json.loads(str(bits(command, out)["state"])), json.loads(str(had["state"]))
            if any(now.get(task) != then[task] for task in then):
                counts["wrong"].append(f"{where}: a finished task changed")
        more = ["--resume"] if command in WITH_STATE else []
        code, _, said = forked([*arguments, *more, "--out", str(out)], out)
        counts["resumed" if code == 0 and more else "again"] += 1
        if code == 2 and "nothing to resume" in said:
            code, _, said = forked([*arguments, "--out", str(out)], out)
        if code == 2 and "holds a model" in said:  # it was killed after its last rename
            code = 0
        if code != 0:
            counts["wrong"].append(f"{where}: then exit {code}: {said[-300:]}")
        elif bits(command, out) != want:
            counts["wrong"].append(f"{where}: other bits")
        left = [x.name for x in out.rglob(".*")]
        if left:
            counts["wrong"].append(f"{where}: left over: {left}")
        shutil.rmtree(out)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of all commands together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", default=COMMANDS, choices=COMMANDS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*fork.*")
    os.environ["JAX_PLATFORMS"] = "cpu"
    import orbax.checkpoint  # noqa: F401

    from fisher_jax.cli.trim import command as trim  # noqa: F401

    dice, started = random.Random(options.seed), time.time()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # of other commands
    with tempfile.TemporaryDirectory() as folder:
        arguments = prepare(Path(folder))
        share, more = divmod(options.kills, len(options.commands))
        for i, command in enumerate(options.commands):
            results[command] = one_command(command, arguments[command], Path(folder), share + (i < more), dice)
            print(f"{command} ({time.time() - started:.0f} s): {results[command]}", flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

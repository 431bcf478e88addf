"""Every command of the README in order, and every block of Python, on tiny models and texts in one folder."""

import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from running import quick

import fisher_jax as fj

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
CORPORA = ("wikipedia", "pubmed", "news")
MODEL = "tiny-llama"
# Sizes in the place of the default ones, by command.
SMALL = {
    "report": ["--max-tokens", "500", "--held-out-tokens", "60", "--batch-size", "4"],
    "spectrum": ["--max-products", "12", "--probes", "2", "--density-steps", "3", "--block-tokens", "4"],
    "compare": [],
    "join": [],
    "train": ["--steps", "2", "--eval-every", "1", "--batch-size", "2", "--held-out-tokens", "60"],
    "merge": ["--documents", "2", "--characters", "40"],
    "trim": ["--documents", "2", "--characters", "40"],
}
# What is not the model of `--init`.
SMALL_MODEL = ["--width", "16", "--layers", "1", "--heads", "2"]
# Values in the place of those that the README has.
INSTEAD = {"--max-tokens": "30", "--keep": "280"}
PARTS = 2  # in the place of 16
FLAGS = {"--resume", "--density", "--blocks"}
PLAIN = {"--out", "--parameters", "--model", "--models", "--states", "--base", "--init", "--state", "--task",
         "--compare", "--operator", "--k"}  # fmt: skip
OTHERS = (["pip", "install", "uv"], ["uv", "run", "pytest"])


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Every command of the README: its words."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [x for x in words if x and x not in OTHERS]


def tiny_commands(words):
    """The same on tiny models and texts; for one part of a run, the commands of all its parts.

    Fails for a program, a command or an option that it does not know.
    """
    assert words[:3] == ["uv", "run", "fisher-jax"], f"an unknown program: {' '.join(words)}"
    command, *rest = words[3:]
    done, texts, option = [command], [], None
    for word in rest:
        if word.startswith("--"):
            known = FLAGS | PLAIN | set(INSTEAD) | {"--text", "--part"}
            assert word in known, f"an unknown option of {command}: {word}"
            option = word
            texts += [[]] if word == "--text" else []
            done += [word] if word != "--text" else []
        elif option == "--text":
            texts[-1].append(word)
        elif word.endswith("-of-16/"):
            done += sorted(map(str, pathlib.Path().glob(word.replace("-of-16", f"-of-{PARTS}"))))
        else:
            done.append(INSTEAD.get(option, word))
    texts = texts or ([["wikipedia"]] if command in ("report", "spectrum", "train", "trim") else [])
    for names in texts:
        of = names[0] if names[0] in CORPORA else None
        done += ["--text", *(sorted(map(str, pathlib.Path(of).glob("*.txt"))) if of else names)]
        done += ["--task", of] if of and command == "report" else []
    if command in ("report", "spectrum", "compare", "trim") and "--model" not in done:
        done += ["--model", MODEL]
    done += SMALL[command] + (SMALL_MODEL if command == "train" and "--init" not in done else [])
    if "--part" not in done:
        return [done]
    place = done.index("--part") + 1
    return [[*done[:place], f"{number}/{PARTS}", *done[place + 1 :]] for number in range(1, PARTS + 1)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader stands who has a model and two texts of his own."""
    monkeypatch.chdir(tmp_path)
    tiny.write_model(tmp_path / MODEL)
    tiny.write_model(tmp_path / "my-llama", seed=1)
    for number, name in enumerate(CORPORA):
        (tmp_path / name).mkdir()
        for document in range(16):
            (tmp_path / name / f"{document:02d}.txt").write_text(tiny.prose(100 * number + document, 40))
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(tiny.prose(ord(name)))
    return tmp_path


def test_every_command_works_in_order(folder, capsys):
    known = {"report", "spectrum", "compare", "train", "merge", "trim", "join"}
    found = commands()
    assert {words[3] for words in found} == known
    for words in found:
        for arguments in tiny_commands(words):
            code = quick(arguments)
            captured = capsys.readouterr()
            assert code == 0, f"{shlex.join(words[2:])}: {captured.err}"
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "pubmed" in page
    assert (folder / "trimmed" / "model.safetensors").is_file()
    assert (folder / "merged" / "model.safetensors").is_file()


def test_a_new_command_or_option_is_noticed():
    for words in ("uv run fisher-jax invent", "uv run fisher-jax report --invented 3", "npm install"):
        with pytest.raises((AssertionError, KeyError)):
            tiny_commands(shlex.split(words))


@pytest.fixture
def names(folder):
    """What the README's text says is there: any `apply_fn`, its parameters, a batch; states and Fishers."""
    rng = np.random.default_rng(0)

    def apply_fn(params, inputs):
        return jax.nn.one_hot(inputs, 5) @ params["kernel"]

    def mean_loss(params, batch):
        return -jnp.mean(fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets))

    def scores(scale):
        return fj.welford.observe(jnp.float32(rng.gamma(2.0, scale, (30, 6))), unit="sequence")

    states = [scores(scale) for scale in (1.0, 1.0, 3.0)]
    trees = [{"kernel": jnp.float32(rng.normal(size=(4, 3)))} for _ in range(3)]
    fishers = [{"kernel": jnp.float32(rng.gamma(1.0, size=(4, 3)))} for _ in range(2)]
    batch = fj.next_token_batch(jnp.asarray(rng.integers(0, 5, (4, 7))))
    params = {"kernel": jnp.float32(rng.normal(size=(5, 5)))}
    return {
        "jax": jax, "jnp": jnp, "fj": fj, "optax": optax, "apply_fn": apply_fn, "mean_loss": mean_loss,
        "params": params, "batch": batch, "key": jax.random.key(0), "grads": jax.grad(mean_loss)(params, batch),
        "head": jnp.float32(rng.normal(size=(6, 4))), "wikipedia": states[0], "pubmed": states[2],
        "windows": states, "one": trees[0], "two": trees[1], "anchor": trees[2], "fisher_one": fishers[0],
        "fisher_two": fishers[1],
    }  # fmt: skip


def test_every_block_of_python_runs_in_order(names):
    first, *rest = (code.replace("models.load()", f"models.load({MODEL!r})") for code in blocks("python"))
    of_first: dict = {}
    exec(first, of_first)
    assert np.all(np.isfinite(of_first["importance"]))
    for code in rest:
        if "prune_mask" in code:  # a state of the head that stands there
            names |= {"importance": fj.welford.mean(names["wikipedia"])[:, None], "state": names["wikipedia"]}
        exec(code, names)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.all(jnp.isfinite(x))), names["average"]))
    assert pathlib.Path("fisher.safetensors").is_file()

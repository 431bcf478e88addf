"""The README says what is so: its library example runs, its pictures and files are there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisher_jax as fj

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs(shipped_model):
    code, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {"shipped_model": shipped_model}
    exec(code.replace("models.load()", "shipped_model"), names)
    importance = np.asarray(names["importance"])
    assert importance.shape == (shipped_model.config.vocab_size,)
    # The model can tell that a capital follows: the names of cities and countries matter more than most tokens.
    paris = shipped_model.tokenizer.encode(" Paris")
    assert importance[paris].mean() > np.quantile(importance, 0.99)
    assert fj.welford.weight(names["state"]) == names["tokens"].size - 1


def test_the_training_example_runs():
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    params = {"kernel": jnp.zeros((2, 3))}
    names = {
        "fj": fj, "optax": optax, "params": params, "grads": params, "key": jax.random.key(0),
        "apply_fn": lambda params, x: x @ params["kernel"],
        "batch": fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2])),
    }  # fmt: skip
    first, second, *rest = code.splitlines()
    exec("\n".join([first, second, "opt_state = tx.init(params)", *rest]), names)
    assert names["fisher"]["kernel"].shape == (2, 3)
    assert float(names["fisher"]["kernel"].min()) > 0


def test_the_example_with_taps_runs():
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "taps=taps" in c)
    batch = fj.next_token_batch(jnp.array([[0, 1, 2, 2], [1, 0, 1, 2]]))

    def apply_fn(params, x):
        return jax.nn.one_hot(x, 3) @ params["kernel"]

    def mean_loss(params, batch):
        return -jnp.mean(fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets))

    params = {"kernel": jnp.zeros((3, 3))}
    names = {"fj": fj, "params": params, "batch": batch, "apply_fn": apply_fn, "mean_loss": mean_loss}
    exec(code, names)
    own = names["fisher"].observe(names["params"], batch)
    np.testing.assert_allclose(fj.welford.mean(names["moments"])["kernel"], fj.welford.mean(own)["kernel"], rtol=1e-5)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_public_name_is_there():
    stub = (ROOT / "fisher_jax" / "__init__.pyi").read_text(encoding="utf-8")
    assert sorted(re.findall(r" as (\w+)", stub)) == sorted(fj.__all__) == sorted(dir(fj))
    for name in fj.__all__:
        assert getattr(fj, name) is not None


def test_the_example_of_uses_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "merge_params" in c)
    rng = np.random.default_rng(0)

    def document_scores(scale):
        return fj.welford.observe(jnp.float32(rng.gamma(2.0, scale, (30, 6))), unit="sequence")

    states = [document_scores(scale) for scale in (1.0, 1.0, 3.0)]
    trees = [{"kernel": jnp.float32(rng.normal(size=(4, 3)))} for _ in range(3)]
    fishers = [{"kernel": jnp.float32(rng.gamma(1.0, size=(4, 3)))} for _ in range(2)]
    names = {
        "fj": fj, "optax": optax, "head": jnp.float32(rng.normal(size=(6, 4))),
        "importance": fj.welford.mean(states[0])[:, None], "state": states[0], "wikipedia": states[0],
        "pubmed": states[2], "windows": states, "one": trees[0], "two": trees[1], "anchor": trees[2],
        "fisher_one": fishers[0], "fisher_two": fishers[1],
    }  # fmt: skip
    exec(code, names)
    assert int(jnp.sum(jnp.any(names["head"] != 0, 1))) == 3
    assert (names["shift"].q < 0.05).all()
    assert np.all(names["drift"].change == 2)
    assert pathlib.Path("fisher.safetensors").is_file()

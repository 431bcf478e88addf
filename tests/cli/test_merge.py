"""`fisher-jax merge`: every parameter against plain sums in NumPy, what is measured of it, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from kept import keep, places
from running import main
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fisher_jax as fj
from fisher_jax.models import load
from fisher_jax.models.weight_names import flatten
from fisher_jax.text.bits_per_byte import bits_per_byte, measure, measure_in_pieces, pieces

HEAD_SIZE = tiny.WIDTH // tiny.HEADS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models, a base and the reports of the two."""
    root = tmp_path_factory.mktemp("merge")
    for name, seed in {"one": 0, "two": 1, "base": 2}.items():
        tiny.write_model(root / name, seed=seed)
    return root


@pytest.fixture(scope="module")
def sums(folders):
    """Group sums of both models, by what they are sums over, as their reports keep them."""
    rng, found = np.random.default_rng(0), []
    for name in ("one", "two"):
        model = load(folders / name)
        where, number = places(model)
        rows, layers = (rng.gamma(1.0, 1.0, (3, n)) for n in (model.config.vocab_size, number))
        keep(folders / f"report-{name}", "text", model, {"empirical": rows, "true": rows + 1}, layers)
        of_layers = np.float32(layers).mean(0, dtype=float)
        fields = {field: {path: of_layers[x] for path, x in paths.items()} for field, paths in where.items()}
        found.append({"rows": np.float32(rows).mean(0, dtype=float), **fields})
    return found


def merge(folders, out, *options, models=("one", "two"), reports=True):
    states = ["--states", *(str(folders / f"report-{name}") for name in models)] if reports else []
    return main(
        ["merge", "--models", *(str(folders / name) for name in models), *states, "--out", str(out), *options]
    )


def tensors(folder):
    return {name: x.astype(float) for name, x in load_file(folder / "model.safetensors").items()}


def weighted(one, two, first, second):
    return (first * one + second * two) / (first + second)


def test_rows_heads_and_tensors_count_by_their_groups(folders, sums, tmp_path, capsys):
    assert merge(folders, tmp_path / "out") == 0
    one, two, merged = (tensors(folder) for folder in (folders / "one", folders / "two", tmp_path / "out"))
    checked = set()

    def check(name, first, second):
        np.testing.assert_allclose(merged[name], weighted(one[name], two[name], first, second), rtol=2e-5, atol=1e-6)
        checked.add(name)

    check("model.embed_tokens.weight", *(x["rows"][:, None] for x in sums))
    check("model.norm.weight", *(x["tensors"]["final_norm/scale"] for x in sums))
    for layer in range(tiny.LAYERS):
        for name in "qkvo":
            heads = [x["heads"][f"layers/attention/{name}/kernel"][layer] for x in sums]
            units = [np.repeat(x, HEAD_SIZE) for x in heads]
            # Hugging Face's kernels are [out, in]: heads of the output kernel lie along its columns.
            sides = [x[None, :] if name == "o" else x[:, None] for x in units]
            check(f"model.layers.{layer}.self_attn.{name}_proj.weight", *sides)
        for ours, theirs in {
            "mlp/gate/kernel": "mlp.gate_proj", "mlp/up/kernel": "mlp.up_proj", "mlp/down/kernel": "mlp.down_proj",
            "attention_norm/scale": "input_layernorm", "mlp_norm/scale": "post_attention_layernorm",
        }.items():  # fmt: skip
            check(f"model.layers.{layer}.{theirs}.weight", *(x["tensors"][f"layers/{ours}"][layer] for x in sums))
    assert checked == merged.keys()
    assert "rows of the head (in its use as head), attention heads, else whole tensors" in capsys.readouterr().out
    assert load(tmp_path / "out").tokenizer.encode("the river") == load(folders / "one").tokenizer.encode("the river")


def test_a_model_merged_with_itself_comes_back(folders, sums, tmp_path):
    assert merge(folders, tmp_path / "out", models=("one", "one")) == 0
    before, after = (load_file(x / "model.safetensors") for x in (folders / "one", tmp_path / "out"))
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_a_file_brings_every_parameter_and_goes_with_the_sums_of_a_report(folders, sums, tmp_path):
    params = flatten(load(folders / "two").params)
    rng = np.random.default_rng(1)
    fisher = {path: rng.gamma(1.0, 1.0, x.shape).astype(np.float32) for path, x in params.items()}
    nested = {}
    for path, x in fisher.items():
        *parents, last = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(x)
    file = tmp_path / "fisher.safetensors"
    fj.exchange.save(file, nested, names="huggingface", metadata={"kind": "empirical"})
    states = ["--states", str(folders / "report-one"), str(file)]
    assert merge(folders, tmp_path / "out", *states, "--weights", "3", "1", reports=False) == 0
    one, two, merged = (tensors(folder) for folder in (folders / "one", folders / "two", tmp_path / "out"))
    name, path = "model.layers.1.mlp.up_proj.weight", "layers/mlp/up/kernel"
    first = 3 * sums[0]["tensors"][path][1] / one[name].size  # of one parameter
    np.testing.assert_allclose(merged[name], weighted(one[name], two[name], first, fisher[path][1].T), rtol=2e-5)
    name, path = "model.layers.0.self_attn.v_proj.weight", "layers/attention/v/kernel"
    first = 3 * np.repeat(sums[0]["heads"][path][0], HEAD_SIZE)[:, None] / (HEAD_SIZE * tiny.WIDTH)
    np.testing.assert_allclose(merged[name], weighted(one[name], two[name], first, fisher[path][0].T), rtol=2e-5)


def test_other_ways_to_weigh(folders, tmp_path):
    one, two, base = (tensors(folders / name) for name in ("one", "two", "base"))
    start = ["--base", str(folders / "base")]
    ways = {
        "uniform": (["--weights", "1", "3"], lambda n: (one[n] + 3 * two[n]) / 4),
        "magnitude": ([], lambda n: weighted(one[n], two[n], abs(one[n]), abs(two[n]))),
        "task": ([*start, "--scale", "2"], lambda n: base[n] + (one[n] - base[n]) + (two[n] - base[n])),
        "change": (start, lambda n: base[n] + weighted(*changes(n), *map(abs, changes(n)))),
    }

    def changes(name):
        return [x[name] - base[name] for x in (one, two)]

    for i, (way, (options, wanted)) in enumerate(ways.items()):
        by = {"task": "uniform", "change": "magnitude"}.get(way, way)
        assert merge(folders, tmp_path / str(i), "--by", by, *options, reports=False) == 0
        merged = tensors(tmp_path / str(i))
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
            np.testing.assert_allclose(merged[name], wanted(name), rtol=1e-4, atol=1e-6)


def test_the_told_bits_per_byte_are_those_of_the_models(folders, tmp_path, capsys):
    texts = tiny.write_texts(tmp_path / "texts", count=16, words=12)
    options = ["--by", "magnitude", "--text", *texts, "--characters", "40", "--overwrite"]
    assert merge(folders, tmp_path / "out", *options, reports=False) == 0
    told = json.loads((tmp_path / "out" / "merge.json").read_text())["bits_per_byte"]
    held = [tiny.prose(number, 12)[:40] for number in (7, 15)]
    models = {str(folders / "two"): folders / "two", f"merged: {tmp_path / 'out'}": tmp_path / "out"}
    for name, folder in models.items():
        assert list(told[name].values()) == [pytest.approx(bits_per_byte(measure(load(folder), held)))]
    assert set(told) == {str(folders / "one"), *models, "plain mean (not written)"}
    assert "merged less plain mean" in capsys.readouterr().out


def test_a_text_longer_than_the_positions_is_read_in_pieces(folders):
    model = load(folders / "one")
    text = tiny.prose(0, 40) + "où 水 😀 " + "zq" * 70
    cut = list(pieces([model], text))
    assert "".join(cut) == text
    assert len(cut) > 3
    assert max(len(model.tokenizer.encode(piece)) for piece in cut) <= 63
    loss, apart = measure_in_pieces([model], [text, "the river"])[0], measure(model, cut)
    assert loss.bytes.tolist() == [len(text.encode()), 9]
    assert loss.bits[0] == pytest.approx(apart.bits.sum(), rel=1e-5)


@pytest.fixture(scope="module")
def unfit(folders, sums):
    """The same folder with models and states beside them that cannot be merged."""
    model = load(folders / "two")
    rows = {"empirical": np.ones((3, model.config.vocab_size))}
    keep(folders / "head", "text", model, rows)
    layers = np.ones((3, places(model)[1]))
    keep(folders / "true", "text", model, {**rows, "true": rows["empirical"]}, layers, kind="true")
    save_file({"model.norm.weight": np.ones(tiny.WIDTH, np.float32)}, folders / "foreign.safetensors")
    fj.exchange.save(folders / "part.safetensors", {"embedding": jnp.ones(model.params["embedding"].shape)})
    file = folders / "negative.safetensors"
    fj.exchange.save(file, jax.tree.map(jnp.ones_like, model.params))
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    spoilt = load_file(file)
    spoilt["layers.mlp.up.kernel"][1, 2, 3] = -1
    save_file(spoilt, file, metadata=metadata)
    tiny.write_model(folders / "wide", mlp=64)
    tokenizer = tiny.write_model(folders / "words") / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    fifth, sixth = (next(token for token, id in vocabulary.items() if id == number) for number in (5, 6))
    vocabulary[fifth], vocabulary[sixth] = 6, 5
    tokenizer.write_text(json.dumps(content))
    return folders


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--models", "{f}/one"], "one model alone cannot be merged"),
        (["--models", "{f}/one", "{f}/two"], "--by fisher needs a state for each of the 2 models, found 0"),
        (["--states", "{f}/report-two", "{f}/report-one"], "give --states in the order of --models"),
        (["--states", "{f}/report-one", "{f}/report-one"], "stands beside two"),
        (["--states", "{f}/report-one", "{f}/head"], "holds rows of the head alone"),
        (["--states", "{f}/report-one", "{f}/true"], "the empirical Fisher in"),
        (["--states", "{f}/report-one", "nowhere"], "nowhere holds no state"),
        (["--states", "{f}/report-one", "{f}/foreign.safetensors"], "was not written by fj.exchange.save"),
        (["--states", "{f}/report-one", "{f}/part.safetensors"], "does not go with two: the parameters"),
        (["--states", "{f}/report-one", "{f}/negative.safetensors"], "have changed"),
        (["--by", "uniform", "--states", "{f}/report-one", "{f}/report-two"], "--states are for --by fisher"),
        (["--by", "uniform", "--weights", "1"], "--weights needs one number for each of the 2 models"),
        (["--by", "uniform", "--weights", "0", "0"], "all --weights are 0"),
        (["--by", "uniform", "--scale", "2"], "give that model with --base"),
        (["--by", "uniform", "--models", "{f}/one", "{f}/wide"], "different architectures: mlp_size is 32 and 64"),
        (["--by", "uniform", "--models", "{f}/one", "{f}/words"], "different tokenizers: token 5 is"),
        (["--by", "uniform", "--base", "{f}/wide"], "different architectures"),
        (["--by", "uniform", "--out", "{f}/base"], "holds a model; choose another --out"),
        (["--by", "uniform", "--out", "{f}/one"], "lies in"),
        (["--by", "uniform", "--text", "nowhere.txt"], "there is no text file"),
    ],
)
def test_input_that_cannot_be_used(options, sentence, unfit, tmp_path, capsys):
    given = [option.format(f=unfit) for option in options]
    if "--models" not in given:
        given = ["--models", f"{unfit}/one", f"{unfit}/two", *given]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    assert main(["merge", *given]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
